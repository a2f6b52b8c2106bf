"""Regions and arrays travel to other processes as handles: the same memory there, kept for whoever holds it."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from regions import run_python, start_python, unique_name, wait_until

import dmh
from dmh.config import loads
from dmh.errors import RegionError, ServiceError

OpenRegion = Callable[..., dmh.Region]


def round_trip(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


class TestTypes:
    def test_results_are_plain_arrays_and_views_are_not(self, open_region: OpenRegion) -> None:
        a = open_region().zeros((4, 5))
        results = [a + 1, np.add(a, a), a.copy(), a.astype("f4"), a.flatten(), a.mean(axis=0), a @ a.T, np.sort(a), np.concatenate([a, a])]  # fmt: skip
        assert {type(result) for result in results} == {np.ndarray}
        assert type(a.sum()) is np.float64
        assert type(a[1, 2]) is np.float64
        assert {type(view) for view in (a[1:], a.T, a[..., None], a.view("u8"), a.reshape(20))} == {dmh.Array}
        same = a
        a += 1
        np.multiply(a, 2, out=a)
        assert a is same
        assert (a == 2).all()

    def test_what_was_copied_out_is_pickled_by_content(self, open_region: OpenRegion) -> None:
        a = open_region().zeros(1000, "u1")
        a[:] = 3
        for outside in (a[a > 2], np.asarray(a), np.zeros_like(a) + 3, copy.deepcopy(a)):
            content = pickle.dumps(outside, protocol=5)
            assert len(content) > 1000
            again = pickle.loads(content)
            assert type(again) is np.ndarray
            assert (again == 3).all()
            assert not np.shares_memory(a, again)


class TestHandles:
    def test_any_view_comes_back_as_the_same_memory(self, open_region: OpenRegion, rng: np.random.Generator) -> None:
        region = open_region()
        region.empty(5000)  # so that the next is not at the region's start
        array = region.empty((40, 60), "u8")
        array[:] = rng.integers(0, 1 << 60, array.shape)
        records = array.view([("x", "u4"), ("y", "u4")])
        spread = np.broadcast_to(array[0], (50, 60), subok=True)
        for view in (array, array[3:7, ::-2], array.T, array[::-1, ::-1], array[2, 3, ...], records, spread):
            handle = pickle.dumps(view)
            assert len(handle) < 600
            again = pickle.loads(handle)
            assert (again.shape, again.strides, again.dtype) == (view.shape, view.strides, view.dtype)
            assert again.__array_interface__["data"] == view.__array_interface__["data"]

    def test_a_placed_array_and_an_empty_one(self, open_region: OpenRegion) -> None:
        region = open_region()
        placed = region.ndarray(100, "u1", 4090)
        placed[:] = 7
        assert np.shares_memory(round_trip(placed), placed)
        assert round_trip(region.empty((3, 0))).shape == (3, 0)

    def test_a_region_is_itself_in_its_own_process(self, open_region: OpenRegion) -> None:
        region = open_region()
        assert round_trip(region) is region

    def test_a_service_that_has_ended_is_not_confused_with_another_of_its_name(self) -> None:
        name = unique_name()
        settings = loads(
            "region: {size: 1MiB}\nmemory: {limit: 64KiB}\nstore: {url: 'memory:'}", [f"region.name={name}"]
        )
        with dmh.open(settings) as region:
            handle = pickle.dumps(region)
            array = pickle.dumps(region.empty(10))
        with pytest.raises(ServiceError, match="no service answers"):
            pickle.loads(handle)
        with dmh.open(settings):
            for thing in (handle, array):
                with pytest.raises(ServiceError, match="has ended; another runs under its name"):
                    pickle.loads(thing)


class TestLifetime:
    def allocated(self, region: dmh.Region, pages: int) -> None:
        wait_until(lambda: region.stats().allocated == pages, f"{pages} pages are handed out")

    def test_pages_stay_for_who_has_not_unpickled_yet(self, open_region: OpenRegion) -> None:
        region = open_region()
        array = region.empty((10, 4096), "u1")
        array[:] = 8
        handle = pickle.dumps(array[5])
        del array
        gc.collect()
        self.allocated(region, 10)
        again = pickle.loads(handle)
        third = pickle.loads(handle)
        del again
        gc.collect()
        assert (third == 8).all(), "received twice, held twice"
        self.allocated(region, 10)
        del third
        gc.collect()
        self.allocated(region, 0)
        with pytest.raises(RegionError, match="this array is gone"):
            pickle.loads(handle)

    def test_a_handle_of_pages_that_were_given_to_another_array_is_refused(self, open_region: OpenRegion) -> None:
        """The page numbers are the same again; the bytes are somebody else's."""
        region = open_region()
        array = region.empty(4096, "u1")
        handle = pickle.dumps(array)
        pickle.loads(handle)
        del array
        gc.collect()
        self.allocated(region, 0)
        other = region.empty(4096, "u1")
        with pytest.raises(RegionError, match="this array is gone"):
            pickle.loads(handle)
        assert region.offset_of(other) == 0

    def test_a_loan_ends_with_the_program_that_gave_it(self, open_region: OpenRegion) -> None:
        region = open_region()
        code = """
            import pickle, sys, dmh
            region = dmh.attach(sys.argv[1])
            array = region.empty((3, 4096), "u1")
            array[:] = 4
            print(pickle.dumps(array).hex(), flush=True)
            sys.stdin.readline()
            """
        with start_python(code, region.name) as program:
            assert program.stdin is not None
            assert program.stdout is not None
            handle = bytes.fromhex(program.stdout.readline())
            received = pickle.loads(handle)
            program.stdin.write("\n")
            program.stdin.close()
            program.wait()
        wait_until(lambda: region.stats().programs == 1, "the sender is gone")
        assert (received == 4).all(), "what was received stays"
        del received
        gc.collect()
        self.allocated(region, 0)

        ended = run_python(code, region.name, input="\n")
        self.allocated(region, 0)
        with pytest.raises(RegionError, match="whoever sent it has ended"):
            pickle.loads(bytes.fromhex(ended.stdout))


def _add_one(array: dmh.Array) -> dmh.Array:
    array += 1
    return array[::2]


def _make(region: dmh.Region, value: int) -> dmh.Array:
    array = region.empty((20, 4096), "u1")
    array[:] = value
    return array


def _echo(inbox: Any, outbox: Any) -> None:
    while (array := inbox.get()) is not None:
        array[0] = 99
        outbox.put(array)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing(open_region: OpenRegion, method: str) -> None:
    """Arguments, results and queues: nothing is copied, and each process joins once."""
    region = open_region()
    array = region.empty((100, 4096), "u1")
    array[:] = 5
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        halves = pool.map(_add_one, [array[:50], array[50:]])
        assert (array == 6).all()
        assert all(np.shares_memory(half, array) for half in halves)
        made = pool.starmap(_make, [(region, value) for value in (1, 2, 3)])
        assert [int(one.sum(dtype="u8")) for one in made] == [value * 20 * 4096 for value in (1, 2, 3)]
        assert region.stats().programs <= 3
        inbox, outbox = context.Queue(), context.Queue()
        process = context.Process(target=_echo, args=(inbox, outbox))
        process.start()
        inbox.put(array[7])
        got = outbox.get(timeout=20)
        inbox.put(None)
        process.join(20)
    assert np.shares_memory(got, array)
    assert array[7, 0] == 99
    wait_until(lambda: region.stats().programs == 1, "the processes are gone")
    assert [int(one[3, 3]) for one in made] == [1, 2, 3], "what a worker made outlives it"
    del made, got, halves
    gc.collect()
    wait_until(lambda: region.stats().allocated == 100, "only the first array is left")

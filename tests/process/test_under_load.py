"""Correctness under load: not one lost update, every byte as the model has it, and the memory limit held while it
runs.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from regions import Inside, inside, start_python
from store_servers import RedisServer

import dmh

OpenRegion = Callable[..., dmh.Region]

COUNTING = """
    import sys, threading
    import numpy as np
    import dmh

    name = sys.argv[1]
    offset, pages, process, threads, workers, rounds = map(int, sys.argv[2:])
    region = dmh.attach(name)
    counters = region.ndarray((pages, region.page_size // 8), "i8", offset)
    problems = []

    def work(worker):
        # Its own counters in every page, so that pages are shared and counters are not; the shadow is in private
        # memory.
        mine = counters[:, worker::workers]
        shadow = np.zeros(mine.shape, "i8")
        rng = np.random.default_rng((7, worker))
        for turn in range(rounds):
            for page in rng.permutation(pages).tolist():
                cell = mine[page]
                for _ in range(1 + page % 5):
                    np.add(cell, turn + 1, out=cell)  # load, add, store, at C speed
                shadow[page] += (1 + page % 5) * (turn + 1)
            some = rng.choice(pages, min(pages, 50), replace=False)
            mine[some, 3] += 7  # long between load and store: evictions in between
            shadow[some, 3] += 7
            wrong = np.flatnonzero((mine[some] != shadow[some]).any(axis=1))
            if len(wrong):
                problems.append(f"worker {worker}, turn {turn}: pages {some[wrong].tolist()} have lost updates")
                return
        wrong = np.flatnonzero((mine != shadow).any(axis=1))
        if len(wrong):
            problems.append(f"worker {worker} at the end: pages {wrong.tolist()} have lost updates")

    print("ready", flush=True)
    sys.stdin.readline()
    crew = [threading.Thread(target=work, args=(process * threads + i,)) for i in range(threads)]
    for thread in crew: thread.start()
    for thread in crew: thread.join()
    region.close()
    print(*problems, sep="\\n", flush=True)
    sys.exit(bool(problems))
    """


@contextmanager
def limit_watched(look: Inside) -> Iterator[list[int]]:
    """While the block runs, hold the kernel's figures against the limit; yields the list that gets the number of
    samples.
    """
    bounds = int(look.table.raw.resident_max) * look.table.page_size, look.table.slots * look.table.page_size
    worst, samples, done = [0, 0], [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.0005):
            worst[:] = map(max, worst, look.allocated())
            samples[0] += 1

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield samples
    finally:
        done.set()
        sampler.join()
    assert worst[0] <= bounds[0], f"the region held {worst[0]} bytes of {bounds[0]}"
    assert worst[1] <= bounds[1], f"the victim buffer held {worst[1]} bytes of {bounds[1]}"


class TestLostUpdates:
    def count(self, region: dmh.Region, pages: int, *, processes: int, threads: int, rounds: int) -> dmh.Snapshot:
        """Several processes and threads count in shared pages; each holds its counters against its shadow."""
        array = region.zeros((pages, region.page_size), "u1")
        arguments = region.offset_of(array), pages
        crew: list[subprocess.Popen[str]] = []
        try:
            with inside(region) as look, limit_watched(look) as samples:
                for process in range(processes):
                    crew.append(
                        start_python(COUNTING, region.name, *arguments, process, threads, processes * threads, rounds)
                    )
                for member in crew:
                    assert member.stdout is not None
                    assert member.stdout.readline() == "ready\n"
                outputs = [""] * processes

                def finish(i: int) -> None:
                    outputs[i], _ = crew[i].communicate("go\n")

                waiting = [threading.Thread(target=finish, args=(i,)) for i in range(processes)]
                for thread in waiting:
                    thread.start()
                for thread in waiting:
                    thread.join()
                assert [member.returncode for member in crew] == [0] * processes, "\n".join(outputs)
            with inside(region) as look:
                look.validate()
            # Read by yet another process, this one: what they wrote, evicted or not, is there.
            rows = array.view("i8")
            workers = processes * threads
            for worker in range(workers):
                times = rows[:, worker::workers][:, 5]
                assert (times == (1 + np.arange(pages) % 5) * (rounds * (rounds + 1) // 2)).all()
            assert samples[0] > 100
        finally:
            for member in crew:
                if member.poll() is None:
                    member.kill()
                    member.wait()
        stats = region.stats()
        assert stats.counters["poisoned"] == stats.counters["intruded"] == stats.counters["refused"] == 0
        return stats

    @pytest.mark.parametrize(("policy", "store"), [("fifo", "file"), ("idle-walk", "memory")])
    def test_tens_of_thousands_of_evictions(
        self, open_region: OpenRegion, tmp_path: Path, policy: str, store: str
    ) -> None:
        region = open_region(
            "region.size=5MiB", "memory.limit=256KiB", "evictor.buffer=16 pages", f"evictor.policy={policy}", "workers.resolvers=3",
            f"store.url={'memory:' if store == 'memory' else f'file://{tmp_path}/pages'}",
        )  # fmt: skip
        stats = self.count(region, 1280, processes=2, threads=2, rounds=5)
        assert stats.counters["evicted"] > 20_000

    @pytest.mark.parametrize("policy", ["fifo", "idle-walk"])
    def test_over_redis(self, open_region: OpenRegion, redis_server: RedisServer, policy: str) -> None:
        region = open_region(
            "region.size=1280KiB", "memory.limit=64KiB", "evictor.buffer=4 pages", f"evictor.policy={policy}", "workers.resolvers=2",
            f"store.url={redis_server.unix_url}",
        )  # fmt: skip
        stats = self.count(region, 320, processes=2, threads=1, rounds=4)
        assert stats.counters["evicted"] > 2_000

    @pytest.mark.parametrize(("page_size", "pages", "rounds"), [(65536, 160, 6), (2 << 20, 32, 2)])
    def test_larger_pages(self, open_region: OpenRegion, page_size: int, pages: int, rounds: int) -> None:
        region = open_region(
            f"region.page_size={page_size}", f"region.size={pages * page_size}", f"memory.limit={8 * page_size}", "evictor.buffer=2 pages",
        )  # fmt: skip
        stats = self.count(region, pages, processes=2, threads=2, rounds=rounds)
        assert stats.counters["evicted"] > 2 * pages


class TestSmallLimits:
    @pytest.mark.parametrize("policy", ["fifo", "idle-walk"])
    @pytest.mark.parametrize("buffer", ["1 pages", "6 pages"])
    def test_eight_pages_do_not_deadlock(
        self, open_region: OpenRegion, rng: np.random.Generator, policy: str, buffer: str
    ) -> None:
        region = open_region(
            "memory.limit=32KiB",
            f"evictor.buffer={buffer}",
            f"evictor.policy={policy}",
            "workers.resolvers=4",
            "region.size=2MiB",
        )
        data = rng.integers(0, 256, 100 * 4096, np.uint8)
        first, second = region.empty(data.shape, "u1"), region.empty(data.shape, "u1")
        with inside(region) as look, limit_watched(look):
            first[:] = data
            second[1:] = first[:-1]  # one copy touches four pages at a time
            np.add(first, second, out=second)
            threads = [threading.Thread(target=lambda i=i: first[i::8].sort()) for i in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            expected = np.empty_like(data)
            for i in range(8):
                expected[i::8] = np.sort(data[i::8])
            assert np.array_equal(first, expected)
            assert np.array_equal(second[1:], (data[1:] + data[:-1]))
            look.validate()


class TestEveryType:
    TYPES = (
        "?", "i1", "u2", "<i4", ">i4", "i8", "u8", "f2", "f4", "f8", np.longdouble, "c8", "c16", "S7", "U5", "V12", "M8[ns]", "m8[D]",
        [("a", "i4"), ("b", "f8", (3,)), ("c", "S3")],
    )  # fmt: skip

    def test_values_survive_eviction(self, open_region: OpenRegion, rng: np.random.Generator) -> None:
        region = open_region("region.size=16MiB", "memory.limit=64KiB")
        pairs: list[tuple[np.ndarray, np.ndarray]] = []
        for kind in map(np.dtype, self.TYPES):
            values = np.frombuffer(rng.integers(0, 64, 1501 * kind.itemsize, np.uint8).tobytes(), kind)
            if kind.kind == "b":
                values = rng.integers(0, 2, 1501).astype("?")
            array = region.empty(1501, kind)
            assert array.dtype == kind
            assert array.flags.writeable
            array[:] = values
            pairs.append((array, values))
        assert region.stats().counters["evicted"] > 0
        region.evict()
        for array, values in pairs:
            assert array.tobytes() == values.tobytes(), array.dtype

    def test_shapes_and_views_survive_eviction(self, open_region: OpenRegion) -> None:
        region = open_region("region.size=16MiB", "memory.limit=64KiB")
        cube = region.zeros((40, 50, 60), "f4")
        expected = np.arange(40 * 50 * 60, dtype="f4").reshape(40, 50, 60)
        cube.transpose(2, 0, 1)[:] = expected.transpose(2, 0, 1)
        region.evict(cube)
        assert np.array_equal(cube[::3, ::-1, 7:50:4], expected[::3, ::-1, 7:50:4])
        assert np.array_equal(cube.T, expected.T)
        assert float(cube.sum(dtype="f8")) == float(expected.sum(dtype="f8"))


def against_a_model(region: dmh.Region, look: Inside, pages: int) -> type[RuleBasedStateMachine]:
    """A state machine over arrays of `region`; the model is a bytearray."""
    size = pages * region.page_size
    places = st.integers(0, size - 1)
    lengths = st.sampled_from(
        [1, 7, region.page_size - 1, region.page_size, region.page_size + 1, 3 * region.page_size, size]
    )
    spans = st.builds(lambda start, length: slice(start, min(start + length, size)), places, lengths)

    class AgainstAModel(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.array = region.empty(size, "u1")
            self.model = np.zeros(size, np.uint8)
            self.pinned: list[tuple[slice, Any]] = []

        @rule(span=spans, seed=st.integers(0, 1000))
        def write(self, span: slice, seed: int) -> None:
            data = np.random.default_rng(seed).integers(0, 256, span.stop - span.start, np.uint8)
            self.array[span] = data
            self.model[span] = data

        @rule(span=spans, value=st.sampled_from([0, 0, 255]))
        def fill(self, span: slice, value: int) -> None:
            self.array[span] = value
            self.model[span] = value

        @rule(span=spans)
        def add(self, span: slice) -> None:
            self.array[span] += 1
            self.model[span] += 1

        @rule(span=spans)
        def read(self, span: slice) -> None:
            assert np.array_equal(self.array[span], self.model[span])

        @rule(span=spans)
        def discard(self, span: slice) -> None:
            region.discard(self.array[span])
            self.model[span] = 0

        @rule(span=spans)
        def flush(self, span: slice) -> None:
            region.flush(self.array[span])

        @rule(span=spans)
        def evict(self, span: slice) -> None:
            region.evict(self.array[span])

        @rule(span=spans)
        def prefetch(self, span: slice) -> None:
            region.prefetch(self.array[span])

        @precondition(lambda self: not self.pinned)
        @rule(place=places)
        def pin(self, place: int) -> None:
            span = slice(place, min(place + region.page_size, size))
            context = region.pin(self.array[span])
            context.__enter__()
            self.pinned.append((span, context))

        @precondition(lambda self: self.pinned)
        @rule()
        def unpin(self) -> None:
            self.pinned.pop()[1].__exit__(None, None, None)

        @rule(count=st.integers(1, 3))
        def another_array(self, count: int) -> None:
            other = region.empty(count * region.page_size, "u1")
            assert not other.any(), "a new array held what an old one had"
            other[:] = 77

        @invariant()
        def within_bounds(self) -> None:
            look.table.validate()

        def teardown(self) -> None:
            while self.pinned:
                self.unpin()
            assert np.array_equal(self.array, self.model)
            look.validate()
            del self.array  # Hypothesis keeps the machine

    return AgainstAModel


@pytest.mark.parametrize(
    ("policy", "page_size", "store"), [("fifo", 4096, "file"), ("idle-walk", 4096, "memory"), ("fifo", 65536, "memory")]
)
def test_any_use_agrees_with_a_model(
    open_region: OpenRegion, tmp_path: Path, policy: str, page_size: int, store: str
) -> None:
    region = open_region(
        f"region.page_size={page_size}", f"region.size={128 * page_size}", f"memory.limit={12 * page_size}", "evictor.buffer=3 pages",
        f"evictor.policy={policy}", f"store.url={'memory:' if store == 'memory' else f'file://{tmp_path}/pages'}",
    )  # fmt: skip
    with inside(region) as look:
        run_state_machine_as_test(
            against_a_model(region, look, 24),
            settings=settings(
                max_examples=25,
                stateful_step_count=30,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )

"""`Region` as a program uses it: arrays and their end, hints, sharing, and what it refuses."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable

import numpy as np
import pytest
from regions import inside, page_of, wait_until

import dmh
from dmh.errors import RegionError, ServiceError
from dmh.lspt.states import State

OpenRegion = Callable[..., dmh.Region]


def ending_of_a_child_that_touches(array: np.ndarray, first: Callable[[], None] = lambda: None) -> int:
    """The signal that ends a forked child which reads the array after `first`; 0 or less where it ends otherwise."""
    child = os.fork()
    if not child:
        try:
            first()
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            _ = array[0]
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


class TestArrays:
    def test_a_new_array_is_zeros_and_writable(self, open_region: OpenRegion) -> None:
        region = open_region()
        array = region.zeros((30, 40, 50), "f4")
        assert array.shape == (30, 40, 50)
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        assert not array.any()
        array += 1
        assert float(array.sum()) == 60_000

    def test_the_pages_of_an_array_that_is_gone_are_given_back_everywhere(self, open_region: OpenRegion) -> None:
        region = open_region("prefetch.enabled=false")
        array = region.empty(region.page_size * 100, "u1")
        array[:] = 7
        region.evict()
        assert region.stats().store["pages"] == 100
        view = array[5000:6000]
        del array
        gc.collect()
        assert region.stats().allocated == 100, "a view keeps the whole array"
        del view
        gc.collect()
        wait_until(lambda: region.stats().allocated == 0, "the pages are given back")
        stats = region.stats()
        assert stats.store["pages"] == 0
        assert stats.states["new"] == stats.pages
        assert not region.empty(region.page_size * 100, "u1").any()

    def test_freed_room_is_found_by_the_next_array_at_once(self, open_region: OpenRegion) -> None:
        region = open_region()
        for turn in range(8):
            array = region.empty(region.size, "u1")
            assert not array[:: region.page_size].any()
            array[:: region.page_size] = turn + 1
            del array

    def test_arrays_may_end_in_any_thread(self, open_region: OpenRegion) -> None:
        region = open_region()

        def work() -> None:
            for _ in range(30):
                array = region.empty(region.page_size * 3, "u1")
                assert not array.any()
                array[:] = 9

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gc.collect()
        wait_until(lambda: region.stats().allocated == 0, "everything is given back")

    def test_an_array_at_a_place_shares_its_bytes(self, open_region: OpenRegion) -> None:
        region = open_region()
        array = region.zeros(5000, "i8")
        same = region.ndarray(5000, "i8", region.offset_of(array))
        same[4999] = 42
        assert array[4999] == 42
        assert region.buf[region.offset_of(array) + 4999 * 8] == 42

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (lambda r: r.empty(10, "O"), "Python objects"),
            (lambda r: r.empty(-1), "negative"),
            (lambda r: r.empty(r.size + 1, "u1"), "no room"),
            (lambda r: r.ndarray(2, "u1", r.size - 1), "not all within"),
            (lambda r: r.offset_of(np.zeros(3)), "does not lie in the region"),
            (lambda r: r.discard(r.empty((100, 100))[:, ::2]), "contiguous"),
        ],
    )
    def test_what_cannot_be_is_refused(
        self, open_region: OpenRegion, call: Callable[[dmh.Region], object], words: str
    ) -> None:
        with pytest.raises(RegionError, match=words):
            call(open_region())


class TestHints:
    def test_discard_zeroes_exactly_the_array(self, open_region: OpenRegion) -> None:
        region = open_region()
        array = region.empty(20 * 4096, "u1")
        array[:] = 5
        region.discard(array[1000 : 10 * 4096 + 17])
        assert (array[:1000] == 5).all()
        assert not array[1000 : 10 * 4096 + 17].any()
        assert (array[10 * 4096 + 17 :] == 5).all()
        assert region.stats().counters["discarded"] > 0

    def test_flush_gives_the_store_every_page_and_keeps_them_resident(self, open_region: OpenRegion) -> None:
        region = open_region("prefetch.enabled=false")
        array = region.empty(20 * 4096, "u1")
        array[:] = 5
        region.flush(array)
        stats = region.stats()
        assert stats.store["pages"] == 20
        assert stats.resident == 20
        before = stats.counters["written"]
        region.flush(array)
        assert region.stats().counters["written"] == before, "clean pages are not written again"
        assert (array == 5).all()

    def test_evict_and_prefetch(self, open_region: OpenRegion) -> None:
        region = open_region("prefetch.enabled=false")
        array = region.empty(10 * 4096, "u1")
        array[:] = 3
        region.evict(array)
        assert region.stats().resident == 0
        region.prefetch(array)
        wait_until(lambda: region.stats().resident == 10, "the pages have come")
        before = region.stats().counters["hard"]
        assert (array == 3).all()
        assert region.stats().counters["hard"] == before

    def test_a_pinned_array_stays(self, open_region: OpenRegion) -> None:
        region = open_region("evictor.policy=fifo")  # others may keep it from a scan, whose pages leave first
        array = region.empty(10 * 4096, "u1")
        other = region.empty(region.size // 2, "u1")
        with inside(region) as look:
            first = page_of(region, array)
            with region.pin(array):
                array[:] = 1
                other[:] = 2
                region.evict(array)
                assert look.states(first, 10) == [State.RESIDENT] * 10
                assert region.stats().pinned == 10
            other[:] = 3
            wait_until(lambda: State.RESIDENT not in look.states(first, 10), "unpinned, it goes like any other")
        assert (array == 1).all()

    def test_too_much_cannot_be_pinned(self, open_region: OpenRegion) -> None:
        region = open_region()
        with (
            pytest.raises(RegionError, match="too little of memory.limit"),
            region.pin(region.empty(region.size // 2, "u1")),
        ):
            pass


class TestTheEnd:
    def test_closing_twice_is_harmless_and_use_afterwards_is_told(self, open_region: OpenRegion) -> None:
        region = open_region()
        region.close()
        region.close()
        for use in (lambda: region.empty(1), lambda: region.buf, region.stats, region.flush):
            with pytest.raises(RegionError, match="closed"):
                use()

    def test_a_stale_array_is_an_address_error_and_never_zeros(self, open_region: OpenRegion) -> None:
        region = open_region()
        array = region.zeros(1000)
        region.close()
        assert ending_of_a_child_that_touches(array) == signal.SIGSEGV

    def test_a_forked_child_has_no_mapping_and_is_told_so(self, open_region: OpenRegion) -> None:
        region = open_region("region.fork=none")
        array = region.zeros(1000)
        array[:] = 1

        def refused() -> None:
            with pytest.raises(RegionError):
                region.empty(1)

        assert ending_of_a_child_that_touches(array, refused) == signal.SIGSEGV
        assert (array == 1).all()

    def test_there_is_no_service_of_that_name(self) -> None:
        with pytest.raises(ServiceError, match="no service answers"):
            dmh.attach("nobody-has-this-name")

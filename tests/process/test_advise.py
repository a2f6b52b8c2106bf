"""`region.advise`: what a program says of its use decides how far a fault reads ahead."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from regions import inside, page_of, pattern, wait_until

import dmh
from dmh.errors import RegionError
from dmh.lspt.states import State

OpenRegion = Callable[..., dmh.Region]
PAGES = 200


@pytest.fixture
def stored(open_region: OpenRegion) -> tuple[dmh.Region, np.ndarray]:
    """An array whose pages are all in the store, and room for all of them."""
    region = open_region("memory.limit=4MiB", "prefetch.window=32 pages", "workers.resolvers=1")
    array = region.empty((PAGES, 4096), "u1")
    region.advise(array, "random")  # so that no window is on its way when the pages are evicted
    array[:, 0] = np.arange(PAGES) % 251 + 1
    region.evict(array)
    region.advise(array, "normal")
    return region, array


def test_random_reads_nothing_ahead(stored: tuple[dmh.Region, np.ndarray]) -> None:
    region, array = stored
    region.advise(array, "random")
    before = region.stats().counters["prefetched"]
    for page in range(60):
        assert array[page, 0] == page + 1
    assert region.stats().counters["prefetched"] == before
    region.advise(array, "normal")
    for page in range(60, 120):
        assert array[page, 0] == page + 1
    assert region.stats().counters["prefetched"] > before


def test_sequential_reads_ahead_at_the_first_fault_as_far_as_the_advice_goes(
    stored: tuple[dmh.Region, np.ndarray],
) -> None:
    region, array = stored
    region.advise(array[:100], "sequential")
    with inside(region) as look:
        first = page_of(region, array)
        assert array[50, 0] == 51
        # A marker page between the windows is left out.
        wait_until(lambda: look.states(first + 50, 33).count(State.RESIDENT) >= 30, "two windows are there")
        assert look.states(first, 50) == [State.STORED] * 50
        assert look.states(first + 83, 17) == [State.STORED] * 17
        assert array[94, 0] == 95
        wait_until(lambda: look.states(first + 95, 5).count(State.RESIDENT) >= 4, "the rest is there")
        assert look.states(first + 100, 100) == [State.STORED] * 100


def test_willneed_and_dontneed_move_pages_and_keep_their_content(stored: tuple[dmh.Region, np.ndarray]) -> None:
    region, array = stored
    with inside(region) as look:
        first = page_of(region, array)
        array[10:20] = [pattern(page, 4096) for page in range(10, 20)]
        region.advise(array[10:20], "dontneed")
        wait_until(lambda: look.states(first + 10, 10) == [State.STORED] * 10, "they are out")
        region.advise(array[10:20], "willneed")
        wait_until(lambda: look.states(first + 10, 10) == [State.RESIDENT] * 10, "they are in")
        for page in range(10, 20):
            assert np.array_equal(array[page], pattern(page, 4096))


def test_advice_goes_with_the_array(stored: tuple[dmh.Region, np.ndarray]) -> None:
    region, _ = stored
    with inside(region) as look:
        other = region.empty((20, 4096), "u1")
        first = page_of(region, other)
        region.advise(other, "random")
        assert set(look.table.advice[first : first + 20]) == {2}
        del other
        wait_until(lambda: not look.table.advice[first : first + 20].any(), "the advice is gone")


def test_other_advice_is_refused(stored: tuple[dmh.Region, np.ndarray]) -> None:
    region, array = stored
    with pytest.raises(RegionError, match="'sequential', 'random'"):
        region.advise(array, "backward")
    with pytest.raises(RegionError, match="not lie in the region"):
        region.advise(np.zeros(5), "random")

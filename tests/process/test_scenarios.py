"""The reference's own scenarios, against a live userfaultfd: which pages LPET takes, and that they come back byte for byte.

Thresholds count local pages (resident and staged).  Read-ahead is off and one resolver works, so that every page that
comes in is one that was touched.  Where memory.limit less the buffer equals the high threshold, the fault that finds
it reached waits until LPET is down to the low one, as in the reference.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from regions import Inside, inside, page_of, pattern, wait_until

import dmh
from dmh.lspt.states import State

OpenRegion = Callable[..., dmh.Region]
SIMPLE = ("prefetch.enabled=false", "workers.resolvers=1", "region.size=1MiB")
EVICTED = {State.STORED}


def fill(array: np.ndarray, pages: range) -> None:
    for page in pages:
        array[page] = pattern(page, 4096)


def touch(array: np.ndarray, pages: range) -> None:
    """Use pages one after another without a system call between a fault and the next."""
    for page in pages:
        assert array[page, 17] == pattern(page, 4096)[17], f"page {page} came back changed"


def settled(region: dmh.Region) -> dmh.Snapshot:
    """The figures after LPET has gone through a whole turn: the evictor answers between two turns."""
    region.stats()
    return region.stats()


@pytest.fixture(params=["fifo", "idle-walk"])
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_one_touched_page_is_asked_for_and_zero_filled(open_region: OpenRegion) -> None:
    region = open_region(*SIMPLE)
    array = region.empty((8, 4096), "u1")
    with inside(region) as look:
        first = page_of(region, array)
        assert look.present() == set()
        assert not array[3].any()
        assert look.present() == {first + 3}
        # The kernel lets the thread go on when the page is filled; the table says so a moment later.
        wait_until(lambda: look.table.state(first + 3) is State.RESIDENT, "the page is resident")
        assert look.states(first, 8) == [State.NEW] * 3 + [State.RESIDENT] + [State.NEW] * 4
    stats = region.stats()
    assert (stats.counters["faults"], stats.counters["zero"], stats.counters["prefetched"]) == (1, 1, 0)
    assert stats.counters["hard"] == stats.counters["soft"] == 0
    assert stats.resident == 1


def test_four_and_two_of_five_pages_the_first_two_go_out(open_region: OpenRegion, policy: str) -> None:
    region = open_region(
        *SIMPLE,
        "memory.limit=32KiB",
        "evictor.buffer=4 pages",
        "memory.high=4 pages",
        "memory.low=2 pages",
        f"evictor.policy={policy}",
    )
    array = region.empty((5, 4096), "u1")
    fill(array, range(5))
    with inside(region) as look:
        first = page_of(region, array)
        stats = settled(region)
        assert look.states(first, 2) == [State.STORED] * 2
        assert all(state in (State.RESIDENT, State.STAGED) for state in look.states(first + 2, 3))
        assert stats.resident + stats.staged == 3
        assert stats.store["pages"] == 2
        look.table.validate()
    for page in range(5):
        assert np.array_equal(array[page], pattern(page, 4096)), f"page {page} came back changed"
    assert region.stats().counters["hard"] >= 2


def test_twenty_and_ten_of_two_areas_and_a_page_the_first_area_goes_out(open_region: OpenRegion, policy: str) -> None:
    region = open_region(
        *SIMPLE,
        "memory.limit=160KiB",
        "evictor.buffer=20 pages",
        "memory.high=20 pages",
        "memory.low=10 pages",
        f"evictor.policy={policy}",
    )
    array = region.empty((21, 4096), "u1")
    fill(array, range(10))
    fill(array, range(10, 20))
    fill(array, range(20, 21))
    with inside(region) as look:
        first = page_of(region, array)
        stats = settled(region)
        assert look.states(first, 10) == [State.STORED] * 10
        assert all(state in (State.RESIDENT, State.STAGED) for state in look.states(first + 10, 11))
        assert stats.resident + stats.staged == 11
    for page in range(21):
        assert np.array_equal(array[page], pattern(page, 4096)), f"page {page} came back changed"


def test_twenty_and_fifteen_of_five_areas_the_used_ones_stay(open_region: OpenRegion) -> None:
    """The cyclic idle walk: areas 2 and 3 are used again before area 1 is touched, and LPET takes area 4."""
    region = open_region(
        *SIMPLE,
        "memory.limit=160KiB",
        "evictor.buffer=20 pages",
        "memory.high=20 pages",
        "memory.low=15 pages",
        "evictor.policy=idle-walk",
        "evictor.idle=buffer",
    )
    array = region.empty((25, 4096), "u1")
    one, two, three, four, five = (range(n, n + 5) for n in range(0, 25, 5))
    first = page_of(region, array)
    for area in (one, two, three, four):
        fill(array, area)
    with inside(region) as look:
        fill(array, five)
        wait_until(lambda: out(look, first) >= set(one), "area 1 has gone out")
        assert out(look, first) == set(one)
        settled(region)  # a use is one only after the mark, and LPET marks when it has evicted
        touch(array, two)
        touch(array, three)
        assert out(look, first) == set(one), "using pages that are local has evicted some"
        touch(array, one)
        wait_until(lambda: out(look, first) >= set(four), "area 4 has gone out", 5)
        settled(region)
        gone = out(look, first)
        assert not gone & {*two, *three}, f"pages {sorted(gone)} went out, though areas 2 and 3 had been used"
        assert gone >= set(four)
    for page in range(25):
        assert np.array_equal(array[page], pattern(page, 4096)), f"page {page} came back changed"


def out(look: Inside, first: int) -> set[int]:
    """Pages of the array that are not local."""
    return {page for page, state in enumerate(look.states(first, 25)) if state in EVICTED}

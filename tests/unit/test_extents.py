"""The allocator of page runs against a set of free pages."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dmh.errors import RegionError
from dmh.region.extents import Extents

PAGES = 40


class AgainstASet(RuleBasedStateMachine):
    """Model: the set of free pages, and the blocks that were handed out."""

    def __init__(self) -> None:
        super().__init__()
        self.extents = Extents(PAGES)
        self.free = set(range(PAGES))
        self.blocks: list[tuple[int, int]] = []

    def longest(self) -> int:
        best = run = 0
        for page in range(PAGES):
            run = run + 1 if page in self.free else 0
            best = max(best, run)
        return best

    @rule(count=st.integers(1, PAGES + 2))
    def allocate(self, count: int) -> None:
        if count > self.longest():
            with pytest.raises(RegionError, match="no room for"):
                self.extents.allocate(count)
            return
        first = self.extents.allocate(count)
        pages = set(range(first, first + count))
        assert pages <= self.free
        assert all(not set(range(lower, lower + count)) <= self.free for lower in range(first)), "not the first fit"
        self.free -= pages
        self.blocks.append((first, count))

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        first, count = self.blocks.pop(data.draw(st.integers(0, len(self.blocks) - 1)))
        self.extents.release(first, count)
        self.free |= set(range(first, first + count))

    @rule(first=st.integers(0, PAGES - 1), count=st.integers(1, PAGES))
    def take(self, first: int, count: int) -> None:
        if first + count > PAGES:
            with pytest.raises(RegionError, match="not all within"):
                self.extents.take(first, count)
            return
        self.extents.take(first, count)
        self.free -= set(range(first, first + count))

    @rule(first=st.integers(0, PAGES), count=st.integers(0, PAGES + 5))
    def give_back_what_is_not_out(self, first: int, count: int) -> None:
        if count < 1 or first + count > PAGES or self.free & set(range(first, first + count)):
            with pytest.raises(RegionError, match="not handed out"):
                self.extents.release(first, count)

    @invariant()
    def agrees(self) -> None:
        self.extents.validate()
        assert self.extents.free_pages == len(self.free)
        assert self.extents.largest == self.longest()


TestAgainstASet = AgainstASet.TestCase


@pytest.mark.parametrize("count", [0, -1])
def test_nothing_is_not_an_allocation(count: int) -> None:
    with pytest.raises(RegionError):
        Extents(8).allocate(count)


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (7, 2), (8, 1), (0, 0), (3, -1)])
def test_taking_pages_outside_is_refused(first: int, count: int) -> None:
    extents = Extents(8)
    with pytest.raises(RegionError, match="not all within"):
        extents.take(first, count)
    assert extents.free_pages == 8


def test_neighbours_are_merged() -> None:
    extents = Extents(6)
    blocks = [extents.allocate(2) for _ in range(3)]
    for first in (blocks[0], blocks[2], blocks[1]):
        extents.release(first, 2)
    assert extents.allocate(6) == 0


def test_the_message_says_what_is_free() -> None:
    extents = Extents(10)
    extents.allocate(4)
    with pytest.raises(RegionError, match="the largest free run has 6, 6 of 10"):
        extents.allocate(7)

"""What an eviction policy is: the order of victims, decided without I/O.

A policy is told what happens to pages (`learn`: a batch of events, in order), says which pages' use it wants to know
(`look`), and is asked for the next batch (`choose`), which names pages to *mark* and pages to *evict*.  What the words
mean is LPET's business and the idle source's.  A policy never looks at memory, time or the table, so the same code
runs in the evictor, in `dmh simulate` and in a test.

One step of LPET is:

    learn(events)                                   what arrived since last time
    pages = look(n); learn(pages, USED or IDLE)     what the idle source says of marked pages
    choice = choose(evict, mark)                    then mark choice.mark, evict choice.evict
    learn(pages that stayed, KEPT)                  where marking or evicting failed

and nothing can be evicted where both `look` and `choose` come back empty.  Arrays of page numbers are numpy's uint64.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from enum import IntEnum
from typing import ClassVar

import numpy as np
import numpy.typing as npt

Pages = npt.NDArray[np.uint64]
Kinds = npt.NDArray[np.uint8]


class Event(IntEnum):
    """What a policy is told of a page; the numbers are those of DMH_EV_... in the native module."""

    FAULT = 0
    """It came in because it was touched: new, or fetched from the DMS."""
    SOFT = 1
    """It came back from the victim buffer because it was touched."""
    PREFETCH = 2
    """It came in ahead of use."""
    GONE = 3
    """It is not local any more, or not the policy's to choose (discarded, pinned, evicted by request)."""
    KEPT = 4
    """It is local although it was chosen or marked, or was found in the table (unpinned, a ring overflowed)."""
    USED = 5
    """The answer to `look`: it was used since it was marked."""
    IDLE = 6
    """The answer to `look`: it was not."""
    EXPECTED = 9
    """It is local, and read-ahead says that it is about to be used."""


def no_pages() -> Pages:
    """An empty array of page numbers."""
    return np.empty(0, np.uint64)


@dataclass(slots=True)
class Choice:
    """What LPET is to do next: mark these pages (in order), then evict those."""

    mark: Pages = field(default_factory=no_pages)
    evict: Pages = field(default_factory=no_pages)


class Policy(abc.ABC):
    """An eviction order.  Every local page is known to it exactly once.

    Args of every policy:
        pages: how many pages the region has; page numbers are below it.
        limit: how many local pages to reckon with, a policy's M; fractions are of this.
        accessed: uses are told by marks that cost next to nothing (`page_idle`, `unmap`).  Without, a mark moves a page
            to the victim buffer, and only a policy that says so marks.
        seed: for policies that draw at random.
    """

    profits_from_marks: ClassVar[bool] = True
    """It does better by what marks tell, by more than they cost.  Where not, `evictor.idle: auto` makes none."""

    def __init__(self, pages: int, limit: int, *, accessed: bool = False, seed: int = 0) -> None:
        self.pages = pages
        self.limit = limit
        self.accessed = accessed
        self.seed = seed

    @abc.abstractmethod
    def learn(self, pages: Pages, kinds: Kinds) -> None:
        """What happened, in order: one `Event` a page; what is said of pages outside the region is ignored."""

    @abc.abstractmethod
    def look(self, most: int) -> Pages:
        """Marked pages whose use `choose` wants to know of, the most urgent first.

        Whoever asks answers with USED or IDLE before the next `choose`.
        """

    @abc.abstractmethod
    def choose(self, evict: int, mark: int) -> Choice:
        """The next step towards `evict` pages fewer: at most `mark` pages to mark, at most `evict` to evict.

        The policy holds pages to be evicted as gone, and pages to be marked as marked.
        """

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many pages it knows."""

    @abc.abstractmethod
    def knows(self, pages: Pages) -> npt.NDArray[np.bool_]:
        """For each page: is it one of those?"""

    @abc.abstractmethod
    def validate(self) -> None:
        """Check every invariant; AssertionError says which does not hold.  For tests: looks at every page."""

    def tell(self, event: Event, pages: Pages) -> None:
        """`learn`, where one thing happened to all of them."""
        self.learn(pages, np.full(len(pages), event, np.uint8))

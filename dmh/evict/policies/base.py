"""What an eviction policy is: the order of victims, decided without I/O.

A policy is told what comes and goes (`arrived`, `returned`, `gone`) and asked for the next batch (`choose`).  It
answers with pages to *mark* and pages to *evict*; what the words mean is LPET's business.  It never looks at memory,
time or the table, so the same code runs in the evictor, in a simulation and in a test.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

IsIdle = Callable[[int], bool]
"""Was this marked page left alone since it was marked?  Answered by the idle source."""


@dataclass(slots=True)
class Choice:
    """What LPET is to do next: mark these pages (in order), then evict those."""

    mark: list[int] = field(default_factory=list)
    evict: list[int] = field(default_factory=list)


class Policy(abc.ABC):
    """An eviction order.  Every local page is known to it exactly once."""

    @abc.abstractmethod
    def arrived(self, pages: Sequence[int], prefetched: Sequence[bool]) -> None:
        """Pages became resident, in this order; prefetched ones have not been asked for yet."""

    @abc.abstractmethod
    def returned(self, page: int) -> None:
        """A page came back from the victim buffer because it was touched."""

    @abc.abstractmethod
    def gone(self, page: int) -> None:
        """A page is not local any more, or never was; unknown pages are ignored."""

    @abc.abstractmethod
    def choose(self, evict: int, mark: int, is_idle: IsIdle) -> Choice:
        """The next step towards `evict` pages fewer: at most `mark` pages to mark, at most `evict` to evict.

        An empty choice means that nothing can be evicted now.
        """

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many pages it knows."""

    @abc.abstractmethod
    def __contains__(self, page: object) -> bool:
        """Does it know this page?"""

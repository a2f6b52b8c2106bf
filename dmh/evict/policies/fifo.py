"""FIFO: the page that has been local for longest goes first.

    arrive(p):  append p
    choose(n):  the n pages at the front

Knows nothing about use.  It is the baseline that every other policy is measured against, and what CLOCK is without
accessed bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from dmh.evict.policies.base import Choice, IsIdle, Policy


class Fifo(Policy):
    """First in, first out.  A dict is the queue: insertion order, and removal from the middle in O(1)."""

    def __init__(self) -> None:
        self._queue: dict[int, None] = {}

    def arrived(self, pages: Sequence[int], prefetched: Sequence[bool]) -> None:
        for page in pages:
            self._queue.pop(page, None)
            self._queue[page] = None

    def returned(self, page: int) -> None:
        self.arrived([page], [False])

    def gone(self, page: int) -> None:
        self._queue.pop(page, None)

    def choose(self, evict: int, mark: int, is_idle: IsIdle) -> Choice:
        victims = [page for page, _ in zip(self._queue, range(evict), strict=False)]
        for page in victims:
            del self._queue[page]
        return Choice(evict=victims)

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, page: object) -> bool:
        return page in self._queue

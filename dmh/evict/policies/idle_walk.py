"""The reference's LPET: a cyclic walk over the local pages that evicts what is idle and marks what is not.

    hand at p:
        p is marked and was not used since:  evict p
        otherwise:                           mark p, go on
    a page that arrives stands just behind the hand: it is looked at last
    a page that is used after it was marked is not marked any more, and keeps its place

The walk ends when enough pages are evicted.  In the worst case it goes round once marking everything and then evicts
from where it began.  "Used since" is answered by the idle source.
"""

from __future__ import annotations

from collections.abc import Sequence

from dmh.evict.policies.base import Choice, IsIdle, Policy


class IdleWalk(Policy):
    """The walk's circle is a dict: its front is under the hand, and going on means moving the front to the back.

    Value True: marked.  Invariant: ``_marked`` is the number of True values.
    """

    def __init__(self) -> None:
        self._circle: dict[int, bool] = {}
        self._marked = 0

    def arrived(self, pages: Sequence[int], prefetched: Sequence[bool]) -> None:
        for page in pages:
            self.gone(page)
            self._circle[page] = False

    def returned(self, page: int) -> None:
        if page not in self._circle:
            self._circle[page] = False
        elif self._circle[page]:
            self._circle[page] = False
            self._marked -= 1

    def gone(self, page: int) -> None:
        if self._circle.pop(page, False):
            self._marked -= 1

    def choose(self, evict: int, mark: int, is_idle: IsIdle) -> Choice:
        choice = Choice()
        for _ in range(2 * len(self._circle)):
            if not self._circle:
                break
            page = next(iter(self._circle))
            if self._circle[page]:
                if len(choice.evict) == evict or choice.mark:
                    break  # marks of this round must be made before they can be looked at
                self.gone(page)
                if is_idle(page):
                    choice.evict.append(page)
                else:
                    self._circle[page] = False  # used since: at the back, to be marked again when the hand comes round
                continue
            if choice.evict or len(choice.mark) == mark:
                break
            del self._circle[page]
            self._circle[page] = True
            self._marked += 1
            choice.mark.append(page)
        return choice if choice.mark or choice.evict else self._oldest_marked(evict)

    def _oldest_marked(self, evict: int) -> Choice:
        """No more can be marked (the victim buffer is full): the pages marked longest ago have had their chance."""
        choice = Choice()
        for page, marked in self._circle.items():
            if marked:
                choice.evict.append(page)
                if len(choice.evict) == evict:
                    break
        for page in choice.evict:
            self.gone(page)
        return choice

    def __len__(self) -> int:
        return len(self._circle)

    def __contains__(self, page: object) -> bool:
        return page in self._circle

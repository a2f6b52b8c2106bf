"""The reference's LPET: a cyclic walk over the local pages that evicts what is idle and marks what is not.

    hand at p:
        p is marked and was not used since:  evict p
        otherwise:                           mark p, go on
    a page that arrives stands just behind the hand: it is looked at last
    a page that is used after it was marked is not marked any more, and keeps its place

The walk ends when enough pages are evicted.  In the worst case it goes round once marking everything and then evicts
from where it began; where no more can be marked (the victim buffer is full) the pages marked longest ago go.
"""

from dmh.evict.policies.native import NativePolicy


class IdleWalk(NativePolicy):
    """Marks with every idle source."""

    kernel = "idle-walk"

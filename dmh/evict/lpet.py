"""LPET, the low-priority eviction task: from the high threshold down to the low one.

Owns the evictor's sequence: learn what arrived, ask the policy, mark, evict.  Does not own the order of victims (the
policy), nor how a page leaves (`dmh.evict.leave`).  Called by `workers/evictor.py` when the bell has rung.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dmh.evict.leave import Leaver
from dmh.evict.policies.base import Event, Pages, Policy
from dmh.lspt.states import State
from dmh.lspt.table import Table
from dmh.native import ffi, lib

_EVENT = np.dtype([("order", "u8"), ("page", "u8"), ("kind", "u4"), ("thread", "u4")])
_EVENTS = 65536


class Lpet:
    """One region's eviction task."""

    def __init__(self, table: Table, policy: Policy, leaver: Leaver, batch: int, number: int) -> None:
        self._table = table
        self._policy = policy
        self._leaver = leaver
        self._batch = batch
        self._number = number
        self._events = np.empty(_EVENTS, _EVENT)

    def learn(self) -> None:
        """Tell the policy what has arrived since last time, in the order in which it did."""
        raw = self._table.raw
        while n := lib.dmh_drain(raw, ffi.from_buffer("struct dmh_event[]", self._events), _EVENTS):
            events = self._events[:n]
            events = events[np.argsort(events["order"], kind="stable")]
            self._policy.learn(events["page"], events["kind"].astype(np.uint8))
            if n < _EVENTS:
                break
        if raw.events_lost:
            raw.events_lost = 0
            self.resync()

    def resync(self) -> None:
        """Learn from the table: the resident pages that the policy has not heard of, in the order of their numbers."""
        resident = self._table.in_state(State.RESIDENT)
        self._policy.tell(Event.KEPT, resident[~self._policy.knows(resident)])

    def due(self) -> int:
        """How many local pages are too many now; 0 until the high threshold is reached.

        Counted from what the fault that rang had found, its own page not included; from what is local now where a
        fault waits at the hard bound, or where nobody rang and there is still too much.
        """
        raw = self._table.raw
        local, low = self._table.local, int(raw.low)
        if lib.dmh_room_wanted(raw) and self._table.resident >= int(raw.resident_max):
            return max(local - low, 1)
        if raw.rung_at:
            return max(min(int(raw.rung_at), local) - low, 0)
        return local - low if local > int(raw.high) else 0

    def run(self, keep_going: Callable[[], bool]) -> int:
        """One run: evict as many pages as were too many at its start.  Returns how many it could not find."""
        quota = self.due()
        self._table.raw.rung_at = 0
        if not quota:
            return 0
        self._table.count(self._number, "runs")
        while quota > 0 and keep_going():
            self.learn()
            looked = self._look()
            free = self._table.slots - self._table.staged
            choice = self._policy.choose(min(quota, self._batch), min(free, self._batch))
            if len(choice.mark):
                marked = self._leaver.stage(choice.mark)
                self._table.count(self._number, "marked", len(marked))
                self._keep_unmoved(choice.mark)
            if len(choice.evict):
                self._leaver.evict(choice.evict)
                moved = len(choice.evict) - self._keep_unmoved(choice.evict)
                quota -= moved
                if not moved and not len(choice.mark):
                    break  # the victim buffer is full of what the store does not take: others have a turn
            if not looked and not len(choice.mark) and not len(choice.evict):
                # Nothing of the policy's is left to evict; what an earlier write failed on may be.
                self._leaver.write_staged()
                break
        self._table.raw.rung_at = 0  # who rang meanwhile has been served by this run
        return max(quota, 0)

    def evict(self, pages: Pages) -> Pages:
        """Move these pages out now, whatever the policy thinks of them; returns those that the store did not take."""
        self.forget(pages)
        left = self._leaver.evict(pages)
        self._keep_unmoved(pages)
        return left

    def pin(self, first: int, count: int) -> str | None:
        """Keep pages from being chosen until they are unpinned as often; returns what is wrong where that cannot be."""
        raw = self._table.raw
        pins = self._table.pins[first : first + count]
        fresh = int(np.count_nonzero(pins == 0))
        most = int(raw.resident_max) - max(int(raw.resident_max) // 8, 4)
        if int(raw.pinned) + fresh > most:
            return (
                f"pinning {fresh} more pages would leave too little of memory.limit to page with: "
                f"{int(raw.pinned)} are pinned, at most {max(most, 0)} may be"
            )
        if (pins == 255).any():
            return "a page is pinned 255 times already"
        pins += 1
        raw.pinned += fresh
        self.forget(np.arange(first, first + count, dtype=np.uint64))
        return None

    def unpin(self, first: int, count: int) -> None:
        """Undo one `pin`."""
        pins = self._table.pins[first : first + count]
        self._table.raw.pinned -= int(np.count_nonzero(pins == 1))
        pins -= pins > 0
        free = np.flatnonzero(pins == 0).astype(np.uint64) + np.uint64(first)
        words = self._table.words[free]
        self._policy.tell(Event.KEPT, free[(words & np.uint64(15)) == State.RESIDENT])

    def forget(self, pages: Pages) -> None:
        """Pages that LPET is not to choose any more: discarded, or pinned."""
        self.learn()
        self._policy.tell(Event.GONE, pages)

    def _look(self) -> int:
        """Tell the policy whether the marked pages that it asks about were used; returns how many those were."""
        pages = self._policy.look(self._batch)
        # The `buffer` source: a marked page that nobody touched is still in the victim buffer.
        idle = (self._table.words[pages] & np.uint64(15)) == State.STAGED
        self._policy.learn(pages, np.where(idle, Event.IDLE, Event.USED).astype(np.uint8))
        return len(pages)

    def _keep_unmoved(self, pages: Pages) -> int:
        """Pages that stayed resident although they were chosen go back to the policy, but for pinned ones, which
        come back when they are unpinned.  Returns how many stayed.
        """
        resident = pages[(self._table.words[pages] & np.uint64(15)) == State.RESIDENT]
        self._policy.tell(Event.KEPT, resident[self._table.pins[resident] == 0])
        return len(resident)

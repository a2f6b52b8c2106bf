"""LPET, the low-priority eviction task: from the high threshold down to the low one.

Owns the evictor's sequence: learn what arrived, have marked pages looked at, ask the policy, mark, evict; and the two
thresholds where they follow the fault rate.  Does not own the order of victims (the policy), what a mark is (the idle
source), nor how a page leaves (`dmh.evict.leave`).  Called by `workers/evictor.py` when the bell has rung.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from dmh.evict.budget import MarkBudget
from dmh.evict.idle.base import IdleSource
from dmh.evict.policies.base import Event, Pages, Policy
from dmh.evict.reserve import Reserve
from dmh.lspt.states import State
from dmh.lspt.table import Table
from dmh.native import ffi, lib
from dmh.observe.trace import TraceWriter

_EVENT = np.dtype([("order", "u8"), ("page", "u8"), ("ns", "u8"), ("kind", "u4"), ("thread", "u4")])
_EVENTS = 65536
MARKS = 256
"""Most pages marked in one go, where marks move nothing: each go interrupts the program's processors once."""
VICTIMS = 256
"""Victims chosen in one go, although a small victim buffer takes them in several: choosing costs as much for 80 pages
as for three times as many.
"""


def local_in_use(high: int, low: int, *, adaptive: bool) -> int:
    """The local pages that a policy is to reckon with: what there is after LPET's runs as well as before them."""
    return low if adaptive else high


class Clock(Protocol):
    """What tells LPET the time: the module `time`, or a simulation."""

    def monotonic(self) -> float:
        """Seconds, never going back."""

    def thread_time(self) -> float:
        """Seconds of processor time that LPET has taken."""


class Leaving(Protocol):
    """How pages leave: `dmh.evict.leave.Leaver`, or a simulation."""

    @property
    def on_its_way(self) -> int:
        """So many pages are in the victim buffer, and to be gone soon."""

    def evict(self, pages: Pages) -> Pages:
        """Move pages out; returns those that could not leave.  The last of them may still be on their way."""

    def finish(self) -> Pages:
        """Wait for those on their way; returns those that could not leave."""

    def write_staged(self) -> None:
        """Empty the victim buffer, as far as the store takes what is in it."""


class Lpet:
    """One region's eviction task.

    Args:
        table: its pages.
        policy: the order of victims.
        source: what marks are, and what they tell.
        leaver: how pages leave.
        high, low: the configured thresholds, in local pages.
        budget: the processor time that marks may take.
        reserve: the room to keep free; None: the thresholds stay as they are.
        batch: most pages marked or captured in one step; not above the victim buffer.
        number: of the evictor, for its counters.
        recording: of what came in, where one is wanted.
        clock: to tell the time by.
    """

    def __init__(
        self,
        table: Table,
        policy: Policy,
        source: IdleSource,
        leaver: Leaving,
        *,
        high: int,
        low: int,
        budget: MarkBudget,
        reserve: Reserve | None,
        batch: int,
        number: int,
        recording: TraceWriter | None = None,
        clock: Clock = time,
    ) -> None:
        self._table = table
        self._policy = policy
        self._source = source
        self._leaver = leaver
        self._budget = budget
        self._reserve = reserve
        self._high, self._low = high, low
        self._batch = batch
        self._victims = max(batch, VICTIMS) if batch == table.slots else batch
        self._number = number
        self._recording = recording
        self._clock = clock
        self._events = np.empty(_EVENTS, _EVENT)
        self._unwatched = np.zeros(table.pages, np.bool_)
        """Marked, says the policy, but the source could not: taken for idle, as if nothing could be told of use."""
        self._waits = 0
        self._has_run = False
        self._adapt()

    def learn(self) -> None:
        """Tell the policy what has arrived since last time, in the order in which it did."""
        raw = self._table.raw
        while n := lib.dmh_drain(raw, ffi.from_buffer("struct dmh_event[]", self._events), _EVENTS):
            events = self._events[:n]
            events = events[np.argsort(events["order"], kind="stable")]
            came_in = events[events["kind"] != Event.EXPECTED]
            if self._reserve:
                self._reserve.arrived(came_in["ns"])
            if self._recording:
                self._recording.append(came_in["page"], came_in["kind"], came_in["ns"], came_in["thread"])
            kinds = np.where(events["kind"] == lib.DMH_EV_NEW, Event.FAULT, events["kind"])
            self._policy.learn(events["page"], kinds.astype(np.uint8))
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
        # What is on its way to the store has been seen to, and is local no more as soon as that answers.
        local, low = self._table.local - self._leaver.on_its_way, int(raw.low)
        if lib.dmh_room_wanted(raw) and self._table.resident >= int(raw.resident_max):
            return max(local - low, 1)
        if raw.rung_at:
            return max(min(int(raw.rung_at), local) - low, 0)
        return local - low if local > int(raw.high) else 0

    def run(self, keep_going: Callable[[], bool]) -> int:
        """One run: evict as many pages as were too many at its start.  Returns how many it could not find."""
        quota = self.due()
        rung_ns, self._table.raw.rung_at = int(self._table.raw.rung_ns), 0
        self._has_run = quota > 0
        if not quota:
            return 0
        self._table.count(self._number, "runs")
        began = min(rung_ns / 1e9 or self._clock.monotonic(), self._clock.monotonic())
        starved = False
        while quota > 0 and keep_going():
            self.learn()
            looked = self._look()
            # Marks that move nothing wait for `mark_ahead`, where they are many, unless nothing leaves without.
            marking = self._source.moves or starved
            choice = self._policy.choose(min(quota, self._victims), self._may_mark() if marking else 0)
            starved = not len(choice.evict)
            self._mark(choice.mark)
            if len(choice.evict):
                left = self._leaver.evict(choice.evict)
                moved = len(choice.evict) - (self._keep_unmoved(left) if len(left) else 0)
                quota -= moved
                if not moved and not len(choice.mark):
                    break  # the victim buffer is full of what the store does not take: others have a turn
            if marking and starved and not looked and not len(choice.mark):
                # Nothing of the policy's is left to evict; what an earlier write failed on may be.
                self._leaver.write_staged()
                break
            if self._reserve and len(choice.evict):
                now = self._clock.monotonic()
                # There is room again as soon as the victim buffer has been filled once.
                self._reserve.reacted((now - began) / -(-len(choice.evict) // self._table.slots))
                began = now
        self._table.raw.rung_at = 0  # who rang meanwhile has been served by this run
        self._adapt()
        return max(quota, 0)

    def mark_ahead(self) -> None:
        """Mark what the policy will want to know of, before it needs room.

        While pages have to leave one run after the other, marks take their share of the time and no more: what was
        saved up is spent when nobody waits for it.
        """
        while not self._source.moves and (most := self._may_mark(pressed=self._has_run or self.due() > 0)):
            marks = self._policy.choose(0, most).mark
            self._mark(marks)
            if len(marks) < most:
                return

    def _adapt(self) -> None:
        """Move the thresholds so that the room above the high one is the reserve.

        The high one is never above what is configured, and a run goes no further below it than it must: a page that
        stays costs nothing.
        """
        if self._reserve is None:
            return
        raw = self._table.raw
        waits = self._table.counter("room_waits")
        self._reserve.pass_time(self._clock.monotonic())
        self._reserve.waited(waits - self._waits)
        self._waits = waits
        room = self._reserve.pages
        raw.high = max(min(self._high, int(raw.resident_max) - room), 2)
        depth = max(room, min(self._batch, (int(raw.resident_max) - self._low) // 2))
        raw.low = min(max(self._low, int(raw.high) - depth), int(raw.high) - 1)

    def evict(self, pages: Pages) -> Pages:
        """Move these pages out now, whatever the policy thinks of them; returns those that the store did not take."""
        self.forget(pages)
        left = self._leaver.evict(pages)
        left = np.concatenate([left, self._leaver.finish()])
        left = left[np.isin(left, pages)]  # a batch before them may have failed
        self._keep_unmoved(left)
        states = self._table.words[left] & np.uint64(15)
        held = (states == State.STAGED) | ((states == State.RESIDENT) & (self._table.pins[left] == 0))
        held_pages: Pages = left[held]
        return held_pages

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

    def _may_mark(self, *, pressed: bool = False) -> int:
        """How many pages may be marked now: what fits the victim buffer, or the budget."""
        if self._source.moves:
            return min(self._table.slots - self._table.staged, self._batch)
        return self._budget.pages(self._clock.monotonic(), MARKS, pressed=pressed)

    def _mark(self, pages: Pages) -> None:
        if not len(pages):
            return
        began = self._clock.thread_time()
        pages = np.sort(pages)
        watched = self._source.mark(pages)
        self._table.count(self._number, "marked", int(np.count_nonzero(watched)))
        if self._source.moves:
            self._keep_unmoved(pages)
        else:
            self._unwatched[pages] = ~watched
            self._spend(began, len(pages))

    def _look(self) -> int:
        """Tell the policy whether the marked pages that it asks about were used; returns how many those were."""
        pages = self._policy.look(self._batch)
        if not len(pages):
            return 0
        began = self._clock.thread_time()
        used = self._source.used(pages) & ~self._unwatched[pages]
        kinds = np.where(used, Event.USED, Event.IDLE).astype(np.uint8)
        self._table.count(self._number, "found_used", int(np.count_nonzero(used)))
        self._policy.learn(pages, kinds)
        if self._recording:
            self._recording.append(pages, kinds)
        if not self._source.moves:
            self._spend(began, 0)
        return len(pages)

    def _spend(self, began: float, marked: int) -> None:
        """Account for the processor time of marks and looks."""
        seconds = self._clock.thread_time() - began
        self._budget.spent(seconds, marked)
        self._table.count(self._number, "mark_us", round(seconds * 1e6))

    def _keep_unmoved(self, pages: Pages) -> int:
        """Pages that stayed resident although they were chosen go back to the policy, but for pinned ones, which
        come back when they are unpinned.  Returns how many stayed.
        """
        resident = pages[(self._table.words[pages] & np.uint64(15)) == State.RESIDENT]
        self._policy.tell(Event.KEPT, resident[self._table.pins[resident] == 0])
        return len(resident)

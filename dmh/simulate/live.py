"""One simulated run of a live service: LPET itself, on a table of its own, against a simulated program and clock.

`replay` gives a policy all of the memory, one page at a time, and marks that are free and at once.  Here LPET
(`dmh.evict.lpet`) runs as it does in the evictor, with the thresholds, the reserve, the victim buffer and the budget
for marks that a configuration means: it learns late and in batches of what has arrived, and evicts in batches while the
program goes on.  Three things make that dearer than the ideal: what lies above the low threshold is free half of the
time; a policy reckons with what is left; and while faults come fast the budget lasts for few of the marks.

Owns the program's and LPET's clock, the idle source and the leaving of pages in such a run, and what all of that takes
(`Pace`).  The program's loop is C (`dmh_replay_program`).  Reading ahead is left out, as in `replay`.  Called by
`dmh simulate --live` and `dmh bench policies`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from dmh.config.limits import Limits
from dmh.config.model import Config
from dmh.errors import DmhError
from dmh.evict.budget import MarkBudget
from dmh.evict.idle.base import IdleSource, Mask, NoSource
from dmh.evict.idle.buffer import BufferSource
from dmh.evict.lpet import Lpet, local_in_use
from dmh.evict.policies.base import Pages, Policy
from dmh.evict.reserve import Reserve
from dmh.lspt.states import State
from dmh.lspt.table import Bounds, Table
from dmh.native import ffi, lib, pointer
from dmh.simulate.replay import Outcome, no_victim

EVICTOR = 1
"""LPET's number in the table; the program is 0, as the monitor would be."""
LOOKS_EVERY = 1.0
"""Seconds after which an evictor that nobody rings looks again."""
LATE_EVERY = 8
SHORT_US = 2000.0
"""How long it waits where it has found too little to evict."""
STUCK = 1000
"""LPET's turns without a use by the program, after which there will be none: marking all of memory takes a few."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What takes how long, in microseconds: measured with a local store on two processors of a virtual machine.

    What decides is how many faults come while LPET reacts, evicts a batch, or saves up for a mark; figures that are
    wrong by half change the faults of a run by a few per cent.
    """

    use: float = 0.1
    remap: float = 1.0
    """In addition, a use of a page that a mark has unmapped."""
    soft: float = 8.0
    hard: float = 16.0
    wake: float = 1000.0
    """From a ring to LPET's first step: the program and who serves its faults keep both processors busy."""
    late: float = 5000.0
    """The same, one time in LATE_EVERY: a slice of the scheduler's.  The reserve is as large as such peaks ask for."""
    batch: float = 60.0
    """Of pages that leave, beside the pages: asking the policy, writing."""
    capture: float = 4.0
    write: float = 2.0
    call: float = 13.0
    """Of marks or looks, beside the pages."""
    mark: float = 4.0
    look: float = 0.4


@dataclass(frozen=True, slots=True)
class Setting:
    """What a configuration means for LPET.

    Attributes:
        idle: the idle source in use, as `dmh.evict.idle.choose_source` says.
    """

    limits: Limits
    idle: str
    mark_budget: float

    @classmethod
    def of(cls, config: Config, idle: str) -> Setting:
        """The setting of a service with this configuration."""
        return cls(Limits.of(config), idle, config.evictor.mark_budget)

    @property
    def accessed(self) -> bool:
        """Marks tell of every use."""
        return self.idle in ("page_idle", "unmap")

    @property
    def reckoned(self) -> int:
        """A policy's M."""
        return local_in_use(self.limits.high, self.limits.low, adaptive=self.limits.adaptive)


def replay_live(
    policy: Policy, trace: Pages, pages: int, setting: Setting, pace: Pace | None = None, *, filled: bool = False
) -> Outcome:
    """Use the pages of `trace` one after another, as a program does that one service serves.

    Args:
        policy: new, made for `pages` pages, `setting.reckoned` local ones and `setting.accessed`.
        filled: every page has come in before, once and in the order of their numbers, and all were evicted then; what
            that takes does not count.
    """
    world = _World(pages, setting, pace or Pace())
    try:
        lpet = world.lpet(policy)
        if filled:
            world.run(lpet, policy, np.arange(pages, dtype=np.uint64))
            lpet.evict(world.table.in_state(State.RESIDENT))
        before = world.outcome(0)
        world.run(lpet, policy, np.ascontiguousarray(trace, np.uint64))
        return world.outcome(len(trace), before)
    finally:
        world.table.close()


class _World:
    """What LPET has around it: the program, the table, the clock, the idle source, the leaving of pages."""

    def __init__(self, pages: int, setting: Setting, pace: Pace) -> None:
        self.setting, self.pace = setting, pace
        limits = setting.limits
        bounds = Bounds(limits.resident_max, limits.high, limits.low)
        fd = Table.create(pages, 4096, limits.buffer, EVICTOR + 1, bounds)
        try:
            self.table = Table(fd)
        finally:
            os.close(fd)
        self.mapped = np.zeros(pages, np.uint8)
        self.trace = np.empty(0, np.uint64)
        remap = pace.remap if setting.idle == "unmap" else 0.0
        self.program = ffi.new(
            "struct dmh_program *",
            {
                name: round(us * 1000)
                for name, us in (
                    ("use_ns", pace.use), ("remap_ns", remap), ("soft_ns", pace.soft), ("hard_ns", pace.hard)
                )
            },
        )  # fmt: skip
        self.program.now = self.now = 10**9  # LPET takes 0 for never
        self.taken = 0.0
        self.wakes = 0

    def lpet(self, policy: Policy) -> Lpet:
        """As the evictor makes it."""
        limits = self.setting.limits
        source: IdleSource = NoSource()
        if self.setting.accessed:
            source = _Accessed(self)
        elif self.setting.idle == "buffer":
            source = BufferSource(self.table, self)
        return Lpet(
            self.table,
            policy,
            source,
            self,
            high=limits.high,
            low=limits.low,
            budget=MarkBudget(self.setting.mark_budget),
            reserve=Reserve.of(limits.resident_max, limits.low) if limits.adaptive else None,
            batch=limits.batch,
            number=EVICTOR,
            clock=self,
        )

    def run(self, lpet: Lpet, policy: Policy, trace: Pages) -> None:
        """What the evictor's main loop does while a program runs."""
        self.trace, self.program.at = trace, 0
        stuck = 0
        while self.goes_on():
            before = self.program.at
            lpet.learn()
            short = lpet.run(self.goes_on)
            lpet.mark_ahead()
            if short:
                self.rest(SHORT_US)
            elif not lpet.due():
                self.wait()
            stuck = stuck + 1 if self.program.at == before else 0
            if stuck > STUCK:
                raise no_victim(policy, self.table.local)

    def goes_on(self) -> bool:
        """Is there more for the program to do?"""
        return int(self.program.at) < len(self.trace)

    def outcome(self, references: int, before: Outcome | None = None) -> Outcome:
        """What there was of everything, less what there had been before."""
        count = self.table.counter
        now = (
            int(self.program.hard), int(self.program.soft), count("marked"), count("evicted"), count("room_waits")
        )  # fmt: skip
        if before is None:
            return Outcome(references, *now)
        then = before.hard, before.soft, before.marks, before.evicted, before.waits
        return Outcome(references, *(a - b for a, b in zip(now, then, strict=True)))

    # ---- time

    def monotonic(self) -> float:
        """LPET's clock."""
        return self.now / 1e9

    def thread_time(self) -> float:
        """How long LPET has been at work."""
        return self.taken

    def pass_time(self, us: float) -> None:
        """LPET is at work; the program goes on meanwhile."""
        self.taken += us / 1e6
        self.rest(us)

    def rest(self, us: float) -> None:
        """Only the program goes on."""
        self.now += round(us * 1000)
        self._go_on(self.now)

    def wait(self) -> None:
        """LPET sleeps until it is rung, and wakes up."""
        self._go_on(self.now + round(LOOKS_EVERY * 1e9), while_unrung=True)
        self.now = max(int(self.program.now), self.now)
        self.wakes += 1
        self.rest(self.pace.wake if self.wakes % LATE_EVERY else self.pace.late)

    def _go_on(self, until: int, *, while_unrung: bool = False) -> None:
        arrays = pointer(self.trace, "uint64_t[]"), len(self.trace), pointer(self.mapped)
        if lib.dmh_replay_program(self.table.raw, self.program, *arrays, until, while_unrung) < 0:
            raise DmhError(f"the trace names pages beyond the {self.table.pages:,} that it is said to have")

    # ---- how pages leave: what LPET and `buffer` want of a Leaver

    def stage(self, pages: Pages) -> Pages:
        """Move resident pages to the victim buffer; returns those that found a slot."""
        pages = pages[: self.table.slots - self.table.staged]
        self.pass_time(self.pace.capture * len(pages))
        self.table.words[pages] = int(State.STAGED)
        self.table.raw.staged += len(pages)
        self.table.raw.resident -= len(pages)
        return pages

    def evict(self, pages: Pages) -> Pages:
        """Move pages out: staged ones from the victim buffer, resident ones by way of it."""
        self.pass_time(self.pace.batch)
        states = self.table.words[pages]
        self._write(pages[states == State.STAGED])
        waiting = pages[states == State.RESIDENT]
        while len(waiting):
            if self.table.staged == self.table.slots:
                self.write_staged()
            part = self.stage(waiting)
            waiting = waiting[len(part) :]
            self._write(part)
        return pages[:0]

    @property
    def on_its_way(self) -> int:
        """None: writing takes its time at once."""
        return 0

    def finish(self) -> Pages:
        """Nothing is on its way."""
        return np.empty(0, np.uint64)

    def write_staged(self) -> None:
        """Empty the victim buffer."""
        self._write(self.table.in_state(State.STAGED))

    def _write(self, pages: Pages) -> None:
        self.pass_time(self.pace.write * len(pages))
        staged = pages[self.table.words[pages] == State.STAGED]  # the others were used meanwhile
        self.table.words[staged] = int(State.STORED)
        self.table.raw.staged -= len(staged)
        self.table.count(EVICTOR, "evicted", len(staged))


class _Accessed(IdleSource):
    """`unmap` and `page_idle`."""

    name = "simulated"

    def __init__(self, world: _World) -> None:
        self._world = world

    def mark(self, pages: Pages) -> Mask:
        self._world.mapped[pages] = 0
        self._world.pass_time(self._world.pace.call + self._world.pace.mark * len(pages))
        return np.ones(len(pages), np.bool_)

    def used(self, pages: Pages) -> Mask:
        self._world.pass_time(self._world.pace.call + self._world.pace.look * len(pages))
        used: Mask = self._world.mapped[pages] != 0
        return used

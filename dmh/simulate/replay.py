"""One simulated run: a trace against a policy at a memory size.

Owns what stands around a policy in a simulation, and the cost model.  The loops over a trace are C (dmh_replay.c) for
dmh's own policies; `_replay_slowly` does the same, event by event, for any other.  This is the ideal: all of the memory
is the policy's, marks are free and made at once.  `dmh.simulate.live` has a service's run.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dmh.errors import DmhError
from dmh.evict.policies.base import Event, Pages, Policy
from dmh.evict.policies.fifo import Fifo
from dmh.evict.policies.native import NativePolicy
from dmh.native import check, ffi, lib, pointer

HARD_US, SOFT_US, MARK_US = 103.0, 33.0, 1.0
"""What things cost, in microseconds, an eviction (3) included."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run cost."""

    references: int
    hard: int
    soft: int = 0
    marks: int = 0
    evicted: int = 0
    waits: int = 0
    """Faults that found no room; `replay` has none."""

    @property
    def cost_us(self) -> float:
        """In the cost model."""
        return HARD_US * self.hard + SOFT_US * self.soft + MARK_US * self.marks

    def per_thousand(self, n: int) -> float:
        """n, a thousand references."""
        return 1000 * n / max(self.references, 1)


def replay(
    policy: Policy, trace: Pages, pages: int, high: int, low: int | None = None, *, slots: int = 0, every: bool = False
) -> Outcome:
    """Use the pages of `trace` one after another.

    Args:
        policy: new, made for `pages` pages.
        high: a fault that finds so many local pages has LPET evict first.
        low: down to so many; one less than high where not given, so that exactly `high` pages fit.
        slots: of the local pages, how many can be staged by a policy that marks without accessed information.
        every: tell the policy of every use.
    """
    low = high - 1 if low is None else low
    if not isinstance(policy, NativePolicy):
        return _replay_slowly(policy, trace, pages, high, low, slots=slots, every=every)
    run = ffi.new("struct dmh_replay *", {"high": high, "low": low, "slots": slots, "every": every})
    state = np.zeros(pages, np.uint8)
    trace = np.ascontiguousarray(trace, np.uint64)
    result = lib.dmh_replay_trace(policy.raw, pointer(trace, "uint64_t[]"), len(trace), pointer(state), run)
    if result == -errno.ERANGE:
        raise DmhError(f"the trace names pages beyond the {pages:,} that it is said to have")
    if result == -errno.ENOSPC:
        raise no_victim(policy, run.local)
    return Outcome(len(trace), run.hard, run.soft, run.marks, run.evicted)


def lru(trace: Pages, pages: int, limit: int) -> Outcome:
    """True LRU, which sees every use: FIFO that is told of each, so that the page goes to the back."""
    return replay(Fifo(pages, limit), trace, pages, limit, every=True)


def optimal(trace: Pages, pages: int, limit: int) -> Outcome:
    """Belady's OPT, which knows what comes: the fewest faults that are possible."""
    trace = np.ascontiguousarray(trace, np.uint64)
    faults = lib.dmh_replay_optimal(pointer(trace, "uint64_t[]"), len(trace), pages, limit)
    return Outcome(len(trace), check(faults, "simulating OPT"))


def no_victim(policy: Policy, local: int) -> DmhError:
    """The error that ends a run which cannot go on."""
    return DmhError(f"policy {type(policy).__name__} names no victim although {local:,} pages are local")


_AWAY, _RESIDENT, _STAGED = 0, 1, 2


class _Slow:
    """What dmh_replay.c does, through the interface that every policy has."""

    def __init__(self, policy: Policy, pages: int, slots: int) -> None:
        self.policy, self.slots = policy, slots
        self.state: npt.NDArray[np.uint8] = np.zeros(pages, np.uint8)
        self.used = np.zeros(pages, bool)
        self.local = self.staged = self.marks = self.evicted = 0

    def step(self, quota: int) -> bool:
        """One step of LPET towards `quota` pages fewer; False: nothing can be evicted."""
        most, accessed = min(quota, 256), self.policy.accessed
        looks = self.policy.look(most)
        used = self.used[looks] if accessed else self.state[looks] != _STAGED
        self.policy.learn(looks, np.where(used, Event.USED, Event.IDLE).astype(np.uint8))
        choice = self.policy.choose(most, min(256 if accessed else self.slots - self.staged, 256))
        if accessed:
            self.used[choice.mark] = False
            self.marks += len(choice.mark)
        else:
            self.state[choice.mark] = _STAGED
            self.staged += len(choice.mark)
        self.staged -= int(np.count_nonzero(self.state[choice.evict] == _STAGED))
        self.state[choice.evict] = _AWAY
        self.local -= len(choice.evict)
        self.evicted += len(choice.evict)
        return bool(len(looks) or len(choice.mark) or len(choice.evict))


def _replay_slowly(
    policy: Policy, trace: Pages, pages: int, high: int, low: int, *, slots: int, every: bool
) -> Outcome:
    world = _Slow(policy, pages, slots)
    hard = soft = 0
    for page in trace:
        here = np.array([page], np.uint64)
        state = world.state[page]
        if state == _RESIDENT:
            world.used[page] = True
            if every:
                policy.tell(Event.SOFT, here)
            continue
        if state == _STAGED:
            soft += 1
            world.staged -= 1
        elif world.local >= high:
            while world.local > low:
                if not world.step(world.local - low):
                    raise no_victim(policy, world.local)
        if state == _AWAY:
            hard += 1
            world.local += 1
        world.state[page], world.used[page] = _RESIDENT, True
        policy.tell(Event.SOFT if state == _STAGED else Event.FAULT, here)
        if policy.accessed:
            world.step(0)  # mark what has just come in, after its first use
    return Outcome(len(trace), hard, soft, world.marks, world.evicted)

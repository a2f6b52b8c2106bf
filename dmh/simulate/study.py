"""Policies compared: every policy over every trace at every memory size, beside LRU and OPT.

Owns the grid of runs and what is said of it.  Pure but for the time that it takes.  Called by `dmh simulate`, whose
`--table` prints `as_markdown`, and by the test of the default policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dmh.evict.policies import policy_class
from dmh.simulate.live import Setting, replay_live
from dmh.simulate.replay import Outcome, lru, optimal, replay
from dmh.simulate.traces import Subject

SHARES = (0.10, 0.25, 0.50, 0.75)
"""Memory, as fractions of a trace's footprint."""
BUFFER = 0.04
"""Of memory: the victim buffer that a policy marks into which has no accessed information (evictor.buffer)."""
USES_MARKS = ("auto", "clock", "duel", "idle-walk", "lirs", "s3fifo")
"""dmh's policies that look at accessed information."""


@dataclass(frozen=True, slots=True)
class Run:
    """One policy on one trace at one memory size."""

    trace: str
    limit: int
    share: float
    policy: str
    marks: bool
    outcome: Outcome
    lru: Outcome
    optimal: Outcome

    @property
    def to_lru(self) -> float:
        """Cost, relative to LRU's."""
        return self.outcome.cost_us / self.lru.cost_us

    @property
    def label(self) -> str:
        """The policy's name in a table."""
        return f"{self.policy}, marks" if self.marks else self.policy


def study(
    subjects: Iterable[Subject],
    policies: Sequence[tuple[str, bool]],
    limits: Sequence[float],
    seed: int = 0,
    service: Callable[[int, int, str], Setting] | None = None,
) -> list[Run]:
    """Run everything.

    Args:
        policies: name, and whether marks tell of uses.
        limits: memory: below 1 a fraction of the footprint, else pages.
        service: for so many pages, so many of them in memory, and a policy, the setting of the service that is
            simulated; it says whether marks tell of uses.  None: the ideal, which has all of the memory and marks at
            once.
    """
    runs = []
    for it in subjects:
        for given in limits:
            limit = max(int(it.footprint * given if given < 1 else given), 2)
            limit = min(limit, it.pages)
            references = lru(it.trace, it.pages, limit), optimal(it.trace, it.pages, limit)
            for name, marks in policies:
                if service:
                    setting = service(it.pages, limit, name)
                    marks = setting.accessed
                    policy = policy_class(name)(it.pages, setting.reckoned, accessed=marks, seed=seed)
                    outcome = replay_live(policy, it.trace, it.pages, setting)
                else:
                    policy = policy_class(name)(it.pages, limit, accessed=marks, seed=seed)
                    slots = max(int(limit * BUFFER), 1)
                    outcome = replay(policy, it.trace, it.pages, limit, slots=slots)
                runs.append(Run(it.name, limit, limit / it.footprint, name, marks, outcome, *references))
    return runs


def mean(values: Iterable[float]) -> float:
    """The geometric mean."""
    return float(np.exp(np.mean(np.log(list(values)))))


def as_markdown(runs: Sequence[Run], shares: Sequence[float] = SHARES, default: str = "auto") -> str:
    """The tables in docs/policies.md."""
    return "\n\n".join([_means(runs, shares), *(_losses(runs, shares, default, marks) for marks in (False, True))])


def _rows(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _means(runs: Sequence[Run], shares: Sequence[float]) -> str:
    """Geometric means of cost relative to LRU, best first."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    best = _best(runs)

    def row(label: str, of: list[Run]) -> list[str]:
        sizes = [mean(run.to_lru for run in of if abs(run.share - share) < 0.02) for share in shares]
        near = [run.outcome.cost_us <= 1.05 * best[run.trace, run.limit, run.marks] for run in of]
        worst = max(of, key=lambda run: run.to_lru)
        return [
            label, f"{mean(run.to_lru for run in of):.2f}", *(f"{size:.2f}" for size in sizes),
            f"{worst.to_lru:.2f} ({worst.trace})", f"{100 * np.mean(near):.0f} %",
        ]  # fmt: skip

    ordered = sorted(groups, key=lambda label: mean(run.to_lru for run in groups[label]))
    opt = groups[ordered[0]]
    first = ["OPT", f"{mean(_opt(run) for run in opt):.2f}"]
    first += [f"{mean(_opt(run) for run in opt if abs(run.share - share) < 0.02):.2f}" for share in shares]
    heading = ["policy", "all", *(f"{share:.0%}" for share in shares), "worst", "best or within 5 %"]
    return _rows(heading, [[*first, "", ""], *(row(label, groups[label]) for label in ordered)])


def _opt(run: Run) -> float:
    return run.optimal.cost_us / run.lru.cost_us


def _best(runs: Sequence[Run]) -> dict[tuple[str, int, bool], float]:
    """The least cost of any policy that sees as much, by trace, memory and marks."""
    best: dict[tuple[str, int, bool], float] = {}
    for run in runs:
        # Who is told of marks may ignore them.
        for marks in (False, True) if not run.marks else (True,):
            key = run.trace, run.limit, marks
            best[key] = min(best.get(key, np.inf), run.outcome.cost_us)
    return best


def _losses(runs: Sequence[Run], shares: Sequence[float], default: str, marks: bool) -> str:
    """Where the default costs over 5 % more than LRU or than the best policy, by how much, and which that is."""
    best = _best(runs)
    rows: dict[str, list[str]] = {}
    for run in runs:
        least = min(best[run.trace, run.limit, run.marks], run.lru.cost_us)
        if (run.policy, run.marks) != (default, marks) or run.outcome.cost_us <= 1.05 * least:
            continue
        same = (r for r in runs if (r.trace, r.limit) == (run.trace, run.limit) and r.outcome.cost_us == least)
        winner = next((r.label for r in same), "LRU")
        cells = rows.setdefault(run.trace, [""] * len(shares))
        size = min(range(len(shares)), key=lambda k: abs(shares[k] - run.share))
        cells[size] = f"{run.to_lru:.2f} ({winner} {least / run.lru.cost_us:.2f})"
    what = "with marks" if marks else "faults only"
    return f"`{default}`, {what}: cost over 5 % above LRU or the best policy (which, and what that costs):\n\n" + _rows(
        ["trace", *(f"{share:.0%}" for share in shares)], ([trace, *cells] for trace, cells in rows.items())
    )

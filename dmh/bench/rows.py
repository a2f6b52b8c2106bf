"""What a benchmark yields, and how its runs are interleaved.  Pure but for the clock that the subjects read.

A *subject* is something that is measured (`dmh`, `floor`, `memmap`); all subjects of a case run in turn, again and
again, there and back (A B C, C B A), so that what the machine does meanwhile falls on all of them alike, and what one
subject leaves behind (idle processors, pages being written) not always on the same other one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float64]
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result.

    Attributes:
        benchmark, case, subject: what was measured, on what, of whom.
        metric, unit: what the figures are.
        median, p99: over all samples of all runs; for rates p99 is the figure that 99 % of the runs reach.
        runs: how often the subject ran.
        ratio: median over the baseline's median in the same run; None for the baseline itself.
        baseline: the subject that ratio refers to.
        spread: highest less lowest of the runs' own medians, over the median.
        note: why it could not be measured; then median, p99, ratio and spread are None and runs is 0.
    """

    benchmark: str
    case: str
    subject: str
    metric: str
    unit: str
    median: float | None
    p99: float | None
    runs: int
    ratio: float | None
    baseline: str | None
    spread: float | None = None
    note: str | None = None

    def to_wire(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Row:
        """The inverse of `to_wire`."""
        return cls(**wire)


def interleave(
    subjects: Mapping[str, Callable[[], Samples]], runs: int, progress: Progress
) -> dict[str, list[Samples]]:
    """Run every subject `runs` times, in turn, after one round that is not counted."""
    results: dict[str, list[Samples]] = {name: [] for name in subjects}
    for number in range(-1, runs):
        for name, subject in list(subjects.items())[:: 1 if number % 2 else -1]:
            progress(f"{name}, {'warming up' if number < 0 else f'run {number + 1} of {runs}'}")
            samples = subject()
            if number >= 0:
                results[name].append(samples)
    return results


def summarize(
    benchmark: str,
    case: str,
    metric: str,
    unit: str,
    results: Mapping[str, list[Samples]],
    baseline: str,
    *,
    rate: bool = False,
    missing: Mapping[str, str] | None = None,
) -> list[Row]:
    """Rows of one case, and one for each subject that is missing (name -> reason).  Where the metric is a rate, more
    is better, so the 99th percentile is counted from the other end.
    """
    base = float(np.median(np.concatenate(results[baseline]))) if baseline in results else None
    rows = []
    for name, runs in results.items():
        values = np.concatenate(runs)
        median = float(np.median(values))
        ratio = None if base is None or name == baseline else median / base
        medians = [float(np.median(samples)) for samples in runs]
        rows.append(
            Row(
                benchmark=benchmark,
                case=case,
                subject=name,
                metric=metric,
                unit=unit,
                median=median,
                p99=float(np.percentile(values, 1 if rate else 99)),
                runs=len(runs),
                ratio=ratio,
                baseline=None if ratio is None else baseline,
                spread=(max(medians) - min(medians)) / median if median else 0.0,
            )
        )
    return rows + [not_measured(benchmark, case, name, metric, unit, why) for name, why in (missing or {}).items()]


def not_measured(benchmark: str, case: str, subject: str, metric: str, unit: str, why: str) -> Row:
    """The row of a subject that this machine does not have."""
    return Row(benchmark, case, subject, metric, unit, None, None, 0, None, None, None, why)


def figure(value: float) -> str:
    """Three digits that say something, or more."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def waits(benchmark: str, case: str, subject: str, waited: int, faults: int, runs: int) -> Row:
    """How many of a service's faults found no room and had to wait for an eviction."""
    thousandth = 1000 * waited / max(faults, 1)
    return Row(benchmark, case, subject, "waits", "a 1000 faults", thousandth, thousandth, runs, None, None)

"""What a benchmark yields, and how its runs are interleaved.  Pure but for the clock that the subjects read.

A *subject* is something that is measured (`dmh`, `floor`, `memmap`); all subjects of a case run in turn, again and
again (A B C A B C), so that what the machine does meanwhile falls on all of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float64]


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
    """

    benchmark: str
    case: str
    subject: str
    metric: str
    unit: str
    median: float
    p99: float
    runs: int
    ratio: float | None
    baseline: str | None

    def to_wire(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)


def interleave(
    subjects: Mapping[str, Callable[[], Samples]], runs: int, progress: Callable[[str], None]
) -> dict[str, list[Samples]]:
    """Run every subject `runs` times, in turn, after one round that is not counted."""
    results: dict[str, list[Samples]] = {name: [] for name in subjects}
    for number in range(-1, runs):
        for name, subject in subjects.items():
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
    results: dict[str, list[Samples]],
    baseline: str,
    *,
    rate: bool = False,
) -> list[Row]:
    """Rows of one case.  Where the metric is a rate, more is better, so the 99th percentile is counted from the
    other end.
    """
    joined = {name: np.concatenate(samples) for name, samples in results.items()}
    base = float(np.median(joined[baseline])) if baseline in joined else None
    rows = []
    for name, values in joined.items():
        median = float(np.median(values))
        ratio = None if base is None or name == baseline else median / base
        tail = float(np.percentile(values, 1 if rate else 99))
        rows.append(
            Row(
                benchmark,
                case,
                name,
                metric,
                unit,
                median,
                tail,
                len(results[name]),
                ratio,
                None if ratio is None else baseline,
            )
        )
    return rows

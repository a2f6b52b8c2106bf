"""One picture a benchmark: bars of the medians, a group a case, whiskers to the 99th percentile.

Needs matplotlib (the extra `bench`); only `dmh.bench.report` imports it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmh.bench.rows import Row, figure

mpl.use("Agg")  # no window, no display

COLOURS = {
    "dmh": "#1f6fb4",
    "dmh-pool": "#7fb2dd",
    "floor": "#999999",
    "floor-pager": "#555555",
    "mmap": "#d9822b",
    "memmap": "#d9822b",
    "mmap-random": "#e8b27d",
    "swap": "#b05cc6",
    "client": "#4f9d69",
    "client + floor": "#2f6f46",
    "numpy": "#999999",
    "numpy-4k": "#bbbbbb",
}
OTHER = "#7d8cc4"
LOG_BEYOND = 20.0
"""Largest over smallest median above which the axis is logarithmic."""


def draw(path: Path, name: str, sources: Mapping[str, list[Row]]) -> str:
    """Draw one benchmark's rows, the sources side by side; returns the picture's file name."""
    parts = {source: main_metric(rows) for source, rows in sources.items()}
    tallest = max(sum(1 for _ in rows) + len({row.case for row in rows}) for rows in parts.values())
    picture = Figure(figsize=(6.2 * len(parts) + 0.8, max(2.2, 0.27 * tallest + 1.1)), layout="constrained")
    axes = picture.subplots(1, len(parts), squeeze=False)[0]
    for axis, (source, rows) in zip(axes, parts.items(), strict=True):
        _bars(axis, rows)
        axis.set_title(f"{name}, {source}", loc="left", fontweight="bold")
    picture.savefig(path, dpi=110)
    return path.name


def main_metric(rows: list[Row]) -> list[Row]:
    """The measured rows of the metric that most rows have; the first of those if there are several."""
    measured = [row for row in rows if row.median is not None]
    counts = Counter((row.metric, row.unit) for row in measured)
    if not counts:
        return []
    (chosen, _), *_ = counts.most_common(1)
    return [row for row in measured if (row.metric, row.unit) == chosen]


def _bars(axis: Axes, rows: list[Row]) -> None:
    position, ticks, labels, tops = 0.0, [], [], []
    for case in dict.fromkeys(row.case for row in rows):
        position += 0.9
        axis.text(0, position, f" {case}", transform=axis.get_yaxis_transform(), va="center", fontweight="bold")
        for row in (row for row in rows if row.case == case):
            assert row.median is not None
            assert row.p99 is not None
            position += 1
            axis.barh(position, row.median, height=0.8, color=COLOURS.get(row.subject, OTHER))
            axis.plot([row.median, row.p99], [position, position], color="#222222", linewidth=0.8)
            end = max(row.median, row.p99)
            axis.text(end, position, f" {figure(row.median)}", va="center", fontsize=8)
            ticks.append(position)
            labels.append(row.subject)
            tops.append((row.median, end))
    axis.set_yticks(ticks, labels)
    axis.set_ylim(position + 0.8, 0.2)
    axis.spines[["top", "right"]].set_visible(False)
    if not rows:
        axis.text(0.5, 0.5, "nothing was measured", transform=axis.transAxes, ha="center")
        return
    medians = [median for median, _ in tops if median > 0]
    furthest = max(end for _, end in tops)
    if medians and max(furthest, *medians) / min(medians) > LOG_BEYOND:
        axis.set_xscale("log")
        axis.set_xlim(min(medians) / 2, furthest * 3)
    else:
        axis.set_xlim(0, furthest * 1.15 or 1)
    axis.set_xlabel(f"{rows[0].metric}, {rows[0].unit}: median, line to p99")

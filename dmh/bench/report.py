"""One Markdown page of what was measured: per benchmark what it does, a plot, a table, and what could not be measured.

Owns the page and where its pictures stand; drawing them is `dmh.bench.plots`.  Used by `dmh bench report`.
"""

from __future__ import annotations

import inspect
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

from dmh import __version__
from dmh.bench.rows import Row, figure

Sources = Mapping[str, list[Row]]
"""Name of a set of rows, such as "default" and "pinned" -> the rows."""


def write(directory: Path, sources: Sources, modules: Mapping[str, ModuleType], command: str) -> Path:
    """Write the page and its pictures; returns the page's path.

    Args:
        modules: benchmark -> the module whose docstring says what it does.
        command: that the rows came from.
    """
    directory.mkdir(parents=True, exist_ok=True)
    pictures, why_not = _draw(directory, sources)
    page = directory / "benchmarks.md"
    page.write_text(markdown(sources, modules, command, pictures, why_not))
    return page


def _draw(directory: Path, sources: Sources) -> tuple[dict[str, str], str | None]:
    """Benchmark -> name of its picture; and why there are none where there are none."""
    try:
        from dmh.bench import plots
    except ImportError:
        return {}, "No plots: matplotlib is not installed (`pip install dmh[bench]`)."
    return {
        name: plots.draw(directory / f"{name}.png", name, parts) for name, parts in by_benchmark(sources).items()
    }, None


def by_benchmark(sources: Sources) -> dict[str, dict[str, list[Row]]]:
    """Benchmark -> source that has it -> its rows, in the order of first appearance."""
    names = dict.fromkeys(row.benchmark for rows in sources.values() for row in rows)
    return {
        name: {source: part for source, rows in sources.items() if (part := [r for r in rows if r.benchmark == name])}
        for name in names
    }


def markdown(
    sources: Sources,
    modules: Mapping[str, ModuleType],
    command: str,
    pictures: Mapping[str, str],
    why_no_pictures: str | None = None,
) -> str:
    """The page.  Pure but for the description of this machine."""
    lines = ["# Benchmarks", "", f"`{command}`", "", machine(), ""]
    lines += [
        "Medians over all runs; the runs of a case's subjects alternate. Spread is what lies between the lowest and "
        "the highest run, in % of the median. Ratios are to the named baseline of the same run. Every run's data was "
        "verified.",
        "",
    ]
    if why_no_pictures:
        lines += [why_no_pictures, ""]
    for name, parts in by_benchmark(sources).items():
        lines += [f"## {name}", ""]
        if name in modules:
            lines += ["```", *_description(modules[name]), "```", ""]
        if name in pictures:
            lines += [f"![{name}]({pictures[name]})", ""]
        for source, rows in parts.items():
            if len(sources) > 1:
                lines += [f"**{source}**", ""]
            lines += table([row for row in rows if row.median is not None])
            lines += _reasons(row for row in rows if row.median is None)
    return "\n".join(lines)


def table(rows: list[Row]) -> list[str]:
    """A Markdown table of rows that were measured."""
    lines = [
        "| case | subject | metric | median | p99 | spread | runs | ratio |",
        "|---|---|---|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        assert row.median is not None
        assert row.p99 is not None
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} x {row.baseline}"
        spread = "" if row.spread is None else f"{row.spread:.0%}"
        lines.append(
            f"| {row.case} | {row.subject} | {row.metric}, {row.unit} | {figure(row.median)} | {figure(row.p99)} | "
            f"{spread} | {row.runs} | {ratio} |"
        )
    return [*lines, ""]


def reasons(rows: Iterable[Row]) -> dict[str, list[str]]:
    """ "subject: why it was not measured" -> the cases that lack it."""
    found: dict[str, list[str]] = {}
    for row in rows:
        where = found.setdefault(f"{row.subject}: {row.note}", [])
        if (case := f"{row.benchmark} {row.case}") not in where:
            where.append(case)
    return found


def _reasons(rows: Iterable[Row]) -> list[str]:
    lines = [f"- Not measured: {reason} ({', '.join(where)})" for reason, where in reasons(rows).items()]
    return [*lines, ""] if lines else []


def _description(module: ModuleType) -> list[str]:
    return inspect.getdoc(module).splitlines()  # type: ignore[union-attr]


def machine() -> str:
    """The machine that this runs on, in a line."""
    models = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    return (
        f"dmh {__version__}, Python {platform.python_version()}, Linux {platform.release()}; {os.cpu_count()} "
        f"processors ({models[0] if models else platform.machine()}), {memory / 2**20:.0f} GiB of memory."
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()

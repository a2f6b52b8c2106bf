"""``dmh bench``: measurements of dmh beside the floor and beside what a user would use instead."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dmh.bench import apps, idle, latency, policies, random_access, remote, report, stream, threads
from dmh.bench.rows import Row, figure
from dmh.bench.subject import Options
from dmh.config import parse_size
from dmh.errors import DmhError

BENCHMARKS: dict[str, Callable[[Options, Callable[[str], None]], list[Row]]] = {
    "latency": latency.run,
    "stream": stream.run,
    "random": random_access.run_random,
    "zipf": random_access.run_zipf,
    "threads": threads.run,
    "apps": apps.run,
    "remote": remote.run,
    "idle": idle.run,
    "policies": policies.run,
}
MODULES = {name: sys.modules[run.__module__] for name, run in BENCHMARKS.items()}
WIDTH_OF_A_FILE = 160


def add_parser(commands: Any) -> None:
    """Declare ``dmh bench``."""
    parser = commands.add_parser(
        "bench",
        help="measure dmh beside the floor",
        description="Runs a benchmark: every subject in turn, again and again, every run's data verified.  "
        "Ratios are to the baseline of the same run.  `all` runs every one; `report` writes what they find to a "
        "Markdown page with plots.",
    )
    parser.add_argument("benchmark", choices=[*BENCHMARKS, "all", "report"])
    parser.add_argument("directory", nargs="?", type=Path, help="of the report (default bench-report)")
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each subject (default 5)")
    parser.add_argument(
        "--store", default="file", help="file (a temporary page file), memory, or a store URL (default file)"
    )
    parser.add_argument(
        "--page-size", type=parse_size, default=4096, metavar="SIZE", help="dmh's page size (default 4KiB)"
    )
    parser.add_argument(
        "--limit", type=parse_size, default=0, metavar="SIZE", help="local memory (default: the benchmark's own)"
    )
    parser.add_argument("--pin", action="store_true", help="everything on one CPU (default: unpinned)")
    parser.add_argument("--quick", action="store_true", help="small and short: shows that it works, measures nothing")
    parser.add_argument("--json", action="store_true", help="print a list of rows")
    parser.add_argument(
        "--from",
        dest="sources",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="report: do not measure, use what --json printed; several are shown side by side by their names",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0; data that does not verify is an error."""
    if args.benchmark != "report" and (args.sources or args.directory):
        raise DmhError("a directory and --from go with `dmh bench report`")
    if args.sources:
        sources = {path.stem: _read(path) for path in args.sources}
    else:
        names = BENCHMARKS if args.benchmark in ("all", "report") else [args.benchmark]
        sources = {"pinned" if args.pin else "default": measure(args, list(names))}
    rows = [row for part in sources.values() for row in part]
    if args.benchmark == "report":
        page = report.write(
            args.directory or Path("bench-report"), sources, MODULES, shlex.join(["dmh", *sys.argv[1:]])
        )
        print(page)
    elif args.json:
        json.dump([row.to_wire() for row in rows], sys.stdout, indent=1)
        print()
    else:
        show(rows)
    return 0


def measure(args: argparse.Namespace, names: list[str]) -> list[Row]:
    """Run these benchmarks."""
    if args.runs < 1:
        raise DmhError(f"--runs must be 1 or more, is {args.runs}")
    if args.pin:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    options = Options(
        runs=1 if args.quick else args.runs,
        page_size=args.page_size,
        limit=args.limit,
        store=args.store,
        quick=args.quick,
    )
    rows: list[Row] = []
    with Console(stderr=True).status("starting") as status:
        for name in names:
            rows += BENCHMARKS[name](options, status.update)
    return rows


def _read(path: Path) -> list[Row]:
    try:
        return [Row.from_wire(wire) for wire in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError) as error:
        raise DmhError(f"{path} is not what `dmh bench --json` prints: {error}") from error


def show(rows: list[Row]) -> None:
    """A table for people."""
    table = Table(box=None, padding=(0, 2))
    for heading in ("benchmark", "case", "subject", "metric"):
        table.add_column(heading)
    for heading in ("median", "p99", "spread", "runs"):
        table.add_column(heading, justify="right")
    table.add_column("ratio")
    for row in rows:
        if row.median is None or row.p99 is None:
            continue
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} x {row.baseline}"
        what = row.benchmark, row.case, row.subject, f"{row.metric}, {row.unit}"
        spread = "" if row.spread is None else f"{row.spread:.0%}"
        figures = figure(row.median), figure(row.p99), spread, str(row.runs)
        table.add_row(*what, *figures, ratio)
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDTH_OF_A_FILE  # a pipe has no width, and cells must not be cut
    console.print(table)
    for reason, where in report.reasons(row for row in rows if row.median is None).items():
        console.print(f"not measured: {reason} ({', '.join(where)})", highlight=False)

"""``dmh bench``: measurements of dmh beside the floor and beside what a user would use instead."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from dmh.bench import latency, random_access, stream, threads
from dmh.bench.rows import Row
from dmh.bench.subject import Options
from dmh.config import parse_size

BENCHMARKS: dict[str, Callable[[Options, Callable[[str], None]], list[Row]]] = {
    "latency": latency.run,
    "stream": stream.run,
    "random": random_access.run_random,
    "zipf": random_access.run_zipf,
    "threads": threads.run,
}


def add_parser(commands: Any) -> None:
    """Declare ``dmh bench``."""
    parser = commands.add_parser(
        "bench",
        help="measure dmh beside the floor",
        description="Runs a benchmark: every subject in turn, again and again, every run's data verified.  "
        "Ratios are to the baseline of the same run.",
    )
    parser.add_argument("benchmark", choices=[*BENCHMARKS, "all"])
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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0; data that does not verify is an error."""
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
    console = Console(stderr=True)
    with console.status("starting") as status:
        for name in BENCHMARKS if args.benchmark == "all" else [args.benchmark]:
            rows += BENCHMARKS[name](options, status.update)
    if args.json:
        json.dump([row.to_wire() for row in rows], sys.stdout, indent=1)
        print()
    else:
        show(rows)
    return 0


def show(rows: list[Row]) -> None:
    """A table for people."""
    table = Table(box=None, padding=(0, 2))
    reasons: dict[str, list[str]] = {}
    for heading in ("benchmark", "case", "subject", "metric"):
        table.add_column(heading)
    for heading in ("median", "p99", "spread", "runs"):
        table.add_column(heading, justify="right")
    table.add_column("ratio")
    for row in rows:
        what = row.benchmark, row.case, row.subject, f"{row.metric}, {row.unit}"
        if row.median is None or row.p99 is None:
            reasons.setdefault(f"{row.subject}: {row.note}", []).append(f"{row.benchmark} {row.case}")
            continue
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} x {row.baseline}"
        table.add_row(*what, f"{row.median:,.2f}", f"{row.p99:,.2f}", f"{row.spread:.0%}", str(row.runs), ratio)
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = 200  # a file or a pipe has no width; cells must not be cut
    console.print(table)
    for reason, where in reasons.items():
        console.print(f"not measured, {', '.join(dict.fromkeys(where))}: {reason}", highlight=False)

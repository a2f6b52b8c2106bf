"""``dmh stats``: the figures of a running service."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from dmh.observe.report import Snapshot, rows
from dmh.region.connection import service_stats


def add_parser(commands: Any) -> None:
    """Declare ``dmh stats``."""
    parser = commands.add_parser("stats", help="print the figures of a running service")
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="region.name of the service; not needed where only one runs"
    )
    parser.add_argument("--json", action="store_true", help="as JSON: every figure, for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0; a service that does not answer is an error."""
    wire = service_stats(args.name)
    if args.json:
        print(json.dumps(wire, indent=2))
    else:
        show(Snapshot.from_wire(wire))
    return 0


def show(snapshot: Snapshot) -> None:
    """A table for people."""
    table = RichTable(
        title=f"dmh {snapshot.name!r}, up {snapshot.seconds:,.0f} s", title_justify="left", box=None, padding=(0, 2)
    )
    for heading in ("", "", ""):
        table.add_column(heading)
    last = ""
    for group, what, figure in rows(snapshot):
        table.add_row(group if group != last else "", what, figure)
        last = group
    Console(soft_wrap=True).print(table)

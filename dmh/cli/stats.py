"""``dmh stats``: the figures of a running service."""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from typing import Any, NoReturn

from rich.console import Console
from rich.live import Live
from rich.table import Table as RichTable

from dmh.config import parse_duration
from dmh.observe.report import Snapshot, rates, rows
from dmh.region.connection import service_stats


def add_parser(commands: Any) -> None:
    """Declare ``dmh stats``."""
    parser = commands.add_parser("stats", help="print the figures of a running service")
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="region.name of the service; not needed where only one runs"
    )
    parser.add_argument("--json", action="store_true", help="as JSON: every figure, for programs")
    parser.add_argument(
        "--watch", type=_interval, nargs="?", const=1.0, metavar="TIME",
        help="again and again, with what changes a second, until Ctrl-C (default: every second)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def _interval(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace) -> int:
    """0; a service that does not answer is an error."""
    if args.watch:
        watch(args.name, args.watch, as_json=args.json)
    wire = service_stats(args.name)
    if args.json:
        print(json.dumps(wire, indent=2))
    else:
        console().print(table(Snapshot.from_wire(wire)))
    return 0


def console() -> Console:
    """Lines as long as they are, where nobody looks at a terminal."""
    return Console(soft_wrap=True)


def watch(name: str | None, interval: float, *, as_json: bool) -> NoReturn:
    """Figures every `interval` seconds, redrawn in place on a terminal; ends with Ctrl-C or the service."""
    before: Snapshot | None = None
    screen = console()
    with Live(console=screen, auto_refresh=False) if screen.is_terminal and not as_json else nullcontext() as live:
        while True:
            wire = service_stats(name)
            now = Snapshot.from_wire(wire)
            if as_json:
                print(json.dumps(wire), flush=True)
            elif live:
                live.update(table(now, before), refresh=True)
            else:
                screen.print(table(now, before))
            before = now
            time.sleep(interval)


def table(snapshot: Snapshot, before: Snapshot | None = None) -> RichTable:
    """Figures for people; with those of a moment before also what changed a second."""
    drawn = RichTable(
        title=f"dmh {snapshot.name!r}, up {snapshot.seconds:,.0f} s", title_justify="left", box=None, padding=(0, 2)
    )
    for heading in ("", "", "") if before is None else ("", "", "", "a second"):
        drawn.add_column(heading, justify="right" if heading else "left")
    last = ""
    changes = rates(snapshot, before) if before else {}
    for group, what, figure in rows(snapshot):
        change = [changes.get((what, figure.endswith(" MiB")), "")] if before else []
        drawn.add_row(group if group != last else "", what, figure, *change)
        last = group
    return drawn

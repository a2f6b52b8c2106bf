"""``dmh doctor``: what this machine allows, what it means, how to change it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dmh.config import load
from dmh.doctor import configuration, machine
from dmh.doctor.finding import Finding, Level

MARKS = {Level.OK: ("✓", "green"), Level.INFO: ("·", "dim"), Level.LESS: ("!", "yellow"), Level.BAD: ("✗", "bold red")}
NAME_WIDTH, VALUE_WIDTH = 30, 30
PLAIN_WIDTH = 132
"""Where nobody looks at a terminal: wide enough that few lines break."""


def add_parser(commands: Any) -> None:
    """Declare ``dmh doctor``."""
    parser = commands.add_parser(
        "doctor",
        help="say what this machine allows, and how to change it",
        description="Tries out what dmh needs of the kernel, of memory, of limits and of the store, and says of each "
        "what it means and how to change it.  Exit status 0 if dmh can run here (with -c: with this configuration), "
        "else 1.",
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="check this configuration against the machine, too")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE", help="override a setting"
    )
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 if dmh can run, 1 if not."""
    found = list(machine.findings())
    if args.config:
        found += configuration.findings(load(args.config, args.overrides), args.config)
    can_run = all(finding.level != Level.BAD for finding in found)
    if args.json:
        json.dump({"can_run": can_run, "findings": [asdict(finding) for finding in found]}, sys.stdout, indent=1)
        print()
    else:
        show(Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH), found)
    return 0 if can_run else 1


def show(console: Console, found: Sequence[Finding]) -> None:
    """The report for people."""
    for group, members in groupby(found, lambda finding: finding.group):
        console.print(Text(group, "bold"))
        table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
        table.add_column(width=1)
        table.add_column(width=NAME_WIDTH)
        table.add_column(width=VALUE_WIDTH, overflow="fold")
        table.add_column(ratio=1)
        for finding in members:
            mark, style = MARKS[finding.level]
            meaning = Text(finding.meaning)
            if finding.mend:
                meaning.append("\n→ ", style)
                meaning.append(finding.mend)
            table.add_row(Text(mark, style), Text(finding.name), Text(finding.value, "bold"), meaning)
        with console.capture() as drawn:
            console.print(Padding(table, (0, 0, 0, 1)))
        print("\n".join(line.rstrip() for line in drawn.get().splitlines()), end="\n\n")
    bad = [finding.name for finding in found if finding.level == Level.BAD]
    less = [finding.name for finding in found if finding.level == Level.LESS]
    if bad:
        console.print(Text(f"dmh cannot run here: {', '.join(bad)}", "bold red"))
    else:
        console.print(
            Text("dmh can run here" + (f"; with less than it could have: {', '.join(less)}" if less else ""), "green")
        )

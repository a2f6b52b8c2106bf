"""``dmh simulate``: eviction policies over a trace, before they are trusted with a program."""

from __future__ import annotations

import argparse
import functools
import json
import re
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from dmh.config import Config, load, loads
from dmh.errors import ConfigError
from dmh.evict.idle import choose_source
from dmh.evict.policies import policy_class, policy_names
from dmh.simulate.generators import GENERATORS
from dmh.simulate.live import Setting
from dmh.simulate.replay import Outcome
from dmh.simulate.study import SHARES, USES_MARKS, Run, as_markdown, study
from dmh.simulate.traces import subject

LIMITS = "10%,25%,50%,75%"
_SETTINGS = """
region: {name: simulated, size: 1GiB}
memory: {limit: 1GiB}
store: {url: "memory:"}
"""


def add_parser(commands: Any) -> None:
    """Declare ``dmh simulate``."""
    parser = commands.add_parser(
        "simulate",
        help="compare eviction policies on a recorded or generated trace",
        description="Compare eviction policies on a trace of page numbers, beside LRU (which sees every use) and OPT "
        "(which knows what comes). Cost: 103 us a hard fault, 33 us a soft one, 1 us a mark; a first use counts as a "
        "hard fault. A policy has all of the memory, one page at a time, and marks that are made at once. With --live, "
        "or where a configuration is named, it has what a service leaves it: thresholds, victim buffer, batches, the "
        "idle source and its budget as configured, while faults come as fast as a local store lets them. LRU and OPT "
        "have all of the memory always.",
        epilog="Generators: " + ", ".join(GENERATORS) + ".",
    )
    parser.add_argument(
        "traces",
        nargs="*",
        metavar="TRACE",
        help="a recording (dmh run --record), a .npy file of page numbers, or a generator",
    )
    parser.add_argument("--policy", metavar="A,B,...", default="auto,pgr,fifo", help="default: %(default)s")
    parser.add_argument(
        "--limit", metavar="N%,N,...",
        help="memory: percent of the pages that the trace uses, or pages; default: memory.limit of the file named with "
        f"-c, else {LIMITS}",
    )  # fmt: skip
    parser.add_argument("--marks", action="store_true", help="accessed marks tell which pages are in use")
    parser.add_argument("--live", action="store_true", help="as in a service with the default configuration")
    parser.add_argument("-c", "--config", metavar="FILE", help="as in a service with this configuration")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE",
        help="as in a service with this setting",
    )  # fmt: skip
    parser.add_argument("--pages", type=int, default=8192, help="of a generated trace; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="every figure, for programs")
    parser.add_argument(
        "--table", action="store_true",
        help="Markdown: these traces, or all generators, by every policy, without marks and with (docs/policies.md)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0; a trace or a policy that does not exist is an error."""
    problems: list[str] = []
    if not args.traces and not args.table:
        problems.append("name a trace: a .npy file, or one of " + ", ".join(GENERATORS))
    if args.pages < 64:
        problems.append(f"--pages: at least 64, is {args.pages}")
    live = bool(args.live or args.config or args.overrides)
    if live and args.table:
        problems.append("--table: is not of a service; leave --live, -c and --set out")
    if live and args.marks:
        problems.append("--marks: what tells of use in a service is evictor.idle: --set evictor.idle=unmap")
    limits = [_limit(text, problems) for text in (args.limit or LIMITS).split(",")]
    if problems:
        raise ConfigError(problems)
    subjects = (subject(source, args.pages, args.seed) for source in args.traces or GENERATORS)
    if args.table:
        everything = [(name, False) for name in policy_names() if name != "duel"]
        everything += [(name, True) for name, _ in everything if name in USES_MARKS]
        print(as_markdown(study(subjects, everything, SHARES, args.seed)))
        return 0
    names = args.policy.split(",")
    for name in names:
        policy_class(name)
    if args.config and not args.limit:
        config = load(args.config, args.overrides)
        limits = [config.memory.limit // config.region.page_size]
    service = functools.partial(_setting, args) if live else None
    runs = study(subjects, [(name, args.marks) for name in names], limits, args.seed, service)
    if args.json:
        print(json.dumps([_as_json(it) for it in runs], indent=2))
    else:
        show(runs)
    return 0


def _setting(args: argparse.Namespace, pages: int, limit: int, policy: str) -> Setting:
    """Of a service with the configuration that is named, for so many pages, so many of them in memory, and a policy."""

    def loaded(*sizes: str) -> Config:
        overrides = [*args.overrides, *sizes]
        return load(args.config, overrides) if args.config else loads(_SETTINGS, overrides, name="--set")

    page_size = loaded().region.page_size
    config = loaded(f"region.size={pages * page_size}", f"memory.limit={limit * page_size}")
    return Setting.of(config, choose_source(config.evictor.idle, page_size, policy))


def _limit(text: str, problems: list[str]) -> float:
    if (match := re.fullmatch(r"(\d+(?:\.\d+)?)%", text.strip())) and 0 < float(match[1]) < 100:
        return float(match[1]) / 100
    if text.strip().isdigit() and int(text) > 1:
        return float(text)
    problems.append(f"--limit: a percentage below 100 such as 25%, or a number of pages from 2, is {text!r}")
    return 0.5


def _as_json(it: Run) -> dict[str, Any]:
    def figures(outcome: Outcome) -> dict[str, Any]:
        return {
            "references": outcome.references, "hard": outcome.hard, "soft": outcome.soft, "marks": outcome.marks,
            "waits": outcome.waits, "cost_us": outcome.cost_us,
        }  # fmt: skip

    return {
        "trace": it.trace, "limit_pages": it.limit, "limit_share": it.share, "policy": it.policy, "accessed": it.marks,
        **figures(it.outcome), "lru": figures(it.lru), "opt": figures(it.optimal),
    }  # fmt: skip


def show(runs: list[Run]) -> None:
    """A table for people: one block a trace and memory size."""
    table = RichTable(box=None, padding=(0, 2))
    table.add_column("trace")
    for heading in ("memory", "policy", "hard / 1000", "soft / 1000", "marks / 1000", "cost / LRU"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")

    def add(first: Run, name: str, it: Outcome, begins: bool) -> None:
        table.add_row(
            first.trace if begins else "", f"{first.share:.0%}, {first.limit:,} pages" if begins else "", name,
            *(f"{it.per_thousand(n):.1f}" for n in (it.hard, it.soft, it.marks)),
            f"{it.cost_us / first.lru.cost_us:.3f}",
        )  # fmt: skip

    last = None
    for it in runs:
        if (it.trace, it.limit) != last:
            add(it, "OPT", it.optimal, True)
            add(it, "LRU", it.lru, False)
        last = it.trace, it.limit
        add(it, it.label, it.outcome, False)
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)

"""``dmh stress``: does dmh lose a byte, hang or leak here, while its workers and its store are killed?"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from dmh.cli import arguments
from dmh.cli.demo import page_file_directory
from dmh.cli.signals import terminable
from dmh.config import Config, Limits, about, load, loads
from dmh.errors import ConfigError
from dmh.machine.kernel import userfaultfd
from dmh.stress.plan import Plan
from dmh.stress.run import Run, memory_of, stress
from dmh.stress.server import Server
from dmh.stress.verdict import Verdict

LINE_SECONDS = 5.0
"""Between two lines, where there is no terminal to redraw."""
SIZE, LIMIT = 64 << 20, 4 << 20

_SETTINGS = """
region: {{name: "{name}"}}
workers: {{resolvers: 3}}
evictor: {{buffer: 0.1}}
"""


def add_parser(commands: Any) -> None:
    """Declare ``dmh stress``."""
    parser = commands.add_parser(
        "stress",
        help="stress dmh on this machine, kill its workers, and verify every byte",
        description="Several programs of several threads read, write, discard, flush, evict and pin pages of one "
        "region, every word of it next to a shadow in ordinary memory, while workers (and the store) are killed.  Says "
        "at the end whether one byte was wrong, anything hung, or anything was left over.  Exit status 0 if not, else "
        "1.",
    )
    parser.add_argument(
        "-c", "--config", metavar="FILE", help="the service's configuration (default: small, a page file)"
    )
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE", help="override a setting"
    )
    parser.add_argument(
        "--size", type=arguments.size, metavar="SIZE", help=f"of the region (default {about(SIZE)}; region.size)"
    )
    parser.add_argument("--limit", type=arguments.size, metavar="SIZE", help=f"memory.limit (default {about(LIMIT)})")
    parser.add_argument("--page-size", type=arguments.size, metavar="SIZE", help="region.page_size (default 4KiB)")
    parser.add_argument(
        "--store", metavar="STORE", help="file (a temporary page file), memory, redis (a server of its own), or a URL"
    )
    parser.add_argument(
        "--duration",
        type=arguments.duration,
        default=30.0,
        metavar="TIME",
        help="of the random work, as 90s or 10min (default 30s)",
    )
    parser.add_argument("--processes", type=_count, default=2, metavar="N", help="programs (default 2)")
    parser.add_argument("--threads", type=_count, default=2, metavar="N", help="threads of each (default 2)")
    parser.add_argument(
        "--kill-rate",
        type=_rate,
        default=0.0,
        metavar="R",
        help="SIGKILLs of workers a second, while half of them are up (default 0)",
    )
    parser.add_argument(
        "--kill-store", action="store_true", help="kill and pause the store's server now and then (with --store redis)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of all random numbers (default: another one each time)")
    parser.add_argument(
        "--hang",
        type=arguments.duration,
        default=60.0,
        metavar="TIME",
        help="without progress this long, it is a hang (default 60s)",
    )
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to 64, is {text!r}")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0 <= rate <= 100:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 100, is {text!r}")
    return rate


def run(args: argparse.Namespace) -> int:
    """0 if all was well, 1 if not."""
    own_server = args.store == "redis"
    if args.kill_store and not own_server:
        raise ConfigError(["--kill-store kills only a server that it has started itself: add --store redis"])
    with contextlib.ExitStack() as undo:
        undo.enter_context(terminable())
        server = undo.enter_context(Server()) if own_server else None
        directory = Path(
            undo.enter_context(tempfile.TemporaryDirectory(prefix="dmh-stress-", dir=page_file_directory(0)))
        )
        config = settings(
            args, server.url if server else _url(args.store or ("" if args.config else "file"), directory)
        )
        limits = Limits.of(config)
        plan = Plan(
            seconds=args.duration,
            processes=args.processes,
            threads=args.threads,
            kill_rate=args.kill_rate,
            kill_store=args.kill_store,
            seed=secrets.randbits(31) if args.seed is None else args.seed,
            patience=args.hang,
            page_size=config.region.page_size,
            pages=config.region.size // config.region.page_size,
            pin_pages=limits.resident_max // (8 * args.processes * args.threads),
            system_calls=userfaultfd().kernel_faults,
        )
        display = undo.enter_context(Display(config, plan, quiet=args.json))
        verdict = stress(config, plan, server, directory / "log", display.show)
        if any(path.name != "log" for path in directory.iterdir()):
            verdict.leaks.append(f"leak: the page file is still there ({', '.join(map(str, directory.iterdir()))})")
    if args.json:
        json.dump(verdict.to_wire(), sys.stdout, indent=1)
        print()
    else:
        display.close(verdict)
    return 1 if verdict.problems else 0


def _url(store: str, directory: Path) -> str:
    """store.url for --store; "" where the configuration file says it."""
    return {"memory": "memory:", "file": f"file://{directory}/pages"}.get(store, store)


def settings(args: argparse.Namespace, url: str) -> Config:
    """The service's settings: the file's or the command's own, and what the flags say instead."""
    flags = {"region.size": args.size, "region.page_size": args.page_size, "memory.limit": args.limit, "store.url": url}
    if not args.config:
        flags = {"region.size": SIZE, "memory.limit": LIMIT} | {key: value for key, value in flags.items() if value}
    overrides = [f"{key}={json.dumps(value)}" for key, value in flags.items() if value] + args.overrides
    if args.config:
        return load(args.config, overrides)
    return loads(_SETTINGS.format(name=f"stress-{os.getpid()}"), overrides, name="the command's own settings")


class Display:
    """What a person sees: one line that changes, or a line now and then, and the verdict."""

    def __init__(self, config: Config, plan: Plan, *, quiet: bool) -> None:
        self.console = Console(highlight=False, stderr=quiet)
        live = not quiet and sys.stdout.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
        self._live = Live(console=self.console, auto_refresh=False, transient=True) if live else None
        self._quiet, self._next = quiet, 0.0
        if not quiet:
            self.console.print(
                f"[bold]{plan.processes} programs of {plan.threads} threads on {about(config.region.size)} in "
                f"{about(config.memory.limit)}[/bold], pages of {about(plan.page_size)}, for {plan.seconds:g} s; "
                f"{plan.kill_rate:g} kills a second{', the store too' if plan.kill_store else ''}; seed {plan.seed}",
                soft_wrap=True,
            )

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, run: Run) -> None:
        """The state of the moment."""
        now = time.monotonic()
        if self._quiet or (not self._live and now < self._next):
            return
        self._next = now + LINE_SECONDS
        counters = run.look.table.counters()
        operations = sum(program.operations for program in run.programs)
        line = (
            f"{now - run.began:6.0f} s  {run.phase}  {operations:,} operations  {counters['faults']:,} faults  "
            f"{counters['evicted']:,} evicted  {counters['restarts']} restarts  {memory_of(run)} local"
        )
        if self._live:
            self._live.update(Text(line), refresh=True)
        else:
            self.console.print(line, soft_wrap=True)

    def close(self, verdict: Verdict) -> None:
        """The verdict."""
        if self._live:
            self._live.stop()
        for what, figure in rows(verdict):
            self.console.print(f"{what:<22}{figure}", soft_wrap=True)
        for line in verdict.log:
            self.console.print(Text(f"log: {line}", "dim"), soft_wrap=True)
        for problem in verdict.problems:
            self.console.print(Text(problem, "bold red"), soft_wrap=True)
        if not verdict.problems:
            self.console.print(Text("no byte was wrong, nothing hung, nothing is left over", "bold green"))


def rows(verdict: Verdict) -> list[tuple[str, str]]:
    """What was done, for people."""
    counters = verdict.counters
    asked = ", ".join(f"{count:,} {kind}" for kind, count in sorted(verdict.asked.items()))
    kills = ", ".join(f"{count} {role}" for role, count in sorted(verdict.kills.items()))
    return [
        (
            "operations",
            f"{verdict.operations:,} in {verdict.seconds:.1f} s; the longest took {verdict.longest_ms:,.0f} ms",
        ),
        ("requests", asked or "none"),
        (
            "faults",
            f"{counters.get('faults', 0):,}: {counters.get('zero', 0):,} new, {counters.get('soft', 0):,} soft, "
            f"{counters.get('hard', 0):,} hard; {counters.get('prefetched', 0):,} pages prefetched",
        ),
        (
            "evictions",
            f"{counters.get('evicted', 0):,}: {counters.get('written', 0):,} written, "
            f"{counters.get('clean', 0):,} clean, {counters.get('zeroed', 0):,} zeros",
        ),
        ("kills", f"{kills or 'none'}; {counters.get('restarts', 0):,} workers started again"),
        ("local memory", f"at most {about(verdict.highest)} of {about(verdict.limit)}"),
        ("verified at the end", f"{verdict.words:,} words, {about(verdict.words * 8)}"),
    ]

"""`dmh config`: check a configuration file, or print the schema of one.

Owns how settings are shown to a person.  Starts nothing and touches no store.  `dmh.cli.main` calls it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dmh.config import Config, Limits, about, config_schema, format_duration, format_size, load, without_password
from dmh.errors import ConfigError

if TYPE_CHECKING:
    # Generic in typeshed only; argparse gives this class no public name.
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Add the command `config` with its two actions."""
    parser = subparsers.add_parser("config", help="check a configuration file, or print the schema of one")
    actions = parser.add_subparsers(dest="action", required=True)
    check = actions.add_parser(
        "check", help="report every problem of a file (status 2), or show what its settings come to (status 0)"
    )
    check.add_argument("file", metavar="FILE", help="YAML configuration")
    check.add_argument(
        "--set",
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        help="use VALUE in place of the file's; repeatable",
    )
    actions.add_parser("schema", help="print the JSON schema of a configuration file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out the parsed command.

    Returns:
        The exit status: 0, or 2 when the configuration has problems (one a line on standard error).
    """
    if args.action == "schema":
        print(json.dumps(config_schema(), indent=2))
        return 0
    try:
        config = load(args.file, args.overrides)
    except ConfigError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return 2
    for setting, value, meaning in _rows(config):
        print(f"{setting:<24}{value:<24}{meaning}".rstrip())
    print(f"{args.file}: OK")
    return 0


def _rows(config: Config) -> Iterator[tuple[str, str, str]]:
    """(setting, value as one would write it, what it comes to) for every setting, in the file's order."""
    limits = Limits.of(config)
    page_size = config.region.page_size

    def pages(count: int) -> str:
        return f"{count:,} pages = {about(count * page_size)}"

    meanings = {
        "region.size": pages(config.region.size // page_size),
        "memory.limit": f"{pages(limits.limit)}, {limits.resident_max:,} of them for resident pages",
        "memory.high": f"{pages(limits.high)}: eviction starts",
        "memory.low": f"{pages(limits.low)}: eviction stops",
        "evictor.buffer": f"{pages(limits.buffer)} on their way to the store",
        "evictor.batch": f"{limits.batch:,} pages at a time",
        "prefetch.window": f"{pages(limits.window)} ahead at most",
    }
    sizes = {"region.size", "region.page_size", "memory.limit", "record.max_size"}
    durations = {"store.timeout", "service.grace", "service.grace_launcher"}
    for section_name, section in config:
        for key, value in section:
            setting = f"{section_name}.{key}"
            if setting in sizes:
                text = format_size(value)
            elif setting in durations:
                text = format_duration(value)
            elif setting == "store.url":
                text = without_password(value)
            elif isinstance(value, bool):
                text = str(value).lower()
            elif isinstance(value, tuple):
                text = str(list(value))
            else:
                text = str(value) or "none"
            yield setting, text, meanings.get(setting, "")

"""The ``dmh`` command: one module a subcommand, errors on one line each, an exit status that means something.

0    done
1    it went wrong while it ran
2    the command line or the configuration cannot be used
125  `dmh run`: the service could not be started (126, 127: the program could not be; else the program's own status)
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from dmh import __version__
from dmh.cli import bench, config, demo, doctor, run, serve, simulate, stats, stress
from dmh.errors import ConfigError, DmhError


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="dmh",
        description="More memory than the machine has: NumPy arrays paged by userfaultfd to a store of your choice.",
    )
    top.add_argument("--version", action="version", version=f"dmh {__version__}")
    top.add_argument("-v", "--verbose", action="store_true", help="log what the service does, not only what goes wrong")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (run, serve, stats, demo, bench, doctor, stress, config, simulate):
        module.add_parser(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    args = parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING,
        format="dmh: %(levelname)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        status: int = args.run(args)
    except ConfigError as error:
        for problem in error.problems:
            print(f"dmh: {problem}", file=sys.stderr)
        return 2
    except DmhError as error:
        print(f"dmh: {error}", file=sys.stderr)
        return 125 if args.command == "run" else 1
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())

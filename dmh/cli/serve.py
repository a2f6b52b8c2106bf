"""``dmh serve``: a service for several programs, until it is told to stop."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

from dmh.config import format_size, load
from dmh.observe.trace import record_override
from dmh.region.connection import stop_service
from dmh.service.launcher import Launcher


def add_parser(commands: Any) -> None:
    """Declare ``dmh serve``."""
    parser = commands.add_parser(
        "serve",
        help="keep a service for several programs",
        description="Starts the service that FILE describes and keeps it until Ctrl-C, SIGTERM, or "
        "`dmh serve --stop NAME`.  Programs join with dmh.attach(NAME), or with DMH_SOCKET set to the path printed.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("-c", "--config", metavar="FILE", help="the service's configuration")
    which.add_argument(
        "--adopt", metavar="NAME", help="take over a running service whose launcher has died; its programs go on"
    )
    which.add_argument("--stop", metavar="NAME", help="stop a running service instead")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE", help="override a setting"
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="record what comes in to FILE, for dmh simulate (record.file)"
    )
    parser.add_argument("--stats", type=Path, metavar="FILE", help="write the final counters to FILE as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 after an orderly end."""
    if args.stop:
        stop_service(args.stop)
        return 0
    overrides = [*args.overrides, *record_override(args.record)]
    with Launcher.adopt(args.adopt) if args.adopt else Launcher(load(args.config, overrides)) as launcher:
        if not args.adopt:
            launcher.start()
        config = launcher.config
        _stop_on_signals(launcher)
        print(
            f"dmh: serving {launcher.name!r}: {format_size(config.region.size)} in pages of "
            f"{format_size(config.region.page_size)}, "
            f"{format_size(config.memory.limit)} of it local\n"
            f"dmh: programs join with DMH_SOCKET={launcher.socket_path}",
            flush=True,
        )
        launcher.run()
        if args.stats:
            launcher.write_stats(args.stats)
        return 1 if launcher.failure else 0


def _stop_on_signals(launcher: Launcher) -> None:
    """SIGTERM stops at once; Ctrl-C asks once more while programs are attached, because they end with their pages."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writing)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    warned = False

    def received() -> None:
        nonlocal warned
        numbers = os.read(reading, 64)
        if set(numbers) == {signal.SIGINT} and launcher.clients.attached and not warned:
            warned = True
            print(
                f"dmh: {launcher.clients.attached} programs use this service and would be ended with it; "
                "once more to stop all the same",
                flush=True,
            )
            return
        launcher.stop(lambda: None)

    launcher.watch(reading, received)

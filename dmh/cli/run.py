"""``dmh run``: a service around one program.

Owns the program's process: its environment, its signals, its exit status.  The service is
`dmh.service.launcher`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from dmh.config import load
from dmh.native import lib
from dmh.observe.trace import record_override
from dmh.service.launcher import Launcher
from dmh.service.paths import SOCKET_VARIABLE

NOT_EXECUTABLE, NOT_FOUND = 126, 127

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_SI_KERNEL = 0x80


def add_parser(commands: Any) -> None:
    """Declare ``dmh run``."""
    parser = commands.add_parser(
        "run",
        help="start a service, run a program in it, stop the service",
        description="Starts the service that FILE describes, runs PROGRAM with DMH_SOCKET set (dmh.attach() joins by "
        "it), passes its exit status and signals through, and stops everything it started.",
    )
    parser.add_argument("-c", "--config", required=True, metavar="FILE", help="the service's configuration")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE", help="override a setting"
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="record what comes in to FILE, for dmh simulate (record.file)"
    )
    parser.add_argument("--stats", type=Path, metavar="FILE", help="write the final counters to FILE as JSON")
    parser.add_argument("program", nargs=argparse.REMAINDER, metavar="-- PROGRAM ARGS", help="what to run")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The program's exit status; a program that a signal ended takes this process with it by the same signal."""
    command = args.program[1:] if args.program[:1] == ["--"] else args.program
    if not command:
        print("dmh run: name a program after --, as in: dmh run -c FILE -- python script.py", file=sys.stderr)
        return 2
    config = load(args.config, [*args.overrides, *record_override(args.record)])
    if shutil.which(command[0]) is None:
        exists = Path(command[0]).exists()
        print(f"dmh run: {command[0]}: {'not executable' if exists else 'no such program'}", file=sys.stderr)
        return NOT_EXECUTABLE if exists else NOT_FOUND
    with Launcher(config) as launcher:
        launcher.start()
        with _Signals() as signals:
            try:
                child = subprocess.Popen(
                    command,
                    env=os.environ | {SOCKET_VARIABLE: str(launcher.socket_path)},
                    preexec_fn=signals.prepare_child,  # the one thread besides only waits for signals
                )
            except OSError as error:
                print(f"dmh run: {command[0]}: {error.strerror}", file=sys.stderr)
                return NOT_EXECUTABLE
            signals.child = child
            _stop_when_over(launcher, child)
            launcher.run()
            if launcher.failure and child.poll() is None:
                _end(child)
        if args.stats:
            launcher.write_stats(args.stats)
    status = child.wait()
    if status < 0:
        _die_by(signal.Signals(-status))
    return status


def _stop_when_over(launcher: Launcher, child: subprocess.Popen[bytes]) -> None:
    """The service ends when the program has ended and no process that it left behind has the region mapped."""
    pidfd = os.pidfd_open(child.pid)

    def check() -> None:
        if child.poll() is not None and not launcher.clients.attached:
            launcher.stop(lambda: None)

    def ended() -> None:
        launcher.unwatch(pidfd)
        os.close(pidfd)
        child.wait()
        launcher.on_detach = check
        check()

    launcher.watch(pidfd, ended)


def _end(child: subprocess.Popen[bytes]) -> None:
    """The service has failed under the program: it cannot go on."""
    child.terminate()
    try:
        child.wait(2)
    except subprocess.TimeoutExpired:
        child.kill()


def _die_by(number: signal.Signals) -> None:
    """End as the program did, so that whoever started dmh sees what he would have seen without it."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)


class _Signals:
    """Signals for the program that arrive here.

    They are blocked and read by a thread, because only `sigwaitinfo` tells where one came from: what the terminal
    sends (Ctrl-C) has reached the program as well, what `kill` sends to this process has not and is passed on.
    """

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self._over = False

    def __enter__(self) -> _Signals:
        self._old = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        self._thread = threading.Thread(target=self._pass_on, name="signals", daemon=True)
        self._thread.start()
        return self

    def prepare_child(self) -> None:
        """In the child, before the program starts: signals as dmh found them, and no life after dmh's."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._old)
        lib.dmh_die_with_parent()

    def _pass_on(self) -> None:
        while not self._over:
            received = signal.sigtimedwait(FORWARDED, 0.5)
            if received is None or received.si_code == _SI_KERNEL:
                continue
            if self.child is not None and self.child.poll() is None:
                self.child.send_signal(received.si_signo)

    def __exit__(self, *exc: object) -> None:
        self._over = True

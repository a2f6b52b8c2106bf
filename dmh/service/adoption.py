"""A launcher that takes over: workers that lost theirs are found, what they hold is collected, who died is replaced.

Owns the meeting with the orphaned workers (`dmh.service.orphan` is their end).  What is made of it is the launcher's.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from dmh.config import Config
from dmh.errors import ProtocolError, ServiceError
from dmh.lspt.table import Table
from dmh.service.channel import Channel
from dmh.service.ledger import started
from dmh.service.paths import adoption_socket
from dmh.service.pool import WorkerProcess
from dmh.service.worker import Setup

MEET_SECONDS = 10.0
"""Workers look for a launcher many times a second; one that has not come by then is stuck, and the service with it."""


class AdoptedProcess:
    """A process that is not a child: its end can be awaited, how it ended cannot be known."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._pidfd = os.pidfd_open(pid)

    def wait(self, timeout: float | None = None) -> int:
        """As `subprocess.Popen.wait`; the status is that of a kill, which is what it most likely was."""
        if self.returncode is None:
            if not select.select([self._pidfd], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("worker", timeout or 0.0)
            os.close(self._pidfd)
            self.returncode = -signal.SIGKILL
        return self.returncode


@dataclass(slots=True)
class Estate:
    """What a dead launcher left.

    Attributes:
        setup: as it was given to the workers.
        config: that it was started with.
        descriptors: of one worker; all have the same.
        views: view -> userfaultfd, of the programs that any worker knows.
        workers: those that live.
        missing: numbers of those that do not.
    """

    setup: Setup
    config: Config
    descriptors: list[int]
    views: dict[int, int] = field(default_factory=dict)
    workers: list[WorkerProcess] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)


def meet(directory: Path, name: str) -> Estate:
    """Wait for the orphaned workers of a service, whose lock the caller holds.

    Raises:
        ServiceError: none is left, or one that lives does not come.
    """
    path = adoption_socket(directory)
    path.unlink(missing_ok=True)
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as server:
        server.bind(str(path))
        try:
            server.listen(80)
            return _collect(server, name)
        finally:
            path.unlink(missing_ok=True)


def _collect(server: socket.socket, name: str) -> Estate:
    estate: Estate | None = None
    table: Table | None = None
    deadline = time.monotonic() + MEET_SECONDS
    try:
        while True:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                waited = f"in {MEET_SECONDS:.0f} s"
                if estate is None:
                    raise ServiceError(
                        f"nothing of the service {name!r} is left to take over: no worker came {waited}"
                    ) from None
                raise ServiceError(f"a worker of {name!r} lives but did not come {waited}: is it stopped?") from None
            estate = _receive(Channel(connection), estate)
            table = table or Table(estate.descriptors[1])
            if waited_for(table, estate) == set():
                return estate
    finally:
        if table:
            table.close()


def waited_for(table: Table, estate: Estate) -> set[int]:
    """Numbers of workers that live and have not come; those that are dead are noted as missing."""
    come = {worker.number for worker in estate.workers}
    others = set(range(table.workers)) - come
    estate.missing = sorted(n for n in others if not (table.raw.pids[n] and started(int(table.raw.pids[n]))))
    return others - set(estate.missing)


def _receive(channel: Channel, estate: Estate | None) -> Estate:
    pid, uid = channel.peer()
    if uid != os.getuid():
        raise ServiceError(f"process {pid} of user {uid} offered itself as a worker")
    received = channel.receive()
    if received is None:
        raise ServiceError(f"worker process {pid} ended while it was taken over")
    offer, descriptors = received
    setup = Setup(**offer["setup"])
    if estate is None:
        estate = Estate(setup, Config.from_wire(setup.config), descriptors)
    else:
        for fd in descriptors:
            os.close(fd)
    for _ in range(offer["views"]):
        if (view := channel.receive()) is None or len(view[1]) != 1:
            raise ProtocolError(f"worker process {pid} did not hand over every view")
        if estate.views.setdefault(view[0]["view"], view[1][0]) != view[1][0]:
            os.close(view[1][0])
    estate.workers.append(WorkerProcess(offer["role"], offer["number"], AdoptedProcess(pid), channel, ready=True))
    return estate

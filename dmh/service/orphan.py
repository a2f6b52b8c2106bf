"""A worker's life without a launcher: it goes on serving, and offers itself to a launcher that takes over.

Owns the waiting (in the worker's control thread; its main thread resolves faults meanwhile) and what a worker hands
over: its setup, every descriptor, every program's view.  The other end is `dmh.service.adoption`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dmh.errors import ServiceError
from dmh.native import lib
from dmh.service.channel import Channel
from dmh.service.paths import adoption_socket

if TYPE_CHECKING:
    from dmh.service.worker import Worker

LOOK_SECONDS = 0.05
ALONE_SECONDS = 1.0
"""So long after the last program has ended nobody will ask for a page any more."""


def wait_for_launcher(worker: Worker) -> Channel | None:
    """A channel to a launcher that has taken over; None where the programs are gone and it is time to end.

    A service that had no program when its launcher died waits for ``service.grace``: nobody is hurt by its end.
    """
    worker.log.warning(
        "the launcher is gone; going on without it (`dmh serve --adopt %s` takes over)", worker.setup.name
    )
    path = adoption_socket(Path(worker.setup.directory))
    patience = ALONE_SECONDS if worker.programs else worker.setup.grace
    last_seen = time.monotonic()
    while time.monotonic() - last_seen < patience:
        if path.exists():
            with contextlib.suppress(ServiceError, OSError):
                return _offer(worker, path)
        if any(not lib.dmh_view_is_gone(uffd, base) for _, base, uffd in list(worker.programs.values())):
            last_seen = time.monotonic()
        time.sleep(LOOK_SECONDS)
    return None


def _offer(worker: Worker, path: Path) -> Channel:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(str(path))
        channel = Channel(sock)
        offer = {"op": "worker", "role": worker.kind, "number": worker.setup.number, "pid": os.getpid()}
        channel.send(offer | {"setup": asdict(worker.setup), "views": len(worker.programs)}, worker.descriptors)
        for view, (pid, base, uffd) in worker.programs.items():
            channel.send({"op": "view", "view": view, "pid": pid, "base": base}, [uffd])
    except BaseException:
        sock.close()
        raise
    return channel

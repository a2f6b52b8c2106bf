"""The thread that watches over a program's connection to its service: the Python end of dmh_guardian.c.

Owns the thread's handle.  Does not speak on the connection (`dmh.region.connection`).  The thread itself is C, because
every Python thread of the program may be frozen in a page fault.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmh.native import check, ffi, lib
from dmh.service.channel import Channel, Message

LOOK_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a program goes on, in seconds, when something of its service is gone.

    Attributes:
        service: when nothing of it is left.
        launcher: when its workers live and no launcher takes over.
    """

    service: float
    launcher: float


class Guardian:
    """Ends this process, with a message, when its service is gone for good; joins a launcher that takes over."""

    def __init__(self, channel: Channel, socket_path: Path, name: str, patience: Patience) -> None:
        directory = os.fsencode(socket_path.parent)
        service, launcher = (min(int(seconds * 1000), 2**31 - 1) for seconds in (patience.service, patience.launcher))
        handle = lib.dmh_guardian_start(channel.fileno(), directory, name.encode(), service, launcher)
        self._handle: int | None = check(handle, "starting the guardian thread")
        self._seen: Any = ffi.new("uint32_t *")

    def resume_with(self, message: Message) -> None:
        """What a launcher that has taken over is told, so that it knows this program again."""
        assert self._handle is not None
        check(lib.dmh_guardian_resume(self._handle, json.dumps(message).encode()), "preparing to meet another launcher")

    def rejoin(self) -> Channel | None:
        """After the connection has ended: wait for a launcher that takes over.  None: there will be none."""
        while self._handle is not None:
            fd = lib.dmh_guardian_rejoined(self._handle, self._seen)
            if fd >= 0:
                return Channel(socket.socket(fileno=fd))
            if lib.dmh_guardian_state(self._handle) == lib.DMH_DESERTED:
                return None
            time.sleep(LOOK_SECONDS)
        return None

    def stop(self) -> None:
        """The service may go now: this process has let go of the region."""
        handle, self._handle = self._handle, None
        if handle is not None:
            lib.dmh_guardian_stop(handle)

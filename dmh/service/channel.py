"""Control messages: one JSON object a packet, descriptors beside it, over a Unix SOCK_SEQPACKET socket.

Owns framing and its limits; knows nothing of what the messages mean.  Used between launcher and workers, and between
launcher and applications.  Faults do not come this way (`dmh.wire`).
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

from dmh.errors import ProtocolError, ServiceError

MAX_BYTES = 65536
MAX_DESCRIPTORS = 32

Message = dict[str, Any]


class Channel:
    """One end of a control connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    def fileno(self) -> int:
        """For selectors."""
        return self.socket.fileno()

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send one message.  ServiceError where the other end is gone."""
        packet = json.dumps(message, separators=(",", ":")).encode()
        if len(packet) > MAX_BYTES:
            raise ProtocolError(f"a control message of {len(packet)} bytes is over the limit of {MAX_BYTES}")
        try:
            socket.send_fds(self.socket, [packet], list(descriptors))
        except OSError as error:
            raise ServiceError(f"the other end of a control connection is gone ({error.strerror})") from error

    def receive(self) -> tuple[Message, list[int]] | None:
        """The next message and its descriptors (the caller's from now on); None when the other end has closed."""
        try:
            packet, descriptors, flags, _ = socket.recv_fds(
                self.socket, MAX_BYTES + 1, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionError:
            return None
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ProtocolError("a control message is larger than the limit")
            if not packet:
                close_all(descriptors)
                return None
            message = json.loads(packet)
            if not isinstance(message, dict):
                raise ProtocolError("a control message is not a JSON object")
        except (ValueError, RecursionError) as error:
            close_all(descriptors)
            raise ProtocolError(f"a control message is not JSON: {error}") from error
        except ProtocolError:
            close_all(descriptors)
            raise
        return message, list(descriptors)

    def request(self, message: Message, descriptors: Sequence[int] = ()) -> tuple[Message, list[int]]:
        """Send a message and wait for its answer; an answer that carries an error is raised as ServiceError."""
        self.send(message, descriptors)
        answer = self.receive()
        if answer is None:
            raise ServiceError("the service ended before it answered")
        return answer

    def peer(self) -> tuple[int, int]:
        """(process id, user id) of the other end, as the kernel vouches for them."""
        pid, uid, _ = struct.unpack("3i", self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return pid, uid

    def close(self) -> None:
        """Close this end."""
        self.socket.close()


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors that turned out not to be wanted."""
    for fd in descriptors:
        os.close(fd)


def pair() -> tuple[Channel, socket.socket]:
    """A channel, and the socket for the other end to be inherited by a child."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(ours), theirs

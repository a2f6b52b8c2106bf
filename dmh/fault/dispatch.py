"""From the monitor to the resolvers: the ZeroMQ ends of both.

Owns the sockets.  Does not look at pages, and claims nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import zmq

from dmh import wire


def resolver_address(directory: str | Path, number: int) -> str:
    """Where resolver `number` listens.  The directory's mode 0700 is what keeps strangers out."""
    return f"ipc://{directory}/resolver-{number}.sock"


RECONNECT_MS = 5
"""How often to look for a resolver that does not listen yet: faults wait for it (ZeroMQ's default is 100 ms)."""


class Dispatcher:
    """The monitor's sockets to the resolvers.

    Which resolver gets a request is decided where the shared counts of work are (`dmh_hand_over`).  A resolver that
    is awake finds it in its lane in shared memory; ZeroMQ wakes one that sleeps, which costs two more threads' wake-
    ups on the way.
    """

    def __init__(self, directory: str, resolvers: int) -> None:
        self._context = zmq.Context(io_threads=1)
        self._sockets = []
        for number in range(1, resolvers + 1):
            socket = self._context.socket(zmq.PUSH)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
            socket.connect(resolver_address(directory, number))
            self._sockets.append(socket)

    def deliver(self, request: Any) -> None:
        """Send what `dmh_hand_over` did not deliver: ``request.resolver`` is its answer."""
        number = request.resolver
        if number < 0:
            # The request is in the lane, but the resolver may have fallen asleep beside it.
            self._sockets[-number - 1].send(wire.pack(wire.Kind.FAULT, []))
            return
        record = wire.Request(request.page, request.stride, request.window, request.view, request.thread, request.ns)
        kind = wire.Kind.FAULT if request.demand else wire.Kind.PREFETCH
        self._sockets[number - 1].send(wire.pack(kind, [record]))

    def close(self) -> None:
        """Drop the connections; what was not delivered is not needed."""
        for socket in self._sockets:
            socket.close()
        self._context.term()


LOOK_UP_MS = 1000
"""A sleeping resolver looks up so often: its socket may be gone before the frame that tells it to stop comes."""


class Inbox:
    """The resolver's end."""

    def __init__(self, directory: str, number: int) -> None:
        self._address = resolver_address(directory, number)
        self._context = zmq.Context(io_threads=1)
        self._socket: Any = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, LOOK_UP_MS)
        # The directory keeps strangers out; should somebody open it, the kernel still says who connects.
        self._socket.setsockopt(zmq.IPC_FILTER_UID, os.getuid())
        self._socket.bind(self._address)

    def receive(self) -> bytes | None:
        """The next frame; None when there was none for a while: is it to stop?"""
        try:
            frame: bytes = self._socket.recv()
        except zmq.Again:
            return None
        return frame

    def interrupt(self) -> None:
        """From another thread: make `receive` return a STOP frame."""
        with self._context.socket(zmq.PUSH) as socket:
            socket.setsockopt(zmq.LINGER, 1000)
            socket.connect(self._address)
            socket.send(wire.pack(wire.Kind.STOP, []))

    def close(self) -> None:
        """Unbind."""
        self._socket.close()
        self._context.term()

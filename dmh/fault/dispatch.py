"""The monitor's half of a fault: which resolver gets it, with which window ahead.

Owns the sockets to the resolvers.  Does not look at pages (the native receive loop has) and claims nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import zmq

from dmh import wire
from dmh.lspt.table import Table
from dmh.prefetch.streams import Streams


def resolver_address(directory: str | Path, number: int) -> str:
    """Where resolver `number` listens.  The directory's mode 0700 is what keeps strangers out."""
    return f"ipc://{directory}/resolver-{number}.sock"


class Dispatcher:
    """Sends each fault to one resolver.

    The load of a resolver is what was sent to it less what it has completed; both counts stand in shared memory, so that no
    message has to come back.
    """

    def __init__(self, table: Table, directory: str, resolvers: int, streams: Streams) -> None:
        self._table = table
        self._streams = streams
        self._context = zmq.Context(io_threads=1)
        self._sockets = []
        for number in range(1, resolvers + 1):
            socket = self._context.socket(zmq.PUSH)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.connect(resolver_address(directory, number))
            self._sockets.append(socket)

    def fault(self, page: int, view: int, thread: int, received_ns: int) -> None:
        """One fault goes to the resolver with the least to do."""
        stride, window = self._streams.observe(thread, page)
        self._send(wire.Kind.FAULT, wire.Request(page, stride, window, view, thread, received_ns))

    def prefetch(self, first: int, count: int, view: int) -> None:
        """Ask for pages first .. first + count - 1, spread over the resolvers in windows."""
        step = max(self._streams.limit, 1)
        for page in range(first, first + count, step):
            self._send(wire.Kind.PREFETCH, wire.Request(page, 1, min(step, first + count - page), view, 0, 0))

    def _send(self, kind: wire.Kind, request: wire.Request) -> None:
        sent, done = self._table.raw.dispatched, self._table.raw.completed
        best = 1
        if len(self._sockets) > 1:
            # The lowest number wins a tie: the same resolver stays warm and the others stay asleep.
            best = min(range(1, len(self._sockets) + 1), key=lambda n: sent[n] - done[n])
        sent[best] += 1
        self._sockets[best - 1].send(wire.pack(kind, [request]), copy=True)

    def close(self) -> None:
        """Drop the connections; what was not delivered is not needed."""
        for socket in self._sockets:
            socket.close()
        self._context.term()


class Inbox:
    """The resolver's end: yields the requests of every well-formed frame until told to stop."""

    def __init__(self, directory: str, number: int) -> None:
        self._address = resolver_address(directory, number)
        self._context = zmq.Context(io_threads=1)
        self._socket: Any = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(self._address)

    def receive(self) -> bytes:
        """The next frame; waits."""
        frame: bytes = self._socket.recv()
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

"""What programs ask of a service, over its control socket.

Owns the connections and what each of them holds (its view, its allocations, its pins), and gives all of it back when
the program goes. Does not own the workers (`dmh.service.pool`).  Runs in the launcher's one thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dmh.errors import DmhError, ProtocolError, RegionError, ServiceError
from dmh.service.channel import Channel, Message, close_all
from dmh.service.pool import View

if TYPE_CHECKING:
    from dmh.service.launcher import Launcher

log = logging.getLogger("dmh")

PROTOCOL = 1


@dataclass(slots=True)
class Client:
    """One connection."""

    channel: Channel
    pid: int
    greeted: bool = False
    view: int = 0
    base: int = 0
    uffd: int = -1
    pidfd: int = -1
    owner: bool = False
    blocks: dict[int, int] = field(default_factory=dict)
    pins: list[tuple[int, int]] = field(default_factory=list)


class Clients:
    """Every connection, and the operations they may ask for."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self.all: list[Client] = []
        self._next_view = 1
        self._waiting_for_room: list[tuple[Client, Message]] = []
        self._being_freed = 0
        self._operations: dict[str, Callable[[Client, Message, list[int]], Message | None]] = {
            "hello": self._hello,
            "register": self._register,
            "detach": self._detach,
            "allocate": self._allocate,
            "free": self._free,
            "take": self._take,
            "prefetch": self._prefetch,
            "discard": self._forward,
            "evict": self._forward,
            "flush": self._forward,
            "pin": self._pin,
            "unpin": self._unpin,
            "stats": self._stats,
            "stop": self._stop,
        }

    @property
    def attached(self) -> int:
        """How many programs have the region mapped."""
        return sum(1 for client in self.all if client.view)

    def views(self) -> list[View]:
        """What a worker that is started again has to know of the programs."""
        return [(_view(client), client.uffd) for client in self.all if client.view]

    def pinned(self) -> list[tuple[int, int]]:
        """Every pin that is in force: (first page, count), as often as it was asked for."""
        return [pin for client in self.all for pin in client.pins]

    def accept(self, channel: Channel) -> Client | None:
        """A new connection; None where it is refused."""
        pid, uid = channel.peer()
        if uid not in (os.getuid(), 0):
            log.warning("refused a connection of process %d of user %d", pid, uid)
            channel.close()
            return None
        client = Client(channel, pid)
        self.all.append(client)
        return client

    def read(self, client: Client) -> bool:
        """Handle one packet; False when the program has closed its end or must be cut off."""
        try:
            received = client.channel.receive()
        except ProtocolError as error:
            log.warning("process %d was cut off: %s", client.pid, error)
            return False
        if received is None:
            return False
        message, descriptors = received
        try:
            operation = self._operations.get(str(message.get("op")))
            if operation is None or not (client.greeted or message["op"] in ("hello", "stats", "stop")):
                close_all(descriptors)
                raise ProtocolError(f"unknown or untimely operation {message.get('op')!r}")
            answer = operation(client, message, descriptors)
        except DmhError as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        except (KeyError, TypeError, ValueError) as error:
            answer = {"error": f"malformed request: {error!r}", "kind": "ProtocolError"}
        if answer is not None:
            self.reply(client, answer)
        return True

    def reply(self, client: Client, answer: Message, descriptors: list[int] | None = None) -> None:
        """Answer a client, if it is still there."""
        with contextlib.suppress(ServiceError):
            client.channel.send(answer, descriptors or [])

    # ---- operations: each returns its answer, or None where the answer comes later or none is expected

    def _hello(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        if message.get("version") != PROTOCOL:
            raise ProtocolError(
                f"the service speaks version {PROTOCOL} of the control protocol, this program version "
                f"{message.get('version')}: use one "
                "version of dmh on both sides"
            )
        client.greeted = True
        client.owner = bool(message.get("owner"))
        self.reply(client, self._launcher.describe(), [self._launcher.region_fd])
        return None

    def _register(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        (uffd,) = descriptors
        if client.view:
            close_all(descriptors)
            raise ProtocolError("this connection has a mapping already")
        if self.attached >= self._launcher.most_programs:
            close_all(descriptors)
            raise ServiceError(
                f"{self.attached} programs use this service, and it has descriptors for no more: start it with a "
                "larger `ulimit -n`"
            )
        client.view, client.base, client.uffd = self._next_view, int(message["base"]), uffd
        self._next_view += 1
        # Answered when every worker knows the view: until then nobody would resolve its faults.
        self._launcher.pool.tell_all(
            _view(client),
            lambda replies: self.reply(client, next((r for r in replies if "error" in r), {"view": client.view})),
            [uffd],
        )
        return None

    def _detach(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        self._give_up(client, lambda: self.reply(client, {}))
        return None

    def _allocate(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        try:
            first = self._launcher.extents.allocate(int(message["count"]))
        except RegionError:
            if self._being_freed:
                self._waiting_for_room.append((client, message))
                return None
            raise
        client.blocks[first] = int(message["count"])
        return {"first": first}

    def _take(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        self._launcher.extents.take(int(message["first"]), int(message["count"]))
        return {}

    def _free(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        count = client.blocks.pop(int(message["first"]), None)
        if count is not None:
            self._release(int(message["first"]), count)
        return None

    def _release(self, first: int, count: int) -> None:
        """Pages go back to the pool only when their content is gone: the next owner must find zeros."""
        self._being_freed += 1

        def done(reply: Message) -> None:
            self._being_freed -= 1
            if "error" in reply:
                log.error("pages %d..%d are not given back: %s", first, first + count - 1, reply["error"])
            else:
                self._launcher.extents.release(first, count)
            waiting, self._waiting_for_room = self._waiting_for_room, []
            for client, message in waiting:
                try:
                    answer = self._allocate(client, message, [])
                except RegionError as error:
                    answer = {"error": str(error), "kind": "RegionError"}
                if answer is not None:
                    self.reply(client, answer)

        self._launcher.pool.tell(
            self._launcher.pool.by_role("evictor"), {"op": "discard", "first": first, "count": count}, done
        )

    def _range(self, message: Message) -> Message:
        first, count = int(message["first"]), int(message["count"])
        if first < 0 or count < 1 or first + count > self._launcher.extents.pages:
            raise RegionError(f"pages {first} to {first + count - 1} are not all within the region")
        return {"op": message["op"], "first": first, "count": count}

    def _forward(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        evictor = self._launcher.pool.by_role("evictor")
        self._launcher.pool.tell(evictor, self._range(message), lambda reply: self.reply(client, _outcome(reply)))
        return None

    def _prefetch(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        monitor = self._launcher.pool.by_role("monitor")
        self._launcher.pool.tell(monitor, self._range(message) | {"view": client.view}, lambda reply: None)
        return {}

    def _pin(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        wanted = self._range(message)

        def done(reply: Message) -> None:
            if "error" not in reply:
                client.pins.append((wanted["first"], wanted["count"]))
            self.reply(client, _outcome(reply))

        self._launcher.pool.tell(self._launcher.pool.by_role("evictor"), wanted, done)
        return None

    def _unpin(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        wanted = self._range(message)
        if (wanted["first"], wanted["count"]) not in client.pins:
            raise RegionError("these pages were not pinned by this program")
        client.pins.remove((wanted["first"], wanted["count"]))
        return self._forward(client, message, descriptors)

    def _stats(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        self._launcher.stats(lambda stats: self.reply(client, {"stats": stats}))
        return None

    def _stop(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        self._launcher.stop(lambda: self.reply(client, {}))
        return None

    # ---- the end of a client

    def drop(self, client: Client) -> None:
        """The connection is gone: so is everything it held."""
        if client not in self.all:
            return
        self.all.remove(client)
        self._waiting_for_room = [w for w in self._waiting_for_room if w[0] is not client]
        self._give_up(client, lambda: None)
        client.channel.close()
        if client.owner:
            self._launcher.stop(lambda: None)

    def _give_up(self, client: Client, then: Callable[[], None]) -> None:
        evictor = self._launcher.pool.by_role("evictor")
        for first, count in client.pins:
            self._launcher.pool.tell(evictor, {"op": "unpin", "first": first, "count": count}, lambda reply: None)
        client.pins.clear()
        for first, count in _merged(client.blocks):
            self._release(first, count)
        client.blocks.clear()
        if not client.view:
            then()
            return
        view, client.view = client.view, 0

        def removed(replies: list[Message]) -> None:
            # The launcher's is the last descriptor to go: while any is open, a thread that still faults freezes, and
            # reads no zeros.
            os.close(client.uffd)
            then()

        self._launcher.pool.tell_all({"op": "view-remove", "view": view}, removed)


def _view(client: Client) -> Message:
    return {"op": "view-add", "view": client.view, "base": client.base, "pid": client.pid}


def _merged(blocks: dict[int, int]) -> list[tuple[int, int]]:
    """Runs of pages, neighbours joined: a program with many small arrays gives them back in few requests."""
    runs: list[tuple[int, int]] = []
    for first, count in sorted(blocks.items()):
        if runs and sum(runs[-1]) == first:
            runs[-1] = (runs[-1][0], runs[-1][1] + count)
        else:
            runs.append((first, count))
    return runs


def _outcome(reply: Message) -> Message:
    return {"error": reply["error"], "kind": "RegionError"} if "error" in reply else {}

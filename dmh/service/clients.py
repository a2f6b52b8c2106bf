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
from dmh.native import lib
from dmh.service.channel import Channel, Message, close_all
from dmh.service.ledger import State, started
from dmh.service.pool import View, pins_in_force

if TYPE_CHECKING:
    from dmh.service.launcher import Launcher

log = logging.getLogger("dmh")

PROTOCOL = 1


@dataclass(slots=True)
class Client:
    """One program, or one connection of something else (`dmh stats`).

    Attributes:
        channel: its connection; None while it has none, after this launcher took over from another.
        pid: its process.
        view: the number of its mapping, 0 without one; `uffd` and `base` are that mapping's.
        owner: the service ends with it.
        blocks: first page -> pages, of the arrays that it holds.
        pins: (first page, pages), as often as they were pinned.
    """

    channel: Channel | None
    pid: int
    greeted: bool = False
    view: int = 0
    uffd: int = -1
    base: int = 0
    pidfd: int = -1
    owner: bool = False
    blocks: dict[int, int] = field(default_factory=dict)
    pins: list[tuple[int, int]] = field(default_factory=list)


class Clients:
    """Every connection, and the operations they may ask for."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self.all: list[Client] = []
        self.refused = 0
        self._next_view = 1
        self._waiting_for_room: list[tuple[Client, Message]] = []
        self._being_freed = 0
        self._operations: dict[str, Callable[[Client, Message, list[int]], Message | None]] = {
            "hello": self._hello,
            "resume": self._resume,
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

    # ---- after another launcher

    def restore(self, state: State, views: dict[int, int]) -> list[int]:
        """Know again the programs of a launcher that died.  `views`: what its workers know, view -> userfaultfd.

        Returns views that no program is known for: it had detached, and not every worker had heard of it.
        """
        self._next_view = state.views + 1
        for program in list(state.programs.values()):
            uffd = views.pop(program.view, -1)
            if uffd < 0:  # it was just registering, and nobody had told it that it was
                self._launcher.ledger.note("detach", view=program.view)
                continue
            self.all.append(
                Client(None, program.pid, view=program.view, base=program.base, uffd=uffd, owner=program.owner,
                       blocks=dict(program.blocks), pins=list(program.pins))
            )  # fmt: skip
        runs = [run for program in state.programs.values() for run in program.blocks.items()]
        for first, count in [*runs, *state.taken, *state.freeing.items()]:
            self._launcher.extents.take(first, count)
        for uffd in views.values():
            os.close(uffd)
        return list(views)

    def settle(self, strangers: list[int]) -> None:
        """Tell the workers what the dead launcher may not have told all of them."""
        pool = self._launcher.pool
        for view in strangers:
            pool.tell_all({"op": "view-remove", "view": view}, lambda replies: None)
        for message, uffd in self.views():
            pool.tell_all(message, lambda replies: None, [uffd])
        for message in pins_in_force(self.pinned()):
            pool.tell(pool.by_role("evictor"), message, lambda reply: None)
        pool.tell(pool.by_role("monitor"), {"op": "forget-dispatched"}, lambda reply: None)
        for first, count in list(self._launcher.ledger.state.freeing.items()):
            self._release(0, first, count)
        for client in list(self.all):
            program = self._launcher.ledger.state.programs[client.view]
            if started(program.pid) != program.started:
                self.drop(client)
        self._launcher.watch_programs()

    def accept(self, channel: Channel) -> Client | None:
        """A new connection; None where it is refused."""
        pid, uid = channel.peer()
        if uid not in (os.getuid(), 0):
            log.warning("refused a connection of process %d of user %d", pid, uid)
            self.refused += 1
            channel.close()
            return None
        client = Client(channel, pid)
        self.all.append(client)
        return client

    def read(self, client: Client) -> bool:
        """Handle one packet; False when the program has closed its end or must be cut off."""
        assert client.channel is not None
        try:
            received = client.channel.receive()
        except ProtocolError as error:
            log.warning("process %d was cut off: %s", client.pid, error)
            self.refused += 1
            return False
        if received is None:
            return False
        message, descriptors = received
        try:
            answer = self._carry_out(client, message, descriptors)
        except ProtocolError as error:
            self.refused += 1
            answer = {"error": str(error), "kind": "ProtocolError"}
        except DmhError as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            self.refused += 1
            answer = {"error": f"malformed request: {error!r}", "kind": "ProtocolError"}
        finally:
            close_all(descriptors)
        if answer is not None:
            self.reply(client, answer)
        return True

    def _carry_out(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        """An operation takes the descriptors that it keeps out of the list."""
        name = str(message.get("op"))
        operation = self._operations.get(name)
        if operation is None or not (client.greeted or name in ("hello", "resume", "stats", "stop")):
            raise ProtocolError(f"unknown or untimely operation {name!r}")
        if len(descriptors) != (name == "register"):
            raise ProtocolError(f"{name} came with {len(descriptors)} descriptors")
        return operation(client, message, descriptors)

    def reply(self, client: Client, answer: Message, descriptors: list[int] | None = None) -> None:
        """Answer a client, if it is still there."""
        if client.channel is not None:
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

    def _resume(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        """A program of the launcher before this one: what is known of it goes over to its new connection."""
        if message.get("version") != PROTOCOL or message.get("service") != self._launcher.id:
            raise ProtocolError("this is another service than the one that the program was attached to")
        view = int(message["view"])
        known = next((c for c in self.all if c.channel is None and c.view == view and c.pid == client.pid), None)
        if known is None or client.greeted:
            raise ProtocolError(f"no program with the mapping {view} in process {client.pid} is waited for")
        self.all.remove(known)
        self._launcher.forget_process(known)
        client.greeted, client.owner = True, known.owner
        client.view, client.uffd, client.base = known.view, known.uffd, known.base
        client.blocks, client.pins = known.blocks, known.pins
        return {"view": view}

    def _register(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        if client.view:
            raise ProtocolError("this connection has a mapping already")
        if self.attached >= self._launcher.most_programs:
            raise ServiceError(
                f"{self.attached} programs use this service, and it has descriptors for no more: start it with a "
                "larger `ulimit -n`"
            )
        base = int(message["base"])
        check_userfaultfd(descriptors[0], base, self._launcher.config.region.size)
        client.view, client.uffd, client.base = self._next_view, descriptors.pop(), base
        self._next_view += 1
        fields = {"pid": client.pid, "started": started(client.pid), "base": base, "owner": client.owner}
        self._launcher.ledger.note("register", view=client.view, **fields)
        # Answered when every worker knows the view: until then nobody would resolve its faults.
        self._launcher.pool.tell_all(
            _view(client),
            lambda replies: self.reply(client, next((r for r in replies if "error" in r), {"view": client.view})),
            [client.uffd],
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
        self._launcher.ledger.note("allocate", view=client.view, first=first, count=client.blocks[first])
        return {"first": first}

    def _take(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        self._launcher.extents.take(int(message["first"]), int(message["count"]))
        self._launcher.ledger.note("take", first=int(message["first"]), count=int(message["count"]))
        return {}

    def _free(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        count = client.blocks.pop(int(message["first"]), None)
        if count is not None:
            self._release(client.view, int(message["first"]), count)
        return None

    def _release(self, view: int, first: int, count: int) -> None:
        """Pages go back to the pool only when their content is gone: the next owner must find zeros."""
        self._being_freed += 1
        self._launcher.ledger.note("freeing", view=view, first=first, count=count)

        def done(reply: Message) -> None:
            self._being_freed -= 1
            if "error" in reply:
                log.error("pages %d..%d are not given back: %s", first, first + count - 1, reply["error"])
            else:
                self._launcher.extents.release(first, count)
                self._launcher.ledger.note("freed", first=first, count=count)
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
                self._launcher.ledger.note("pin", view=client.view, first=wanted["first"], count=wanted["count"])
            self.reply(client, _outcome(reply))

        self._launcher.pool.tell(self._launcher.pool.by_role("evictor"), wanted, done)
        return None

    def _unpin(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        wanted = self._range(message)
        if (wanted["first"], wanted["count"]) not in client.pins:
            raise RegionError("these pages were not pinned by this program")
        client.pins.remove((wanted["first"], wanted["count"]))
        self._launcher.ledger.note("unpin", view=client.view, first=wanted["first"], count=wanted["count"])
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
        if client.channel is not None:
            client.channel.close()
        if client.owner:
            self._launcher.stop(lambda: None)

    def close(self) -> None:
        """The service ends, and its workers have: hang up, and let go of every userfaultfd."""
        for client in self.all:
            if client.channel is not None:
                client.channel.close()
            if client.view:
                os.close(client.uffd)
        self.all.clear()

    def _give_up(self, client: Client, then: Callable[[], None]) -> None:
        evictor = self._launcher.pool.by_role("evictor")
        for first, count in client.pins:
            self._launcher.pool.tell(evictor, {"op": "unpin", "first": first, "count": count}, lambda reply: None)
        client.pins.clear()
        for first, count in _merged(client.blocks):
            self._release(client.view, first, count)
        client.blocks.clear()
        if not client.view:
            then()
            return
        view, client.view = client.view, 0
        self._launcher.ledger.note("detach", view=view)

        def removed(replies: list[Message]) -> None:
            # The launcher's is the last descriptor to go: while any is open, a thread that still faults freezes, and
            # reads no zeros.
            os.close(client.uffd)
            then()

        self._launcher.pool.tell_all({"op": "view-remove", "view": view}, removed)


def _view(client: Client) -> Message:
    return {"op": "view-add", "view": client.view, "base": client.base, "pid": client.pid}


def check_userfaultfd(fd: int, base: int, size: int) -> None:
    """Refuse what would make workers stumble: another kind of descriptor, or a range that no mapping can have."""
    if os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[userfaultfd]":
        raise ProtocolError("the descriptor of a mapping is not a userfaultfd")
    if not 0 < base < 1 << 63 or lib.dmh_uffd_wake(fd, base, size) < 0:
        raise ProtocolError(f"no mapping can lie at {base:#x}, or its userfaultfd is not set up")
    os.set_blocking(fd, False)  # or the monitor would find it ready for ever


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

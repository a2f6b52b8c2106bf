"""What programs ask of a service, over its control socket.

Owns the connections, the programs' views and pins, and the order in which all that a program had goes back when it
ends.  Does not own the rules for pages (`dmh.service.holdings`), children that have not spoken yet
(`dmh.service.children`), nor the workers (`dmh.service.pool`).  Runs in the launcher's one thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING

from dmh.errors import DmhError, ProtocolError, RegionError, ServiceError
from dmh.lspt.states import Advice
from dmh.native import lib
from dmh.service.channel import Channel, Message, close_all
from dmh.service.children import Children
from dmh.service.client import PROTOCOL, Client, Operation, outcome
from dmh.service.holdings import Holdings
from dmh.service.ledger import State, started
from dmh.service.pool import View, pins_in_force
from dmh.service.writers import Writers

if TYPE_CHECKING:
    from dmh.service.launcher import Launcher

log = logging.getLogger("dmh")


class Clients:
    """Every connection, and the operations they may ask for."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self.all: list[Client] = []
        self.refused = 0
        self._next_view = 1
        self.holdings = Holdings(launcher, self)
        self.children = Children(launcher, self)
        self.writers = Writers(launcher, self)
        self._operations: dict[str, Operation] = self.holdings.operations | {
            "hello": self._hello,
            "resume": self._resume,
            "register": self._register,
            "detach": self._detach,
            "prefetch": self._prefetch,
            "advise": self._advise,
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

    def look_after(self) -> float | None:
        """Ask after those that do not speak; returns in how many seconds to do so again, None: there are none."""
        pauses = [self.children.look_after(), self.writers.look_after()]
        return min((pause for pause in pauses if pause is not None), default=None)

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
        self.holdings.loans = dict(state.loans)
        for program in list(state.programs.values()):
            uffd = views.pop(program.view, -1)
            if uffd < 0:  # it was just registering, and nobody had told it that it was
                self._launcher.ledger.note("detach", view=program.view)
                continue
            self.all.append(
                Client(None, program.pid, view=program.view, base=program.base, uffd=uffd, owner=program.owner,
                       follows=program.follows, writes=program.writes, blocks=deepcopy(program.blocks),
                       pins=list(program.pins))
            )  # fmt: skip
        runs = [(first, held[0]) for program in state.programs.values() for first, held in program.blocks.items()]
        for first, count in [*runs, *state.taken, *state.freeing.items()]:
            self._launcher.extents.take(first, count)
        for uffd in views.values():
            os.close(uffd)
        self.writers.restore()
        return list(views)

    def settle(self, strangers: list[int]) -> None:
        """Tell the workers what the dead launcher may not have told all of them."""
        pool = self._launcher.pool
        for view in strangers:
            pool.tell_all({"op": "view-remove", "view": view}, lambda replies: None)
        for client in self.all:
            self.add_view(client, lambda problem: None)
        for message in pins_in_force(self.pinned()):
            pool.tell(pool.by_role("evictor"), message, lambda reply: None)
        pool.tell(pool.by_role("monitor"), {"op": "forget-dispatched"}, lambda reply: None)
        for first, count in list(self._launcher.ledger.state.freeing.items()):
            self.holdings.release(0, first, count)
        for client in list(self.all):
            program = self._launcher.ledger.state.programs[client.view]
            if program.pid and started(program.pid) != program.started:
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
        channel.socket.setblocking(False)  # who does not read his answers loses them, and holds nobody up
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

    # ---- operations (`dmh.service.client.Operation`)

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
        """A program that was known before it had this connection: one of the launcher before this one, by its view, or
        a forked child, by where its mapping lies.  The child is given its userfaultfd: as long as it has one of its
        own, absent pages cannot become zeros there.
        """
        if message.get("version") != PROTOCOL or message.get("service") != self._launcher.id:
            raise ProtocolError("this is another service than the one that the program was attached to")
        child = "base" in message
        key = int(message["base" if child else "view"])
        for known in self.all:
            waited_for = known.channel is None and not known.leaving and known.pid == client.pid
            if waited_for and key == (known.base if child else known.view):
                break
        else:
            raise ProtocolError(f"no such program in process {client.pid} is waited for")
        if client.greeted:
            raise ProtocolError("this connection is another program's already")
        self.all.remove(known)
        self._launcher.forget_process(known)
        client.greeted, client.owner, client.follows, client.writes = True, known.owner, known.follows, known.writes
        client.view, client.uffd, client.base = known.view, known.uffd, known.base
        client.blocks, client.pins = known.blocks, known.pins
        self.reply(client, {"view": client.view}, [client.uffd] if child else [])
        return None

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
        client.uffd, client.base, client.follows = descriptors.pop(), base, bool(message.get("follows"))
        client.writes = bool(message.get("writes", True))
        self.enter(client)
        # Answered when every worker knows the view: until then nobody would resolve its faults.
        self.add_view(client, lambda problem: self.reply(client, problem or {"view": client.view}))
        return None

    def enter(self, client: Client, parent: int = 0) -> None:
        """Give a mapping its number, and write it down."""
        client.view = self._next_view
        self._next_view += 1
        self.writers.update()  # before any worker knows of it: the evictor's answer says that it has acted on this
        process = {"pid": client.pid, "started": started(client.pid)}
        fields = {"base": client.base, "owner": client.owner, "follows": client.follows, "parent": parent}
        fields["writes"] = client.writes
        self._launcher.ledger.note("register", view=client.view, **process, **fields)

    def add_view(self, client: Client, then: Callable[[Message | None], None]) -> None:
        """Make a mapping known to the workers; the monitor comes last.

        It reads the mapping's messages: if it knew the view before a resolver does, it could drop one because that
        resolver has the page in hand, and the resolver would wake everybody but this view.
        """
        pool, message = self._launcher.pool, _view(client)
        monitor = pool.by_role("monitor")
        replies: list[Message] = []

        def one(reply: Message) -> None:
            replies.append(reply)
            if len(replies) == len(pool.workers) - 1:
                pool.tell(monitor, message, one, [client.uffd])
            elif len(replies) == len(pool.workers):
                then(next((r for r in replies if "error" in r), None))

        for worker in pool.workers:
            if worker is not monitor:
                pool.tell(worker, message, one, [client.uffd])

    def _detach(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        client.taken_down = not message.get("stays")
        self.holdings.after_births(client, lambda: self._give_up(client, lambda: self.reply(client, {})))
        return None

    def _range(self, message: Message) -> Message:
        first, count = int(message["first"]), int(message["count"])
        if first < 0 or count < 1 or first + count > self._launcher.extents.pages:
            raise RegionError(f"pages {first} to {first + count - 1} are not all within the region")
        return {"op": message["op"], "first": first, "count": count}

    def _forward(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        evictor = self._launcher.pool.by_role("evictor")
        self._launcher.pool.tell(evictor, self._range(message), lambda reply: self.reply(client, outcome(reply)))
        return None

    def _prefetch(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        monitor = self._launcher.pool.by_role("monitor")
        self._launcher.pool.tell(monitor, self._range(message) | {"view": client.view}, lambda reply: None)
        return {}

    def _advise(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        pages = self._range(message)
        first, count = pages["first"], pages["count"]
        if message["advice"] == "dontneed":
            evictor = self._launcher.pool.by_role("evictor")
            self._launcher.pool.tell(evictor, pages | {"op": "evict"}, lambda reply: None)
        else:
            self._launcher.table.advice[first : first + count] = Advice[str(message["advice"]).upper()]
        return {}

    def _pin(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        wanted = self._range(message)

        def done(reply: Message) -> None:
            if "error" not in reply and not client.view:  # it has gone meanwhile, and what it held was given back
                evictor = self._launcher.pool.by_role("evictor")
                self._launcher.pool.tell(evictor, wanted | {"op": "unpin"}, lambda reply: None)
            elif "error" not in reply:
                client.pins.append((wanted["first"], wanted["count"]))
                self._launcher.ledger.note("pin", view=client.view, first=wanted["first"], count=wanted["count"])
            self.reply(client, outcome(reply))

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
        """The connection or the process is gone: so is everything it held."""
        if client.leaving:
            return
        client.leaving = True
        self.holdings.leaves(client)
        if client.channel is not None:
            client.channel.close()
        if client.owner:
            self._launcher.stop(lambda: None)
        self.holdings.after_births(client, lambda: self._remove(client))

    def _remove(self, client: Client) -> None:
        self.all.remove(client)
        self._give_up(client, lambda: None)
        self.holdings.answer_waiting()
        self._launcher.on_detach()

    def close(self) -> None:
        """The service ends, and its workers have: hang up, and let go of every userfaultfd."""
        for client in self.all:
            if client.channel is not None:
                client.channel.close()
            if client.view:
                os.close(client.uffd)
        self.all.clear()
        self.writers.close()

    def _give_up(self, client: Client, then: Callable[[], None]) -> None:
        evictor = self._launcher.pool.by_role("evictor")
        for first, count in client.pins:
            self._launcher.pool.tell(evictor, {"op": "unpin", "first": first, "count": count}, lambda reply: None)
        client.pins.clear()
        self.holdings.give_back(client)
        if not client.view:
            then()
            return
        self.writers.leaves(client)
        view, client.view = client.view, 0
        self._launcher.ledger.note("detach", view=view)
        self.writers.update()

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

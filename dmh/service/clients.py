"""What programs ask of a service, over its control socket.

Owns the connections and what each of them holds (its view, its allocations, its pins), and gives all of it back when
the program goes. Does not own the workers (`dmh.service.pool`).  Runs in the launcher's one thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from copy import deepcopy
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
LOOK_SECONDS = 0.1
"""How often to look whether children that do not speak are still there."""


@dataclass(slots=True)
class Client:
    """One program, or one connection of something else (`dmh stats`).

    Attributes:
        channel: its connection; None while it has none: a forked child that does not speak, or a program that has not
            found this launcher yet, which took over from another.
        pid: its process; 0 for a child that is not known by name.
        view: the number of its mapping, 0 without one; `uffd` and `base` are that mapping's.
        follows: its forks are announced.
        owner: the service ends with it.
        leaving: it has ended, and what it held is given back as soon as its last children are known.
        blocks: first page -> [pages, how often it holds them], of its arrays.
        pins: (first page, pages), as often as they were pinned.
    """

    channel: Channel | None
    pid: int
    greeted: bool = False
    view: int = 0
    uffd: int = -1
    base: int = 0
    pidfd: int = -1
    follows: bool = False
    owner: bool = False
    leaving: bool = False
    blocks: dict[int, list[int]] = field(default_factory=dict)
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
        self._freed: list[tuple[Client, int]] = []
        self._asking_for_births = False
        self._loans: dict[int, tuple[int, int]] = {}  # loan -> first page, the lender's view; 0: it has been taken
        self._operations: dict[str, Callable[[Client, Message, list[int]], Message | None]] = {
            "hello": self._hello,
            "resume": self._resume,
            "register": self._register,
            "detach": self._detach,
            "allocate": self._allocate,
            "free": self._free,
            "lend": self._lend,
            "take-loan": self._take_loan,
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
        self._loans = dict(state.loans)
        for program in list(state.programs.values()):
            uffd = views.pop(program.view, -1)
            if uffd < 0:  # it was just registering, and nobody had told it that it was
                self._launcher.ledger.note("detach", view=program.view)
                continue
            self.all.append(
                Client(None, program.pid, view=program.view, base=program.base, uffd=uffd, owner=program.owner,
                       follows=program.follows, blocks=deepcopy(program.blocks), pins=list(program.pins))
            )  # fmt: skip
        runs = [(first, held[0]) for program in state.programs.values() for first, held in program.blocks.items()]
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
        client.greeted, client.owner, client.follows = True, known.owner, known.follows
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
        self._enter(client)
        # Answered when every worker knows the view: until then nobody would resolve its faults.
        self._add_view(client, lambda problem: self.reply(client, problem or {"view": client.view}))
        return None

    def _enter(self, client: Client, parent: int = 0) -> None:
        """Give a mapping its number, and write it down."""
        client.view = self._next_view
        self._next_view += 1
        process = {"pid": client.pid, "started": started(client.pid)}
        fields = {"base": client.base, "owner": client.owner, "follows": client.follows, "parent": parent}
        self._launcher.ledger.note("register", view=client.view, **process, **fields)

    def _add_view(self, client: Client, then: Callable[[Message | None], None]) -> None:
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
        self._after_births(client, lambda: self._give_up(client, lambda: self.reply(client, {})))
        return None

    def _allocate(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        count = int(message["count"])
        try:
            first = self._launcher.extents.allocate(count)
        except RegionError:
            self.look_after_children()
            if self._being_freed or self._freed or self._asking_for_births:
                self._waiting_for_room.append((client, message))
                return None
            raise
        client.blocks[first] = [count, 1]
        self._launcher.ledger.note("allocate", view=client.view, first=first, count=count)
        return {"first": first}

    def _take(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        self._launcher.extents.take(int(message["first"]), int(message["count"]))
        self._launcher.ledger.note("take", first=int(message["first"]), count=int(message["count"]))
        return {}

    def _free(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        first = int(message["first"])
        if not client.follows:
            self._let_go(client, first)
            return None
        # A child that was forked before this was said may not be known yet, and holds the array as well.
        self._freed.append((client, first))
        if not self._asking_for_births:
            self._ask_for_births()
        return None

    def _ask_for_births(self) -> None:
        freed, self._freed = self._freed, []
        self._asking_for_births = True

        def told(reply: Message) -> None:
            self._asking_for_births = False
            for client, first in freed:
                self._let_go(client, first)
            if self._freed:
                self._ask_for_births()
            else:
                self._answer_waiting()

        self._launcher.pool.tell(self._launcher.pool.by_role("monitor"), {"op": "births"}, told)

    def _after_births(self, client: Client, then: Callable[[], None]) -> None:
        """Go on when every child that this program has forked is known."""
        if client.follows:
            self._launcher.pool.tell(self._launcher.pool.by_role("monitor"), {"op": "births"}, lambda reply: then())
        else:
            then()

    def _let_go(self, client: Client, first: int) -> None:
        """One hold less on an array; its pages go back with the last one of the last program."""
        held = client.blocks.get(first)
        if held is None:
            return
        held[1] -= 1
        if held[1]:
            self._launcher.ledger.note("let-go", view=client.view, first=first)
            return
        del client.blocks[first]
        if any(first in other.blocks for other in self.all):
            self._launcher.ledger.note("let-go", view=client.view, first=first)
        else:
            self._release(client.view, first, held[0])

    def _lend(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        """One hold more on an array, for whoever asks for the loan that is answered."""
        first = int(message["first"])
        if first not in client.blocks:
            raise RegionError("an array that this program does not hold cannot be lent")
        loan = self._launcher.ledger.state.loan + 1
        client.blocks[first][1] += 1
        self._loans[loan] = first, client.view
        self._launcher.ledger.note("lend", view=client.view, first=first, loan=loan)
        return {"loan": loan}

    def _take_loan(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        """The hold goes over to this program; who comes later gets one of his own, as long as anybody has one."""
        loan = int(message["loan"])
        if loan not in self._loans:
            raise RegionError(
                "this array is gone: whoever sent it has ended, or it was received before and nobody has kept it"
            )
        first, lender = self._loans[loan]
        holder = next(other for other in self.all if first in other.blocks)
        count = holder.blocks[first][0]
        client.blocks.setdefault(first, [count, 0])[1] += 1
        self._loans[loan] = first, 0
        self._launcher.ledger.note("take-loan", view=client.view, first=first, count=count, loan=loan)
        if lent := next((other for other in self.all if lender and other.view == lender), None):
            self._let_go(lent, first)
        return {"first": first, "count": count}

    def _release(self, view: int, first: int, count: int) -> None:
        """Pages go back to the pool only when their content is gone: the next owner must find zeros."""
        self._being_freed += 1
        self._loans = {loan: lent for loan, lent in self._loans.items() if not first <= lent[0] < first + count}
        self._launcher.ledger.note("freeing", view=view, first=first, count=count)

        def done(reply: Message) -> None:
            self._being_freed -= 1
            if "error" in reply:
                log.error("pages %d..%d are not given back: %s", first, first + count - 1, reply["error"])
            else:
                self._launcher.extents.release(first, count)
                self._launcher.ledger.note("freed", first=first, count=count)
            self._answer_waiting()

        self._launcher.pool.tell(
            self._launcher.pool.by_role("evictor"), {"op": "discard", "first": first, "count": count}, done
        )

    def _answer_waiting(self) -> None:
        waiting, self._waiting_for_room = self._waiting_for_room, []
        for client, message in waiting:
            try:
                answer = self._allocate(client, message, [])
            except RegionError as error:
                answer = {"error": str(error), "kind": "RegionError"}
            if answer is not None:
                self.reply(client, answer)

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
            if "error" not in reply and not client.view:  # it has gone meanwhile, and what it held was given back
                evictor = self._launcher.pool.by_role("evictor")
                self._launcher.pool.tell(evictor, wanted | {"op": "unpin"}, lambda reply: None)
            elif "error" not in reply:
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

    # ---- forked children

    def born(self, message: Message, descriptors: list[int]) -> None:
        """What the monitor has read of a birth: first the child's userfaultfd, then, when the child touches its birth
        page, which process it is.
        """
        parent = next((client for client in self.all if client.view == message["view"]), None)
        if not descriptors:
            if parent is not None and not parent.pid:
                parent.pid = int(message["pid"])
                self._launcher.ledger.note("process", view=parent.view, pid=parent.pid, started=started(parent.pid))
                self._launcher.watch_process(parent)
            if parent is not None:
                lib.dmh_birth_answer(parent.uffd, parent.base, self._size, False)
            return
        child = Client(None, 0, uffd=descriptors.pop(), base=int(message["base"]), follows=True)
        if parent is not None:
            child.blocks = deepcopy(parent.blocks)
        full = self.attached >= self._launcher.most_programs
        self.all.append(child)
        self._enter(child, message["view"])

        def known(problem: Message | None) -> None:
            if problem:
                log.error("a forked child cannot use the region, and is ended: %s", problem["error"])
                lib.dmh_birth_answer(child.uffd, child.base, self._size, True)

        if full:
            known({"error": "this service has descriptors for no more programs: start it with a larger `ulimit -n`"})
        else:
            self._add_view(child, known)

    def look_after_children(self) -> float | None:
        """Give back what forked children held that have ended or become other programs, which nobody announces.
        Returns in how many seconds to look again; None: there are none.
        """
        children = [client for client in self.all if client.channel is None and client.follows and not client.leaving]
        for child in children:
            if lib.dmh_view_is_gone(child.uffd, child.base):
                self._launcher.drop(child)
        return LOOK_SECONDS if children else None

    @property
    def _size(self) -> int:
        return self._launcher.config.region.size

    # ---- the end of a client

    def drop(self, client: Client) -> None:
        """The connection or the process is gone: so is everything it held."""
        if client.leaving:
            return
        client.leaving = True
        self._waiting_for_room = [w for w in self._waiting_for_room if w[0] is not client]
        if client.channel is not None:
            client.channel.close()
        if client.owner:
            self._launcher.stop(lambda: None)
        self._after_births(client, lambda: self._remove(client))

    def _remove(self, client: Client) -> None:
        self.all.remove(client)
        self._give_up(client, lambda: None)
        self._launcher.on_detach()

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
        blocks, client.blocks = client.blocks, {}
        for first, count in _merged(blocks, {first for other in self.all for first in other.blocks}):
            self._release(client.view, first, count)
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


def _merged(blocks: dict[int, list[int]], held: set[int]) -> list[tuple[int, int]]:
    """The runs of pages that nobody holds any more, neighbours joined: a program with many small arrays gives them back
    in few requests.
    """
    runs: list[tuple[int, int]] = []
    for first, (count, _) in sorted(blocks.items()):
        if first in held:
            continue
        if runs and sum(runs[-1]) == first:
            runs[-1] = (runs[-1][0], runs[-1][1] + count)
        else:
            runs.append((first, count))
    return runs


def _outcome(reply: Message) -> Message:
    return {"error": reply["error"], "kind": "RegionError"} if "error" in reply else {}

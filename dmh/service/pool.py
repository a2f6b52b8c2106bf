"""The worker processes: started, set up, told of views, asked, started again when they die, and ended.

Owns the processes and the launcher's ends of their control channels.  Does not own what the answers mean
(`dmh.service.launcher`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from dmh.errors import ServiceError
from dmh.service.channel import Channel, Message, close_all, pair
from dmh.service.placement import ONE_THREAD
from dmh.service.worker import Setup
from dmh.store.secrets import without_secrets

START_SECONDS = 60.0
STOP_SECONDS = 5.0

FAILURES = 5
"""A worker that has failed so often in a row is started once more, and not again."""
SOON_SECONDS = 10.0
"""One that ends with an error so soon after its start has failed; later it has done something useful before."""
PINS_PER_MESSAGE = 1000
RESTORED = ("view-add", "view-remove", "view-process", "unpin")
"""What a successor knows from the views and pins it is given; asking it again would do it twice."""

Answer = Callable[[Message], None]
log = logging.getLogger("dmh")


@dataclass(slots=True)
class Request:
    """A question to a worker that is not answered yet; kept whole, because its successor is asked again."""

    message: Message
    answer: Answer
    descriptors: Sequence[int]


View = tuple[Message, int]
"""What a worker is told of a program's mapping, and its userfaultfd."""


class Process(Protocol):
    """What is asked of a worker's process, which may be a child or one that was taken over."""

    pid: int

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, as `subprocess.Popen.wait` gives it."""


@dataclass(slots=True)
class WorkerProcess:
    """One worker, as the launcher sees it.  A successor takes over its number and its unanswered requests."""

    role: str
    number: int
    process: Process
    channel: Channel
    ready: bool = False
    waiting: dict[int, Request] = field(default_factory=dict)
    failures: int = 0
    """How many of its predecessors in a row died before they were ready, or ended with an error soon after."""
    began: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        """As in the logs."""
        return f"{self.role}-{self.number}" if self.role == "resolver" else self.role


class Pool:
    """Monitor, resolvers and evictor of one service.

    Worker numbers are rows of the shared table: 0 the monitor, 1..N the resolvers, N + 1 the evictor.
    """

    def __init__(self, setup: Setup, descriptors: Sequence[int], store_descriptors: Sequence[int]) -> None:
        self.workers: list[WorkerProcess] = []
        self._setup = setup
        self._descriptors = [*descriptors, *store_descriptors]
        self._next_request = 0
        self.on_birth: Callable[[Message, list[int]], None] = lambda message, descriptors: close_all(descriptors)

    @staticmethod
    def count(resolvers: int) -> int:
        """How many rows the table needs."""
        return resolvers + 2

    def start(self) -> None:
        """Start every worker; they come up in parallel and report `ready` on their channels."""
        self.workers.append(self._spawn("monitor", 0))
        for number in range(1, self._setup.resolvers + 1):
            self.workers.append(self._spawn("resolver", number))
        self.workers.append(self._spawn("evictor", self._setup.resolvers + 1))

    def _spawn(self, role: str, number: int, **setup: Any) -> WorkerProcess:
        channel, theirs = pair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"workers.{role}", "--control-fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=without_secrets(os.environ, self._setup.store["url"], self._setup.store["encrypt"]) | ONE_THREAD,
                # A group of its own: a terminal's Ctrl-C is for the program, not for its pager.  Not a session of
                # its own: the scheduler would put it into another autogroup, and switching between those costs a
                # microsecond a fault.
                process_group=0,
            )
        worker = WorkerProcess(role, number, process, channel)
        settings = asdict(replace(self._setup, number=number, **setup))
        _send(worker, {"op": "setup", "setup": settings}, self._descriptors)
        return worker

    def restart(self, dead: WorkerProcess, views: Sequence[View], pins: Sequence[tuple[int, int]]) -> WorkerProcess:
        """A successor for a worker that has ended: told of every view, and asked again what the dead one was asked.

        It repairs the table before it reports ready.  ServiceError where it has no prospect: a worker that aborts has
        found a defect, and what never gets ready, or ends with the same error again and again, will not do better
        the next time.
        """
        status = dead.process.wait()
        soon = time.monotonic() - dead.began < SOON_SECONDS
        failures = dead.failures + 1 if not dead.ready or (status > 0 and soon) else 0
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        dead.channel.close()
        if status == -signal.SIGABRT or failures > FAILURES:
            raise ServiceError(f"{dead.name} ended unexpectedly ({how}); the service cannot go on without it")
        log.warning("%s ended unexpectedly (%s) and is started again", dead.name, how)
        worker = self._successor(dead.role, dead.number, views, pins)
        worker.failures = failures
        self.workers[self.workers.index(dead)] = worker
        for number, request in dead.waiting.items():
            if request.message["op"] in RESTORED:
                request.answer({})
            else:
                worker.waiting[number] = request
                _send(worker, request.message | {"id": number}, request.descriptors)
        return worker

    def fill(self, number: int, views: Sequence[View], pins: Sequence[tuple[int, int]]) -> None:
        """A successor for a worker that died while there was no launcher."""
        last = self._setup.resolvers + 1
        role = "monitor" if number == 0 else "evictor" if number == last else "resolver"
        self.workers.append(self._successor(role, number, views, pins))

    def _successor(
        self, role: str, number: int, views: Sequence[View], pins: Sequence[tuple[int, int]]
    ) -> WorkerProcess:
        told: list[tuple[Message, list[int]]] = [(message, [uffd]) for message, uffd in views]
        if role == "evictor":
            told += [(message, []) for message in pins_in_force(pins)]
        worker = self._spawn(role, number, restarted=True, preamble=len(told))
        for message, descriptors in told:
            _send(worker, message, descriptors)
        return worker

    def wait_ready(self) -> None:
        """Return when every worker has reported ready."""
        deadline = time.monotonic() + START_SECONDS
        for worker in self.workers:
            worker.channel.socket.settimeout(max(deadline - time.monotonic(), 0.1))
            try:
                received = worker.channel.receive()
            except TimeoutError:
                raise ServiceError(f"{worker.name} did not start within {START_SECONDS:.0f} s") from None
            if received is None:
                raise ServiceError(
                    f"{worker.name} ended while starting (exit status {worker.process.wait()}); see its message above"
                )
            worker.ready = True
            worker.channel.socket.settimeout(None)

    def tell(self, worker: WorkerProcess, message: Message, answer: Answer, descriptors: Sequence[int] = ()) -> None:
        """Ask one worker; `answer` is called with its reply from `read`."""
        self._next_request += 1
        worker.waiting[self._next_request] = Request(message, answer, descriptors)
        _send(worker, message | {"id": self._next_request}, descriptors)

    def tell_all(
        self, message: Message, answer: Callable[[list[Message]], None], descriptors: Sequence[int] = ()
    ) -> None:
        """Ask every worker; `answer` is called once, when the last has replied."""
        replies: list[Message] = []

        def one(reply: Message) -> None:
            replies.append(reply)
            if len(replies) == len(self.workers):
                answer(replies)

        for worker in self.workers:
            self.tell(worker, message, one, descriptors)

    def read(self, worker: WorkerProcess) -> bool:
        """Handle one packet from a worker; False when it has closed its end."""
        received = worker.channel.receive()
        if received is None:
            return False
        message, descriptors = received
        if message.get("op") == "ready":
            worker.ready = True
            if worker.role == "resolver":
                # What the dead one had been handed is gone with it.
                self.tell(self.by_role("monitor"), {"op": "forget-dispatched"}, lambda reply: None)
        elif message.get("op") == "birth":
            self.on_birth(message, descriptors)
        request = worker.waiting.pop(message.get("id", 0), None)
        if request:
            request.answer(message)
        return True

    def by_role(self, role: str) -> WorkerProcess:
        """The monitor or the evictor."""
        return next(w for w in self.workers if w.role == role)

    def stop(self) -> None:
        """End every worker: told, waited for, and killed by its id only if it does not listen."""
        for worker in self.workers:
            with contextlib.suppress(ServiceError, OSError):
                worker.channel.send({"op": "stop"})
        deadline = time.monotonic() + STOP_SECONDS
        for worker in self.workers:
            try:
                worker.process.wait(max(deadline - time.monotonic(), 0.05))
            except subprocess.TimeoutExpired:
                os.kill(worker.process.pid, signal.SIGKILL)
                worker.process.wait()
            worker.channel.close()


def pins_in_force(pins: Sequence[tuple[int, int]]) -> list[Message]:
    """Every pin, in messages of a size that a socket carries; the last says so."""
    starts = range(0, max(len(pins), 1), PINS_PER_MESSAGE)
    return [
        {"op": "pins-in-force", "runs": pins[start : start + PINS_PER_MESSAGE], "last": start == starts[-1]}
        for start in starts
    ]


def _send(worker: WorkerProcess, message: Message, descriptors: Sequence[int] = ()) -> None:
    # A worker that is gone is noticed by the loop, and its successor is told.
    with contextlib.suppress(ServiceError):
        worker.channel.send(message, descriptors)

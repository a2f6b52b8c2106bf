"""The worker processes: started, set up, told of views, asked, and ended.

Owns the processes and the launcher's ends of their control channels.  Does not own what the answers mean
(`dmh.service.launcher`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

from dmh.errors import ServiceError
from dmh.service.channel import Channel, Message, pair
from dmh.service.worker import Setup

START_SECONDS = 60.0
STOP_SECONDS = 5.0

Answer = Callable[[Message], None]


@dataclass(slots=True)
class WorkerProcess:
    """One worker, as the launcher sees it."""

    role: str
    number: int
    process: subprocess.Popen[bytes]
    channel: Channel
    ready: bool = False
    waiting: dict[int, Answer] = field(default_factory=dict)

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

    @staticmethod
    def count(resolvers: int) -> int:
        """How many rows the table needs."""
        return resolvers + 2

    def start(self) -> None:
        """Start every worker; they come up in parallel and report `ready` on their channels."""
        self._spawn("monitor", 0)
        for number in range(1, self._setup.resolvers + 1):
            self._spawn("resolver", number)
        self._spawn("evictor", self._setup.resolvers + 1)

    def _spawn(self, role: str, number: int) -> None:
        channel, theirs = pair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"workers.{role}", "--control-fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # A group of its own: a terminal's Ctrl-C is for the program, not for its pager.  Not a session of
                # its own: the scheduler would put it into another autogroup, and switching between those costs a
                # microsecond a fault.
                process_group=0,
            )
        worker = WorkerProcess(role, number, process, channel)
        self.workers.append(worker)
        channel.send({"op": "setup", "setup": asdict(replace(self._setup, number=number))}, self._descriptors)

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
        worker.waiting[self._next_request] = answer
        worker.channel.send(message | {"id": self._next_request}, descriptors)

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
        message = received[0]
        answer = worker.waiting.pop(message.get("id", 0), None)
        if answer:
            answer(message)
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

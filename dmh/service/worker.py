"""What every worker process has: its end of the control channel, the shared table, the views, and an orderly end.

Owns the start-up handshake and the control thread.  Does not own what the worker does (`workers/*.py`).  The control
thread is the only one that reads the channel; the main thread does the work and never blocks on it.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import mmap
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmh.errors import DmhError, ProtocolError, ServiceError
from dmh.lspt.table import Table
from dmh.native import check, ffi, lib
from dmh.service.channel import Channel, Message, close_all
from dmh.service.orphan import wait_for_launcher
from dmh.service.paths import hold_alive
from dmh.store.base import OpenStore
from dmh.store.registry import open_store, spec_from_wire
from dmh.store.retry import Retry

OWN_VIEW = 0
"""The view id of a worker's own mapping; applications' views count from 1."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What the launcher tells a worker at its start (the descriptors travel beside it, in this order)."""

    name: str
    number: int
    directory: str
    resolvers: int
    window: int
    batch: int
    policy: str
    idle: str
    mark_budget: float
    high: int
    low: int
    adaptive: bool
    inline: bool
    spin_us: int
    store: dict[str, Any]
    retry: dict[str, Any]
    log_level: int
    service: str
    """The service's id, by which programs know it again."""
    config: str
    """Its whole configuration, for a launcher that takes over; holds the store's password, if its URL does."""
    began: float
    """When it started, by the monotonic clock."""
    grace: float
    """Seconds that a service without programs waits for a launcher that takes over."""
    cpus: list[int]
    follow: bool
    keep: bool
    record: dict[str, Any]
    restarted: bool = False
    """It takes the place of a worker that died, and has to set right what that one left."""
    preamble: int = 0
    """So many messages follow with what it has to know for that: the programs' views, the pins in force."""

    DESCRIPTORS = ("region", "table", "slots", "pipe_out", "pipe_in")


class Worker:
    """One worker process, from its start message to its end."""

    def __init__(self, role: str) -> None:
        # Ctrl-C reaches the whole terminal's process group; the launcher alone decides when workers end.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        parser = argparse.ArgumentParser(prog=f"workers.{role}", description="started by dmh's launcher, not by hand")
        parser.add_argument("--control-fd", type=int, required=True)
        fd = parser.parse_args().control_fd
        self._launcher = os.getppid()
        self.kind = role
        self.channel = Channel(socket.socket(fileno=fd))
        answer = self.channel.receive()
        if answer is None:
            sys.exit(0)
        message, descriptors = answer
        self.setup = Setup(**message["setup"])
        self._alive = hold_alive(Path(self.setup.directory))
        # Kept for a launcher that takes over: what it started with is all in here, and in `programs`.
        self.descriptors = [os.dup(fd) for fd in descriptors]
        self.programs: dict[int, tuple[int, int, int]] = {}  # view -> process, base, userfaultfd
        known = len(Setup.DESCRIPTORS)
        self.region_fd, table_fd, self._slots_fd, self.pipe_out, self.pipe_in = descriptors[:known]
        self._store_fds = descriptors[known:]
        self.role = role if role != "resolver" else f"resolver-{self.setup.number}"
        logging.basicConfig(
            level=self.setup.log_level,
            format=f"dmh[{self.setup.name}] {self.role}: %(levelname)s: %(message)s",
            stream=sys.stderr,
        )
        self.log = logging.getLogger("dmh")
        if self.setup.cpus and (role == "monitor" or self.setup.number == 1):
            # Before ZeroMQ starts its I/O threads, which inherit it.
            os.sched_setaffinity(0, self.setup.cpus)
        self.table = Table(table_fd)
        os.close(table_fd)
        self.slots = self._map_slots()
        self.context: Any = lib.dmh_ctx_new(
            self.table.raw, self.region_fd, ffi.from_buffer("uint8_t[]", self.slots), self.setup.number
        )
        self._map_own_view()
        self.pins_in_force: list[tuple[int, int]] = []
        for _ in range(self.setup.preamble):
            if (received := self.channel.receive()) is None:
                sys.exit(0)
            if received[0]["op"] == "pins-in-force":
                self.pins_in_force += received[0]["runs"]
            else:
                self._answer(*received)
        self.stopping = threading.Event()
        self.orphaned = False
        self._handlers: dict[str, Callable[[Message], Message | None]] = {}
        self._on_stop: Callable[[], None] = lambda: None

    def _map_slots(self) -> npt.NDArray[np.uint8]:
        size = self.table.slots * self.table.page_size
        memory = mmap.mmap(self._slots_fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        return np.frombuffer(memory, np.uint8).reshape(self.table.slots, self.table.page_size)

    def _map_own_view(self) -> None:
        # Registered before anything can touch it: a hole read through an unregistered mapping becomes zeros for
        # everybody.
        bytes_ = self.table.pages * self.table.page_size
        base = lib.dmh_map_region(self.region_fd, bytes_, self.table.page_size, 1)
        if base == ffi.NULL:
            self.log.error(
                "the region cannot be mapped (%s): make region.size smaller, or raise `ulimit -v`",
                os.strerror(ffi.errno),
            )
            sys.exit(1)
        how, features = ffi.new("int *"), ffi.new("uint64_t *")
        uffd = check(lib.dmh_uffd_open(how, features), "opening a userfaultfd")
        check(lib.dmh_uffd_register(uffd, base, bytes_), "registering a view of the region")
        lib.dmh_view_add(self.context, OWN_VIEW, uffd, int(ffi.cast("uintptr_t", base)), os.getpid(), 1)

    def open_store(self) -> OpenStore:
        """This process's store object.  A worker that is started again while the store is away waits for it: without
        one it could do nothing, and ending would only use up its tries.
        """
        spec = spec_from_wire(self.setup.store)
        store = replace(self.retry(), wait=True).call("opening the store", lambda: open_store(spec, self._store_fds))
        self._store_fds = []
        return store

    def retry(self) -> Retry:
        """The back-off rule for this worker's requests to the store."""
        number = self.setup.number
        return Retry(
            timeout=self.setup.retry["timeout"],
            wait=self.setup.retry["wait"],
            stopping=self.stopping,
            on_retry=lambda: self.table.count(number, "store_retries"),
            on_outage=self._note_outage,
        )

    def _note_outage(self, since: float) -> None:
        # Read by `dmh stats`, through the evictor.
        self.table.raw.store_away[self.setup.number] = int(since * 1e9)

    def handle(self, operation: str, handler: Callable[[Message], Message | None]) -> None:
        """Answer a control operation; runs in the control thread.  A handler that returns None answers later,
        itself.
        """
        self._handlers[operation] = handler

    def start(self, on_stop: Callable[[], None]) -> None:
        """Report ready and begin to read the channel; `on_stop` must make the main thread's wait end."""
        self._on_stop = on_stop
        self.channel.send({"op": "ready", "pid": os.getpid()})
        threading.Thread(target=self._read_channel, name="control", daemon=True).start()

    def reply(self, message: Message, **answer: Any) -> None:
        """Answer a control message that asked for an answer."""
        if "id" in message:
            # A launcher that is gone needs no answer; the control thread notices.
            with contextlib.suppress(ServiceError):
                self.channel.send({"op": "reply", "id": message["id"], **answer})

    def after_launcher(self, clear: Callable[[], None]) -> None:
        """Where the launcher was killed, do what it would have done at its end, once its locks are free."""
        if not self.orphaned:
            return
        deadline = time.monotonic() + 5
        while os.getppid() == self._launcher and time.monotonic() < deadline:
            time.sleep(0.01)  # its descriptors close one after the other; ours was not the last
        with contextlib.suppress(DmhError, OSError):
            clear()

    def _read_channel(self) -> None:
        while True:
            try:
                received = self.channel.receive()
            except ProtocolError as error:
                self.log.error("%s", error)
                continue
            if received is None and (channel := wait_for_launcher(self)) is not None:
                self.channel.close()
                self.channel = channel
                continue
            if received is None or received[0].get("op") == "stop":
                self.orphaned = received is None
                self.stopping.set()
                lib.dmh_stop(self.table.raw)
                self._on_stop()
                return
            message, descriptors = received
            try:
                answer = self._answer(message, descriptors)
            except DmhError as error:
                answer = {"error": str(error)}
            except Exception as error:
                self.log.exception("control message %s failed", message.get("op"))
                answer = {"error": f"{self.role}: {error}"}
            if answer is not None:
                self.reply(message, **answer)

    def _answer(self, message: Message, descriptors: list[int]) -> Message | None:
        operation = message.get("op")
        if operation == "view-add":
            (uffd,) = descriptors
            result = lib.dmh_view_add(self.context, message["view"], uffd, message["base"], message["pid"], 0)
            check(result, "adding a view")
            self.programs.setdefault(message["view"], (message["pid"], message["base"], uffd))
            return {}
        close_all(descriptors)
        if operation == "view-remove":
            self.programs.pop(message["view"], None)
            lib.dmh_view_remove(self.context, message["view"])
            return {}
        if operation == "view-process":
            _, base, uffd = self.programs[message["view"]]
            self.programs[message["view"]] = message["pid"], base, uffd
            lib.dmh_view_process(self.context, message["view"], message["pid"])
            return {}
        if operation in self._handlers:
            return self._handlers[operation](message)
        raise ProtocolError(f"unknown control operation {operation!r}")

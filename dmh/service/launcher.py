"""The launcher: builds a service from a configuration, runs its event loop, and takes everything down again.

Owns the region's and the table's memory (memfds), the capture pipe, the service directory, the store's preparation
and removal, and the selector loop.  Does not own what programs ask (`dmh.service.clients`), the workers' processes
(`dmh.service.pool`), nor faults: none of them passes through here.  Used by `dmh run`, `dmh serve` and, as a process
of its own, by `dmh.open`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import secrets
import selectors
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmh.config import Config, Limits, without_password
from dmh.errors import KernelError, ServiceError
from dmh.evict.idle import choose_source
from dmh.lspt.table import Bounds, Table
from dmh.native import check, ffi, lib
from dmh.observe import metrics
from dmh.observe.report import Snapshot
from dmh.observe.trace import check_writable
from dmh.region.extents import Extents
from dmh.service import adoption, requirements
from dmh.service.adoption import Estate
from dmh.service.channel import Message
from dmh.service.client import Client
from dmh.service.clients import Clients
from dmh.service.ledger import Ledger
from dmh.service.listener import Listener
from dmh.service.paths import ServiceDirectory, control_socket, hold_alive, ledger_file
from dmh.service.placement import Placement
from dmh.service.pool import Pool, WorkerProcess
from dmh.service.worker import Setup
from dmh.store import registry
from dmh.store.base import StoreSpec
from dmh.store.registry import spec_from_wire, spec_to_wire

log = logging.getLogger("dmh")

PIPE_BYTES = 1 << 20


class Launcher:
    """One service.  `start`, then `run` until something stops it, then `close`; as a context manager it always
    closes.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.limits = Limits.of(config)
        self.name = config.region.name
        self.id = secrets.token_hex(8)  # a program must not take a later service of this name for the same one
        self.region_fd = -1
        self.directory: ServiceDirectory
        self.idle = config.evictor.idle
        self.pool: Pool
        self.table: Table
        self.ledger: Ledger
        self.extents = Extents(config.region.size // config.region.page_size)
        self.clients = Clients(self)
        self.most_programs = 0
        self.failure: str | None = None
        self.on_detach: Callable[[], None] = lambda: None
        self._selector = selectors.DefaultSelector()
        self._undo = contextlib.ExitStack()
        self._stopping = False
        self._before_end: list[Callable[[], None]] = []
        self._began = time.monotonic()

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def socket_path(self) -> Path:
        """The control socket."""
        return control_socket(self.directory.path)

    # ---- start

    def start(self) -> None:
        """Everything up, or an error that says what is missing and nothing left behind."""
        try:
            self._start()
        except OSError as error:
            self.close()
            raise ServiceError(f"the service cannot start: {error.strerror or error}") from error
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        config, limits = self.config, self.limits
        page_size, pages = config.region.page_size, config.region.size // config.region.page_size
        self.most_programs = requirements.check(config)
        self.idle = choose_source(config.evictor.idle, page_size, config.evictor.policy)
        self.directory = ServiceDirectory(self.name)
        self._undo.callback(self.directory.remove)
        self._own(hold_alive(self.directory.path))
        self.ledger = Ledger(ledger_file(self.directory.path), fresh=True)
        self._undo.callback(self.ledger.close)
        spec = StoreSpec(
            config.store.url, self.name, secrets.token_bytes(16), page_size, pages, config.store.timeout,
            config.store.encrypt,
        )  # fmt: skip
        store_fds = registry.prepare(spec)
        self._undo.callback(registry.remove, spec)
        self._own(*store_fds)
        self.region_fd = _created(lib.dmh_region_create(b"dmh-region", config.region.size), "the region's memory")
        slots_fd = _created(lib.dmh_region_create(b"dmh-victims", limits.buffer * page_size), "the victim buffer")
        bounds = Bounds(limits.resident_max, limits.high, limits.low)
        table_fd = Table.create(pages, page_size, limits.buffer, Pool.count(config.workers.resolvers), bounds)
        self._own(self.region_fd, slots_fd, table_fd)
        pipe = ffi.new("int[2]")
        check(lib.dmh_pipe(pipe, PIPE_BYTES), "creating the capture pipe")
        self._own(pipe[0], pipe[1])
        self.table = Table(table_fd)
        self._undo.callback(self.table.close)
        self.clients.writers.update()
        placement = Placement.of(config.workers.cpus)
        setup = Setup(
            name=self.name,
            number=0,
            directory=str(self.directory.path),
            resolvers=config.workers.resolvers,
            window=limits.window,
            batch=limits.batch,
            policy=config.evictor.policy,
            idle=self.idle,
            mark_budget=config.evictor.mark_budget,
            high=limits.high,
            low=limits.low,
            adaptive=limits.adaptive,
            inline=config.workers.inline,
            spin_us=self._spin_us(),
            cpus=placement.cpus,
            follow=placement.follow,
            keep=placement.keep and config.workers.spin_us != 0,
            store=spec_to_wire(spec),
            retry={"timeout": config.store.timeout, "wait": config.store.on_failure == "wait"},
            log_level=log.getEffectiveLevel(),
            service=self.id,
            config=config.to_wire(),
            began=self._began,
            grace=config.service.grace,
            record=self._recording(),
        )
        self.pool = Pool(setup, [self.region_fd, table_fd, slots_fd, pipe[0], pipe[1]], store_fds)
        self._undo.callback(self.pool.stop)
        self.pool.on_birth = self.clients.children.born
        self.pool.start()
        self.pool.wait_ready()
        for worker in self.pool.workers:
            self.watch(worker.channel, functools.partial(self._read_worker, worker))
        self._listen()

    # ---- taking over

    @classmethod
    def adopt(cls, name: str) -> Launcher:
        """A launcher for a service whose own has died: workers that live go on, the others are started again, and
        programs come back to it by themselves.

        Raises:
            ServiceError: there is no such service, its launcher lives, or no worker is left.
        """
        directory = ServiceDirectory(name, adopt=True)
        estate = adoption.meet(directory.path, name)
        launcher = cls(estate.config)
        try:
            launcher._take_over(directory, estate)
        except BaseException:
            launcher._undo.pop_all()  # what works is left as it was found
            raise
        return launcher

    def _take_over(self, directory: ServiceDirectory, estate: Estate) -> None:
        setup = estate.setup
        self.directory, self.id, self._began = directory, setup.service, setup.began
        self.idle = setup.idle
        self.most_programs = requirements.most_programs(setup.resolvers)
        self._undo.callback(directory.remove)
        self._own(hold_alive(directory.path))
        self.ledger = Ledger(ledger_file(directory.path), fresh=False)
        self._undo.callback(self.ledger.close)
        spec = spec_from_wire(setup.store)
        self._undo.callback(registry.remove, spec)
        self._own(*estate.descriptors)
        known = len(Setup.DESCRIPTORS)
        self.region_fd, table_fd = estate.descriptors[:2]
        self.table = Table(table_fd)
        self._undo.callback(self.table.close)
        setup = dataclasses.replace(setup, number=0, restarted=False, preamble=0)
        self.pool = Pool(setup, estate.descriptors[:known], estate.descriptors[known:])
        self._undo.callback(self.pool.stop)
        self.pool.on_birth = self.clients.children.born
        strangers = self.clients.restore(self.ledger.state, estate.views)
        self.pool.workers = estate.workers
        for number in estate.missing:
            lib.dmh_worker_gone(self.table.raw, number)
            self.pool.fill(number, self.clients.views(), self.clients.pinned())
        for worker in self.pool.workers:
            self.watch(worker.channel, functools.partial(self._read_worker, worker))
        self.clients.settle(strangers)
        self._listen()
        log.warning(
            "took over %r: %d workers went on, %d were started again, %d programs", self.name,
            len(estate.workers) - len(estate.missing), len(estate.missing), self.clients.attached,
        )  # fmt: skip

    def watch_programs(self) -> None:
        """After `adopt`: programs that ended meanwhile are dropped, the others waited for."""
        for client in list(self.clients.all):
            if client.pid:
                self.watch_process(client)

    def _recording(self) -> dict[str, Any]:
        """What the evictor is told: where to record to, and what the recording's header says; empty for nowhere."""
        record, region, limits = self.config.record, self.config.region, self.limits
        if not record.file:
            return {}
        header = {
            "region": region.name,
            "page_size": region.page_size,
            "pages": region.size // region.page_size,
            "limit": limits.limit,
            "slots": limits.buffer,
            "policy": self.config.evictor.policy,
            "idle": self.idle,
        }
        path = os.path.abspath(record.file)
        check_writable(path)
        return {"path": path, "header": header, "max_size": record.max_size}

    def _spin_us(self) -> int:
        """What the monitor is told: microseconds, 0 for never, -1 for as long as pays."""
        spin = self.config.workers.spin_us
        if len(os.sched_getaffinity(0)) < 2:
            return 0  # whoever is waited for would have to run here
        return spin if isinstance(spin, int) else -1

    def _own(self, *descriptors: int) -> None:
        for fd in descriptors:
            self._undo.callback(os.close, fd)

    def _listen(self) -> None:
        listener = Listener(self.socket_path)
        self._undo.callback(listener.close)
        self.watch(listener, lambda: self._accept(listener))
        if self.config.service.metrics != "off":
            self._undo.callback(metrics.serve(self.config.service.metrics, self.snapshot))

    # ---- the loop

    def watch(self, source: Any, ready: Callable[[], None]) -> None:
        """Call `ready` whenever `source` (a descriptor, or something with fileno) can be read."""
        self._selector.register(source, selectors.EVENT_READ, ready)

    def unwatch(self, source: Any) -> None:
        """Undo `watch`."""
        self._selector.unregister(source)

    def run(self) -> None:
        """Serve until stopped."""
        while not self._stopping:
            for key, _ in self._selector.select(self.clients.look_after()):
                # One that a call before this one in the same round has ended is not asked any more.
                if self._selector.get_map().get(key.fd) is key:
                    key.data()
                if self._stopping:
                    break

    def stop(self, then: Callable[[], None]) -> None:
        """End `run`; `then` is called when the workers are down."""
        self._before_end.append(then)
        self._stopping = True

    def _accept(self, listener: Listener) -> None:
        channel = listener.accept()
        client = self.clients.accept(channel) if channel else None
        if client is None:
            return
        self.watch(channel, lambda: self._read_client(client))
        self.watch_process(client)

    def watch_process(self, client: Client) -> None:
        """Drop the client when its process has ended; a child that it forked may hold its connection for longer."""
        try:
            client.pidfd = self._when_dead(client.pid, lambda: self.drop(client))
        except OSError as error:
            log.error("process %d is turned away: it cannot be watched (%s)", client.pid, error.strerror)
            self.drop(client)

    def end_with(self, pid: int) -> None:
        """Stop when the process `pid` has ended."""
        self._when_dead(pid, lambda: self.stop(lambda: None))

    def _when_dead(self, pid: int, then: Callable[[], None]) -> int:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            then()
            return -1
        self.watch(pidfd, then)
        return pidfd

    def _read_client(self, client: Client) -> None:
        if not self.clients.read(client):
            self.drop(client)

    def drop(self, client: Client) -> None:
        """A program has gone."""
        if client in self.clients.all and not client.leaving:
            if client.channel is not None:
                self.unwatch(client.channel)
            self.forget_process(client)
            self.clients.drop(client)

    def forget_process(self, client: Client) -> None:
        """Do not wait for the end of this program's process any more."""
        if client.pidfd >= 0:
            self.unwatch(client.pidfd)
            os.close(client.pidfd)
            client.pidfd = -1

    def _read_worker(self, worker: WorkerProcess) -> None:
        if self.pool.read(worker):
            return
        self.unwatch(worker.channel)
        worker.process.wait()
        lib.dmh_worker_gone(self.table.raw, worker.number)
        if worker.role == "monitor":
            self.clients.writers.births_lost()
        try:
            successor = self.pool.restart(worker, self.clients.views(), self.clients.pinned())
        except ServiceError as error:
            self.failure = str(error)
            log.error("%s", self.failure)
            self._stopping = True
        else:
            self.watch(successor.channel, functools.partial(self._read_worker, successor))

    # ---- what others ask

    def describe(self) -> Message:
        """What a program needs to map the region."""
        region = self.config.region
        return {
            "name": self.name,
            "size": region.size,
            "page_size": region.page_size,
            "seal": region.seal,
            "fork": region.fork,
            "service": self.id,
            "grace": self.config.service.grace,
            "grace_launcher": self.config.service.grace_launcher,
        }

    def stats(self, answer: Callable[[dict[str, Any]], None]) -> None:
        """Call `answer` with the figures of the moment, the store's included."""

        def with_store(reply: Message) -> None:
            snapshot = self.snapshot()
            snapshot.store.update(reply.get("store", {}))
            answer(snapshot.to_wire())

        self.pool.tell(self.pool.by_role("evictor"), {"op": "store-stats"}, with_store)

    def snapshot(self) -> Snapshot:
        """The figures of the moment that stand in shared memory."""
        snapshot = Snapshot.take(
            self.table,
            name=self.name,
            programs=self.clients.attached,
            writers=self.clients.writers.count,
            limit=self.limits.limit,
            allocated=self.extents.pages - self.extents.free_pages,
            seconds=time.monotonic() - self._began,
            store={"url": without_password(self.config.store.url)},
            policy=self.config.evictor.policy,
            idle=self.idle,
        )
        snapshot.counters["refused"] += self.clients.refused
        return snapshot

    def write_stats(self, path: Path) -> None:
        """The counters as JSON, for `--stats FILE`."""
        path.write_text(json.dumps(self.snapshot().to_wire(), indent=2) + "\n")

    # ---- the end

    def close(self) -> None:
        """Take down whatever `start` had put up; in reverse order, and all of it even where a step fails."""
        try:
            self._undo.close()
        finally:
            for then in self._before_end:
                then()
            self._before_end.clear()
            self.clients.close()
            self._selector.close()


def _created(fd: int, what: str) -> int:
    if fd < 0:
        raise KernelError(f"creating {what} failed: {os.strerror(-fd)}")
    return fd

"""A stress run from its start to its verdict.

    start the service and the programs; count descriptors
    let the programs work, and kill                              every wait bounded by plan.patience
    stop killing; count descriptors again
    let the programs verify every word
    end everything; look for what is left

Owns the processes and the watchdog.  What a program does is `dmh.stress.program`, who is killed `dmh.stress.killer`.
"""

from __future__ import annotations

import contextlib
import os
import random
import selectors
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from dmh.config import Config, about
from dmh.region.connection import Connection, start_service
from dmh.service.client import PROTOCOL
from dmh.service.paths import control_socket, service_directory
from dmh.service.pool import STOP_SECONDS as POOL_STOP_SECONDS
from dmh.stress.child import Program
from dmh.stress.killer import Store, Workers
from dmh.stress.look import LATER, Look, kinds_of
from dmh.stress.plan import Plan
from dmh.stress.server import Server
from dmh.stress.verdict import Verdict, wrong_word

LOOK_SECONDS = 0.01
SHOW_SECONDS = 0.25
SETTLE_SECONDS = 15.0
LOG_LINES = 20
STOP_SECONDS = 2 * POOL_STOP_SECONDS
"""Beyond the patience: the launcher kills a worker that does not stop, and that takes it a while."""


class Run:
    """One run; `go` does it all."""

    def __init__(
        self, config: Config, plan: Plan, server: Server | None, log: IO[bytes], show: Callable[[Run], None]
    ) -> None:
        self.plan, self.config = plan, config
        self.verdict = Verdict(plan.seed, limit=config.memory.limit)
        self.phase = "starting"
        self.began = time.monotonic()
        self.look: Look
        self.programs: list[Program] = []
        self._server, self._log, self._show = server, log, show
        self._selector = selectors.DefaultSelector()
        self._killers: list[Workers | Store] = []
        self._shown = 0.0

    def go(self) -> Verdict:
        """The verdict; whatever was started has ended."""
        before = kinds_of(os.getpid())
        with self._service() as connection:
            launcher = connection.channel.peer()[0]
            self.look = Look(launcher)
            try:
                self._selector.register(connection.channel, selectors.EVENT_READ)
                with self._programs():
                    self._course()
                self.verdict.counters = self.look.table.counters()
                self.verdict.seconds = time.monotonic() - self.began
            finally:
                self._selector.close()
                look = self.look
                look.remember()
        self._leaks(look, before)
        return self.verdict

    # ---- the course

    def _course(self) -> None:
        if not self._all_reach("attached", "starting"):
            return
        deadline = time.monotonic() + SETTLE_SECONDS
        while not self.look.connected() and time.monotonic() < deadline:
            time.sleep(0.005)
        at_start = self.look.descriptors()
        rng, now = random.Random(self.plan.seed), time.monotonic()
        workers = Workers(self.look, self.plan.kill_rate, rng, now)
        self._killers = [workers]
        store = Store(self._server, rng, now) if self._server and self.plan.kill_store else None
        if store:
            self._killers.append(store)
        self.began = time.monotonic()
        fine = self._all_reach("ran", "working")
        self._killers = []
        if store:
            store.give_back()
        self.verdict.kills = workers.kills + (store.kills if store else Counter())
        if fine and self._settles(workers):
            self._compare(at_start)
            fine = self._all_reach("verified", "verifying every word")
        self.verdict.operations = sum(program.operations for program in self.programs)

    def _all_reach(self, phase: str, name: str) -> bool:
        """Let every program go on until it is in `phase`; False where something is wrong."""
        self.phase = name
        if phase != "attached":
            for program in self.programs:
                program.go()
        while any(program.phase != phase for program in self.programs):
            if not self._turn():
                return False
        return True

    def _turn(self) -> bool:
        """Look at everything once; False where the run is over for a bad reason."""
        verdict = self.verdict
        for key, _ in self._selector.select(LOOK_SECONDS):
            if key.data is None:
                verdict.ended.append("ended: the service, by itself")
                return False
            self._read(key.data)
        now = time.monotonic()
        for killer in self._killers:
            killer.turn(now)
        memory = self.look.memory()
        verdict.highest = max(verdict.highest, memory)
        if memory > verdict.limit and not verdict.exceeded:
            verdict.exceeded.append(f"limit: {memory:,} bytes were local, {memory - verdict.limit:,} over memory.limit")
        for program in self.programs:
            if program.phase == "":
                verdict.hangs += program.stuck(self.plan.patience, self.look)
        if now - self._shown > SHOW_SECONDS:
            self._shown = now
            self._show(self)
        return not (verdict.wrong or verdict.hangs or verdict.ended)

    def _read(self, program: Program) -> None:
        verdict = self.verdict
        for facts in program.read():
            if "wrong" in facts:
                verdict.wrong.append(wrong_word(facts["lane"], facts["wrong"]))
            if "trouble" in facts:
                verdict.ended.append(f"ended: lane {facts['lane']} of program {program.number}: {facts['trouble']}")
            if "words" in facts:
                if facts["phase"] == "verified":
                    verdict.words += facts["words"]
                verdict.asked += sum((Counter(asked) for asked in facts["asked"]), Counter())
                verdict.longest_ms = max(verdict.longest_ms, facts["longest_ms"])
        if program.phase == "ended":
            self._selector.unregister(program.process.stdout)  # type: ignore[arg-type]
            verdict.ended.append(f"ended: program {program.number}, {program.how_it_ended()}")

    def _settles(self, workers: Workers) -> bool:
        """Wait until every worker that was killed has its successor."""
        self.phase = "settling"
        deadline = time.monotonic() + self.plan.patience
        while not workers.all_up():
            if not self._turn():
                return False
            if time.monotonic() > deadline:
                down = [self.look.role(n) for n in range(self.look.table.workers) if not workers.is_up(n)]
                self.verdict.hangs.append(f"hang: no successor for {', '.join(down)}")
                return False
        return True

    def _compare(self, at_start: dict[str, Counter[str]]) -> None:
        """Descriptors and dead workers after all the killing, beside what there was before."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while left := self._left_over(at_start):
            if time.monotonic() > deadline:  # a worker that has just taken its place may still be opening its own
                self.verdict.leaks += left
                return
            time.sleep(0.05)

    def _left_over(self, at_start: dict[str, Counter[str]]) -> list[str]:
        at_end = self.look.descriptors()
        dead = self.look.dead_children()
        return [
            f"leak: {name} has {more} more of {kind} open than at the start"
            for name, before in at_start.items()
            for kind, more in (at_end.get(name, Counter()) - (before | LATER)).items()
        ] + ([f"leak: {dead} dead workers that the launcher has not waited for"] if dead else [])

    # ---- processes

    @contextlib.contextmanager
    def _service(self) -> Iterator[Connection]:
        connection = start_service(self.config, self._log)
        try:
            _, descriptors = connection.request({"op": "hello", "version": PROTOCOL, "owner": True})
            for fd in descriptors:
                os.close(fd)
            yield connection
        finally:
            if not connection.close(self.plan.patience + STOP_SECONDS):
                self.verdict.hangs.append("hang: the service did not end")

    @contextlib.contextmanager
    def _programs(self) -> Iterator[None]:
        socket = control_socket(service_directory(self.config.region.name))
        try:
            for number in range(self.plan.processes):
                program = Program(self.plan, number, socket, self._log)
                self.programs.append(program)
                assert program.process.stdout is not None
                self._selector.register(program.process.stdout, selectors.EVENT_READ, program)
            yield
        finally:
            for program in self.programs:
                self._end(program)

    def _end(self, program: Program) -> None:
        process = program.process
        if program.phase == "verified":
            program.go()
            try:
                if process.wait(self.plan.patience):
                    self.verdict.ended.append(f"ended: program {program.number}, {program.how_it_ended()}")
            except subprocess.TimeoutExpired:
                self.verdict.hangs.append(f"hang: program {program.number} did not end")
        process.kill()
        process.communicate()

    def _leaks(self, look: Look, before: Counter[str]) -> None:
        leaks = self.verdict.leaks
        deadline = time.monotonic() + 2.0
        while look.left() and time.monotonic() < deadline:
            time.sleep(0.01)  # children of the launcher end with it
        for pid in look.left():
            leaks.append(f"leak: process {pid} of the service is still there")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        look.close()
        directory = service_directory(self.config.region.name)
        if directory.exists():
            leaks.append(f"leak: {directory} is still there")
            shutil.rmtree(directory, ignore_errors=True)
        after = kinds_of(os.getpid())
        leaks += [f"leak: {more} more of {kind} open in this process" for kind, more in (after - before).items()]


def stress(config: Config, plan: Plan, server: Server | None, log: Path, show: Callable[[Run], None]) -> Verdict:
    """Do one run.

    Args:
        config: of the service.
        plan: what to do.
        server: the store's server, where it is the run's own.
        log: a file for what the service and the programs say.
        show: called some times a second.
    """
    with log.open("ab") as file:
        run = Run(config, plan, server, file, show)
        verdict = run.go()
    if verdict.problems:
        verdict.log = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return verdict


def memory_of(run: Run) -> str:
    """Local memory now, for the display."""
    return f"{about(run.look.memory())} of {about(run.verdict.limit)}"

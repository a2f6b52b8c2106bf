"""A service that no program of the test's own has mapped, and programs on it of either mode, for tests of read-only
programs: a sealed mapping stays as long as its process does, so the test's own process cannot have one.
"""

from __future__ import annotations

import json
import select
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from regions import Inside, left_by, processes_of, settings, start_python

from dmh.native import lib
from dmh.region.connection import start_service

CAN_SEAL = lib.dmh_probe_mseal() == 0
SMALL = (
    "region.size=2MiB",
    "memory.limit=256KiB",
    "memory.high=40 pages",
    "memory.low=24 pages",
    "evictor.buffer=16 pages",
)

PROGRAM = """
import json, os, signal, sys, time
import numpy as np
import dmh
name, mode = sys.argv[1:3]
region = dmh.attach(name, mode=mode)
pages = region.size // 4096
array = region.ndarray((pages, 512), "u8")
words = np.arange(512, dtype="u8")

def content(page, version):
    return words + np.uint64(page << 10) + np.uint64(version << 32)

def write(versions):
    for page, version in versions.items():
        array[int(page)] = content(int(page), version)

def check(versions):
    wrong = [int(page) for page, version in versions.items() if not (array[int(page)] == content(int(page), version)).all()]
    return wrong

def scan(seconds):
    # Every word is its own, and no older than it was seen before.
    seen, end, wrong = np.zeros((pages, 512), "u8"), time.monotonic() + seconds, []
    rng = np.random.default_rng(os.getpid())
    while time.monotonic() < end and not wrong:
        for page in (range(pages) if rng.random() < 0.5 else rng.permutation(pages)):
            row = np.array(array[page])
            if not ((row & 0xFFFFFFFF) == content(int(page), 0)).all() or (row >> 32 < seen[page]).any():
                wrong.append(int(page))
            seen[page] = row >> 32
    return wrong

def visit(versions):
    # A writer that comes, writes, looks at what it wrote, and goes.
    global region, array
    region = dmh.attach(name)
    array = region.ndarray((pages, 512), "u8")
    write(versions)
    wrong = check(versions)
    region.close()
    return wrong

def fork():
    child = os.fork()
    if not child:
        for fd in range(3):
            os.close(fd)
        signal.pause()
    return child

print("ready", flush=True)
for line in sys.stdin:
    what, *rest = json.loads(line)
    print(json.dumps(globals()[what](*rest) if what in globals() else eval(what)), flush=True)
"""


class Program:
    """A process that has the region, and does what it is told."""

    def __init__(self, name: str, mode: str, code: str = PROGRAM) -> None:
        self.process = start_python(code, name, mode, stderr=subprocess.PIPE)

    def ready(self) -> Program:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if answer != "ready\n":
            raise AssertionError(self.process.communicate()[1])
        return self

    def tell(self, what: str, *arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([what, *arguments]) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(self.process.communicate()[1])
        return json.loads(line)

    def ask(self, what: str, *arguments: Any) -> Any:
        self.tell(what, *arguments)
        return self.answer()

    def says_something(self, seconds: float) -> bool:
        return bool(select.select([self.process.stdout], [], [], seconds)[0])

    def leave(self) -> None:
        self.process.communicate("")

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


class Service:
    """A service and the programs that were started on it."""

    def __init__(self, *overrides: str) -> None:
        config = settings(*overrides)
        self.name = config.region.name
        self.connection = start_service(config)
        assert self.connection._launcher is not None
        self.launcher = self.connection._launcher.pid
        self.look = Inside(self.launcher)
        self.programs: list[Program] = []
        self.pages = self.look.table.pages
        self.pids = processes_of(self.launcher)

    def start(self, mode: str) -> Program:
        """A program that may not be ready yet."""
        self.programs.append(Program(self.name, mode))
        return self.programs[-1]

    def program(self, mode: str) -> Program:
        return self.start(mode).ready()

    def stats(self) -> dict[str, Any]:
        answer, _ = self.connection.request({"op": "stats"})
        stats: dict[str, Any] = answer["stats"]
        return stats

    def counters(self) -> dict[str, int]:
        return self.look.table.counters()

    def fill(self, version: int = 1) -> dict[int, int]:
        """Have every page written by a program that ends; returns their versions."""
        versions = dict.fromkeys(range(self.pages), version)
        writer = self.program("r+")
        writer.ask("write", versions)
        writer.leave()
        return versions

    def evict(self, program: Program) -> None:
        """Have everything moved out, by a program's wish."""
        program.ask("region.evict()")

    def close(self) -> list[str]:
        for program in self.programs:
            program.kill()
        self.look.close()
        self.connection.request({"op": "stop"})
        self.connection.close()
        return left_by(self.name, self.pids)


@contextmanager
def service(*overrides: str) -> Iterator[Service]:
    running = Service(*overrides)
    left = ["the test failed"]
    try:
        yield running
    finally:
        left = running.close()
    assert left == []


def stored_in(directory: Path) -> str:
    return f"store.url=file:{directory}/pages"


def some_pages(rng: np.random.Generator, pages: int, n: int, version: int) -> dict[int, int]:
    return {int(page): version for page in rng.choice(pages, n, replace=False)}

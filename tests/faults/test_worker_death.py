"""Workers killed at every step of a fault and of an eviction: the program notices a pause, and no wrong byte.

A worker is parked at a step (`dmh.lspt.steps`), killed there with SIGKILL, and its successor has to set things right
while the program goes on counting in pages and comparing with a copy of its own.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from regions import Inside, inside, wait_until
from store_servers import RedisServer

import dmh
from dmh.lspt.states import State
from dmh.lspt.steps import NUMBERS, STEPS
from dmh.native import ffi

OpenRegion = Callable[..., dmh.Region]

FAULT_STEPS = ("reserved", "claimed", "copied", "published")
POOL_STEPS = ("fetched",)
EVICTION_STEPS = (
    "slots_taken", "evicting", "journaled", "spliced", "punched_partly", "punched", "read_partly", "read", "staged",
    "released", "settled", "put", "summed", "acknowledged",
)  # fmt: skip

LIMITS = (
    "region.size=2MiB",
    "memory.limit=256KiB",
    "memory.high=40 pages",
    "memory.low=24 pages",
    "evictor.buffer=16 pages",
)


def test_every_step_is_tried() -> None:
    tried = {*FAULT_STEPS, *POOL_STEPS, *EVICTION_STEPS, "copied_partly", "discarding"}
    elsewhere = {"marking", "healing", "dropping", "let_go"}  # test_healing.py, test_read_only_deaths.py
    assert tried | elsewhere == set(STEPS)


class Program:
    """Counters in every page of a region beside the same counters in ordinary memory."""

    def __init__(self, region: dmh.Region, seed: int = 7) -> None:
        self.region = region
        self.words = region.page_size // 8
        self.pages = region.size // region.page_size
        self.array = region.ndarray((self.pages, self.words), "u8")
        self.shadow = np.zeros((self.pages, self.words), np.uint64)
        self.rng = random.Random(seed)
        self.at = 0

    def step(self) -> None:
        """One page: looked at as a whole, then changed in a few places."""
        if self.rng.random() < 0.5:
            self.at = (self.at + 1) % self.pages  # a scan: windows, runs
        else:
            self.at = self.rng.randrange(self.pages)
        page, shadow = self.array[self.at], self.shadow[self.at]
        assert np.array_equal(page, shadow), f"page {self.at} differs"
        for word in (0, self.rng.randrange(self.words), self.words - 1):
            page[word] += 1
            shadow[word] += 1

    def check(self) -> None:
        wrong = [page for page in range(self.pages) if not np.array_equal(self.array[page], self.shadow[page])]
        assert not wrong, f"pages {wrong} differ"


class Killer:
    """Kills whoever stops at a step, as soon as it has, and once.

    A process of its own: the program's threads may all wait for a page, with the interpreter lock held.
    """

    CODE = """
import mmap, os, signal, struct, sys, time
fd, parked, pids = map(int, sys.argv[1:])
table = mmap.mmap(fd, 65536)
deadline = time.monotonic() + 30
while not (worker := struct.unpack_from("I", table, parked)[0]):
    if time.monotonic() > deadline:
        sys.exit("nobody came there")
    time.sleep(0.0005)
os.kill(struct.unpack_from("I", table, pids + 4 * (worker - 1))[0], signal.SIGKILL)
struct.pack_into("I", table, parked, 0)
"""

    def __init__(self, look: Inside, step: str, *, armed: bool = True) -> None:
        fields = (ffi.offsetof("struct dmh_shared", name) for name in ("parked", "pids"))
        arguments = [str(n) for n in (look.table_fd, *fields)]
        self.step = step
        look.table.raw.parked = 0
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", self.CODE, *arguments], pass_fds=[look.table_fd]
        )
        self._raw = look.table.raw
        if armed:
            self.arm()

    def arm(self) -> None:
        # Not before the process is there: where forks are followed, starting one needs the monitor.
        self._raw.park = NUMBERS[self.step] + 1

    def at_work(self) -> bool:
        return self.process.poll() is None

    def join(self) -> None:
        assert self.process.wait(40) == 0, f"nobody came to the step {self.step!r}"


def restarts(region: dmh.Region) -> int:
    return region.stats().counters["restarts"]


def die_at(region: dmh.Region, *steps: str) -> None:
    """Work until a worker was killed at each of the steps, and for a while after; everything must be right."""
    program = Program(region)
    with inside(region) as look:
        for _ in range(2 * program.pages):
            program.step()
        for n, step in enumerate(steps):
            killer = Killer(look, step)
            while killer.at_work():
                program.step()
            killer.join()
            for _ in range(program.pages):
                program.step()
            wait_until(lambda done=n + 1: restarts(region) >= done, f"a successor of who died at {step!r} is at work")  # type: ignore[misc]
            program.check()
        region.evict()
        look.validate()
        program.check()


class TestAWorkerThatDies:
    def test_in_a_fault_that_the_monitor_resolves(self, open_region: OpenRegion, tmp_path: Path) -> None:
        die_at(open_region(*LIMITS, "prefetch.enabled=false", f"store.url=file:{tmp_path}/pages"), *FAULT_STEPS)

    def test_in_a_fault_that_the_pool_resolves(self, open_region: OpenRegion) -> None:
        steps = (*FAULT_STEPS, *POOL_STEPS)
        die_at(open_region(*LIMITS, "workers.inline=false", "prefetch.window=8 pages"), *steps, *steps)

    def test_in_a_fault_that_a_server_answers(self, open_region: OpenRegion, redis_server: RedisServer) -> None:
        url = f"store.url={redis_server.unix_url}"
        steps = (*FAULT_STEPS, *POOL_STEPS)
        die_at(open_region(*LIMITS, "prefetch.window=8 pages", url), *steps)
        die_at(open_region(*LIMITS, "prefetch.enabled=false", url), *steps)

    @pytest.mark.parametrize("policy", ["fifo", "idle-walk"])
    def test_in_an_eviction(self, open_region: OpenRegion, policy: str, tmp_path: Path) -> None:
        die_at(open_region(*LIMITS, f"evictor.policy={policy}", f"store.url=file:{tmp_path}/pages"), *EVICTION_STEPS)

    def test_in_the_middle_of_a_page_of_several_kernel_pages(self, open_region: OpenRegion) -> None:
        limits = ("region.size=8MiB", "region.page_size=64KiB", "memory.limit=1MiB", "evictor.buffer=4 pages")
        steps = ("copied_partly", "copied", "spliced", "punched", "read_partly", "read", "staged")
        die_at(open_region(*limits, "workers.inline=false"), *steps)

    def test_in_the_middle_of_a_page_larger_than_the_pipe(self, open_region: OpenRegion) -> None:
        limits = ("region.size=64MiB", "region.page_size=2MiB", "memory.limit=16MiB", "evictor.buffer=2 pages")
        die_at(open_region(*limits, "workers.inline=false"), "punched", "read_partly", "spliced")

    def test_while_pages_are_given_up(self, open_region: OpenRegion) -> None:
        region = open_region(*LIMITS)
        a = region.empty((16, 512), "u8")
        a[:] = 7
        with inside(region) as look:
            killer = Killer(look, "discarding")
            region.discard(a)
            killer.join()
            assert not a.any()
            region.evict()
            look.validate()

    def test_while_its_successor_repairs(self, open_region: OpenRegion) -> None:
        """Killed again and again, also before it is ready."""
        region = open_region(*LIMITS, "workers.inline=false")
        program = Program(region)
        with inside(region) as look:
            for number in (0, 1, 3):
                for pause in (0.0, 0.05, 0.15, 0.25, 0.3):
                    pid = int(look.table.raw.pids[number])
                    with suppress(ProcessLookupError):  # reaped, and still in the table
                        if pid:
                            os.kill(pid, signal.SIGKILL)
                    end = time.monotonic() + pause
                    while time.monotonic() < end:
                        program.step()
            program.check()
            wait_until(lambda: all(look.table.raw.pids[0:4]), "every worker is there")
            program.check()
            region.evict()
            look.validate()


def test_a_page_of_zeros_does_not_become_what_it_was(open_region: OpenRegion) -> None:
    """A claim on a page that is all zeros must not lead back to what the store still has of it."""
    region = open_region(*LIMITS, "workers.inline=false", "prefetch.enabled=false")
    a = region.empty((8, 512), "u8")
    for value in (7, 0):
        a[:] = value
        region.evict(a)
    with inside(region) as look:
        killer = Killer(look, "claimed")
        assert not a[5].any()
        killer.join()
    assert not a.any()


def test_the_rest_of_a_page_that_was_partly_there(open_region: OpenRegion) -> None:
    """Zeros for a new page, the slot's bytes for one from the victim buffer, the store's for a stored one."""
    limits = ("region.size=8MiB", "region.page_size=64KiB", "memory.limit=2MiB", "evictor.buffer=8 pages")
    region = open_region(*limits, "evictor.policy=idle-walk", "prefetch.enabled=false")
    words = region.page_size // 8
    a = region.empty((8, words), "u8")
    with inside(region) as look:
        for expected, state in ((0, State.NEW), (3, State.STORED), (4, State.STAGED)):
            page = region.offset_of(a) // region.page_size + state
            if expected:
                a[state] = expected
                region.evict(a)
            killer = Killer(look, "copied_partly", armed=False)
            if state is State.STAGED:
                stage(region, look, page)
            killer.arm()
            assert a[state, 0] == expected
            killer.join()
            a[state, 1] = 9
            assert a[state, 1] == 9
            assert (a[state, 2:] == expected).all()
        look.validate()


def stage(region: dmh.Region, look: Inside, page: int) -> None:
    """Have LPET mark a page: moved to the victim buffer.  It may go on to the store if it is not soon looked for."""
    others = region.empty((48, region.page_size // 8), "u8")
    for n in itertools.count(1):
        if look.table.state(page) is State.STAGED:
            return
        if look.table.state(page) is State.STORED:
            _ = region.buf[page * region.page_size + 8192]
        others[n % len(others)] = n


def test_pins_outlive_the_evictor(open_region: OpenRegion) -> None:
    region = open_region(*LIMITS)
    a, b = region.empty((8, 512), "u8"), region.empty((64, 512), "u8")
    with inside(region) as look, region.pin(a):
        a[:] = 1
        first = region.offset_of(a) // region.page_size
        os.kill(int(look.table.raw.pids[3]), signal.SIGKILL)
        wait_until(lambda: restarts(region) == 1, "there is an evictor again")
        for value in range(4):
            b[:] = value
            assert look.states(first, 8) == [State.RESIDENT] * 8
    with inside(region) as look:
        assert int(look.table.raw.pinned) == 0


def test_requests_that_the_dead_evictor_had_are_answered(open_region: OpenRegion) -> None:
    region = open_region(*LIMITS)
    a = region.empty((32, 512), "u8")
    a[:] = 3
    with inside(region) as look:
        killer = Killer(look, "put")
        region.flush(a)
        killer.join()
        assert (a == 3).all()
        region.evict(a)
        assert all(state is State.STORED for state in look.states(region.offset_of(a) // region.page_size, 32))


def test_random_kills(open_region: OpenRegion, tmp_path: Path) -> None:
    """Any worker, at any instruction, under load."""
    region = open_region(*LIMITS, "workers.resolvers=3", f"store.url=file:{tmp_path}/pages")
    program, rng = Program(region), random.Random(3)
    with inside(region) as look:
        deaths = 0
        while deaths < 25:
            pid = int(look.table.raw.pids[rng.randrange(5)])
            if pid:
                os.kill(pid, signal.SIGKILL)
                deaths += 1
            pause = time.monotonic() + rng.random() * 0.2
            while time.monotonic() < pause:
                program.step()
        program.check()
        wait_until(lambda: all(look.table.raw.pids[0:5]), "every worker is there")
        region.evict()
        look.validate()
        program.check()

"""Pages are captured while others are being written to a server: what becomes of a page that comes and goes meanwhile.

The server is stopped in the middle (SIGSTOP), so that a batch is on its way for as long as the test needs.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from regions import Inside, inside, pattern, wait_until
from store_servers import RedisServer

import dmh
from dmh.lspt.states import Copy, State
from dmh.lspt.steps import NUMBERS

OpenRegion = Callable[..., dmh.Region]
StartRedis = Callable[..., RedisServer]

PAGES, RESIDENT, SLOTS = 1800, 600, 600
SETTINGS = (
    "region.size=8MiB",
    f"memory.limit={(RESIDENT + SLOTS) * 4}KiB",
    f"evictor.buffer={SLOTS} pages",
    "memory.high=590 pages",
    "memory.low=390 pages",  # so the first batch is 200 pages, of which a server that stands still does not take all
    "prefetch.enabled=false",
    "store.timeout=20s",
    "store.on_failure=wait",
)


class Case:
    """A region, its server, and what should be in each page."""

    def __init__(self, region: dmh.Region, server: RedisServer, look: Inside) -> None:
        self.region, self.server, self.look = region, server, look
        self.array = region.empty((PAGES, 4096), "u1")
        self.first = region.offset_of(self.array) // 4096
        self.versions = np.zeros(PAGES, np.int64)

    def write(self, pages: range, version: int) -> None:
        """Version 0 is zeros."""
        for page in pages:
            self.array[page] = pattern(page, 4096, version) if version else 0
            self.versions[page] = version

    def check(self) -> None:
        for page, version in enumerate(self.versions):
            expected = pattern(page, 4096, int(version)) if version else 0
            assert (self.array[page] == expected).all(), f"page {page} has not version {version}"

    def stop_the_server_in_a_write(self) -> None:
        """The first pages are on their way to it from now on, and some that left later are gathered."""
        self.server.pause()
        self.write(range(RESIDENT + 100), 1)
        wait_until(lambda: self.staged() >= 180, "pages have left")

    @contextmanager
    def leaving(self, pages: range) -> Iterator[None]:
        """Inside, these have left memory, and not yet reached the server."""
        asking = threading.Thread(target=self.region.evict, args=(self.array[pages.start : pages.stop],), daemon=True)
        asking.start()
        words = self.look.table.words[self.first + pages.start : self.first + pages.stop]
        gone = (int(State.STAGED), int(State.NEW))  # in the victim buffer, or all zeros
        wait_until(lambda: bool(np.isin(words & np.uint64(15), gone).all()), "they have left")
        yield
        asking.join()

    def soft(self) -> int:
        return self.look.table.counters()["soft"]

    def took_back(self, least: int) -> None:
        """A thread runs on a moment before its fault is counted."""
        wait_until(lambda: self.soft() >= least, f"{least} pages were taken back")

    def staged(self) -> int:
        return self.look.table.staged

    def settle(self) -> None:
        self.server.resume()
        self.region.evict()
        self.look.validate()
        states = self.look.table.words & np.uint64(15)
        zeros = np.flatnonzero(states == State.NEW)
        assert not (self.look.table.copies[zeros] == Copy.VALID).any(), "zeros, and the store is said to have them"


@pytest.fixture
def case(redis_server: RedisServer, open_region: OpenRegion) -> Iterator[Case]:
    region = open_region(*SETTINGS, f"store.url={redis_server.unix_url}")
    with inside(region) as look:
        try:
            yield Case(region, redis_server, look)
        finally:
            redis_server.resume()


def test_pages_leave_while_others_are_written(case: Case) -> None:
    case.stop_the_server_in_a_write()
    before = case.staged()
    case.write(range(RESIDENT + 100, RESIDENT + 300), 1)
    wait_until(lambda: case.staged() >= before + 150, "more have left, although the server takes nothing")
    assert case.look.table.counters()["written"] == 0
    case.settle()
    assert case.look.table.counters()["written"] == RESIDENT + 300
    case.check()


def test_a_page_that_is_written_to_while_it_is_on_its_way(case: Case) -> None:
    """It is taken back, leaves again in another slot, and the older version does not pass for the newer."""
    case.stop_the_server_in_a_write()
    case.write(range(80), 2)
    case.took_back(1)
    with case.leaving(range(60)):
        soft = case.soft()
        case.write(range(40), 3)
        case.took_back(soft + 40)
        case.server.resume()
    case.settle()
    case.check()
    case.region.evict()
    case.check()


def test_a_page_that_is_only_read_while_it_is_on_its_way(case: Case) -> None:
    """It is clean afterwards, so what was written must be what it was: its slot is not for others meanwhile."""
    case.stop_the_server_in_a_write()
    words = case.look.table.words[case.first : case.first + RESIDENT + 100]
    on_its_way = np.flatnonzero(words & np.uint64(15) == State.STAGED)
    assert (case.array[on_its_way, 0] == [pattern(page, 4096, 1)[0] for page in on_its_way]).all()
    case.took_back(100)
    case.write(range(RESIDENT + 100, RESIDENT + 300), 1)
    case.settle()
    case.check()


def test_a_page_that_becomes_zeros_while_it_is_on_its_way(case: Case) -> None:
    case.stop_the_server_in_a_write()
    case.write(range(80), 0)
    with case.leaving(range(80)):
        assert case.look.table.counters()["zeroed"] >= 80
        case.server.resume()
    case.settle()
    case.check()


def test_a_page_that_is_discarded_while_it_is_on_its_way(case: Case) -> None:
    case.stop_the_server_in_a_write()
    freed = case.array[:50]
    case.server.resume()
    case.region.discard(freed)
    case.versions[:50] = 0
    case.settle()
    case.check()


def test_a_flush_waits_for_what_is_on_its_way(case: Case) -> None:
    case.stop_the_server_in_a_write()
    case.server.resume()
    case.region.flush()
    assert not (case.look.table.copies[case.first : case.first + RESIDENT + 100] != Copy.VALID).any()
    case.check()


def test_a_server_that_is_killed_meanwhile_gets_everything_again(case: Case) -> None:
    """It comes back empty; what was on its way is still here."""
    case.stop_the_server_in_a_write()
    case.server.kill()
    case.server.start()
    case.settle()
    case.check()


@pytest.mark.parametrize("when", ["in the middle", "put"])
def test_an_evictor_that_dies_meanwhile(case: Case, when: str) -> None:
    if when == "put":
        case.look.table.raw.park = NUMBERS["put"] + 1
    case.stop_the_server_in_a_write()
    case.write(range(20), 2)
    (evictor,) = case.look.workers["evictor"]
    if when == "put":
        case.server.resume()
        wait_until(lambda: case.look.table.raw.parked != 0, "it has written a batch")
        case.look.table.raw.park = 0
    os.kill(evictor, signal.SIGKILL)
    case.settle()
    assert case.look.table.counters()["restarts"] == 1
    case.check()


def test_a_small_buffer_is_not_shared(open_region: OpenRegion, redis_server: RedisServer) -> None:
    """Two batches in the room of one would each be half as large."""
    small = ("region.size=1MiB", "memory.limit=256KiB", "evictor.buffer=16 pages", "prefetch.enabled=false")
    for overrides, threads in ((small, 0), (SETTINGS, 1)):
        region = open_region(*overrides, f"store.url={redis_server.unix_url}")
        array = region.empty((64, 4096), "u1")
        array[:] = 1
        region.evict()
        with inside(region) as look:
            (evictor,) = look.workers["evictor"]
            tasks = os.listdir(f"/proc/{evictor}/task")
        assert len(tasks) == 2 + threads  # the main one, one that reads the control channel, and who writes
        assert (array == 1).all()

"""The store goes away and comes back: SIGBUS at the right place, healed afterwards; and everything else goes on meanwhile.

A real redis-server is paused, killed and started again, or closed to its clients.  Pages are looked at by system calls,
which say EFAULT where a load would raise SIGBUS.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from regions import inside, page_of, pattern, run_python, start_python, wait_until
from store_servers import RedisServer
from test_worker_death import Killer, restarts

import dmh
from dmh.cli.stats import rows
from dmh.lspt.states import Copy, State

OpenRegion = Callable[..., dmh.Region]
StartRedis = Callable[..., RedisServer]

PAGE = 4096
SMALL = ("region.size=1MiB", "memory.limit=128KiB", "evictor.buffer=8 pages", "prefetch.enabled=false")
BRIEF = ("store.timeout=1s", "store.on_failure=poison")
ALONE = ("prefetch.enabled=false",)
AHEAD = ("prefetch.enabled=true", "prefetch.window=8 pages")
PATIENT = ("store.timeout=1s", "store.on_failure=wait")


def look_at(array: np.ndarray[Any, Any]) -> bytes | None:
    """The array's bytes; None where a page of it raises SIGBUS."""
    copy = os.memfd_create("looked-at")
    try:
        written = os.pwrite(copy, array.data, 0)
        return os.pread(copy, written, 0) if written == array.nbytes else None
    except OSError as error:
        assert error.errno == errno.EFAULT
        return None
    finally:
        os.close(copy)


class Pages:
    """An array of pages of known content, all of them in the store and nowhere else."""

    def __init__(self, region: dmh.Region, count: int, version: int = 0) -> None:
        self.array = region.empty((count, region.page_size), "u1")
        self.content = [pattern(page, region.page_size, version).tobytes() for page in range(count)]
        for page, content in enumerate(self.content):
            self.array[page] = np.frombuffer(content, np.uint8)
        self.first = page_of(region, self.array)
        region.evict(self.array)
        with inside(region) as look:
            assert look.states(self.first, count) == [State.STORED] * count

    def withheld(self, page: int) -> bool:
        content = look_at(self.array[page])
        assert content in (None, self.content[page])
        return content is None


class Reader:
    """Another program on the region, which looks at pages when it is asked to."""

    CODE = """
        import os, sys
        import dmh
        region = dmh.attach(sys.argv[1])
        copy = os.memfd_create("looked-at")
        for line in sys.stdin:
            page = region.ndarray(region.page_size, "u1", int(line))
            try:
                os.pwrite(copy, page.data, 0)
                print(os.pread(copy, region.page_size, 0).hex(), flush=True)
            except OSError as error:
                print("errno", error.errno, flush=True)
        """

    def __init__(self, region: dmh.Region) -> None:
        self.region = region
        self.process = start_python(self.CODE, region.name)

    def look_at(self, array: np.ndarray[Any, Any]) -> bytes | None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(self.region.offset_of(array), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().strip()
        return None if answer == f"errno {errno.EFAULT}" else bytes.fromhex(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(10) == 0


@pytest.fixture
def reader() -> Iterator[Callable[[dmh.Region], Reader]]:
    readers: list[Reader] = []

    def start(region: dmh.Region) -> Reader:
        readers.append(Reader(region))
        return readers[-1]

    yield start
    for started in readers:
        started.process.kill()
        started.process.wait()
        for pipe in (started.process.stdin, started.process.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def paused(server: RedisServer) -> Iterator[None]:
    server.pause()
    try:
        yield
    finally:
        server.resume()


def state_of(region: dmh.Region) -> str:
    return str(region.stats().store["state"])


def healed(region: dmh.Region) -> bool:
    counters = region.stats().counters
    return counters["healed"] == counters["withheld"] > 0


class TestPoisonAndHeal:
    @pytest.mark.parametrize("outage", ["paused", "killed"])
    def test_sigbus_in_every_program_while_it_is_away_and_the_content_when_it_is_back(
        self, open_region: OpenRegion, start_redis: StartRedis, reader: Callable[[dmh.Region], Reader], outage: str
    ) -> None:
        server = start_redis(appendonly="always")
        region = open_region(*SMALL, *BRIEF, f"store.url={server.unix_url}")
        pages = Pages(region, 32)
        early = reader(region)
        assert early.look_at(pages.array[9]) == pages.content[9]
        server.pause() if outage == "paused" else server.kill()
        assert pages.withheld(5)
        assert early.look_at(pages.array[5]) is None
        late = reader(region)  # joins when the page raises SIGBUS already
        assert late.look_at(pages.array[5]) is None
        assert "unavailable since" in state_of(region)
        assert any("unavailable since" in figure for group, _, figure in rows(region.stats()) if group == "store")
        server.resume() if outage == "paused" else server.start()
        wait_until(lambda: healed(region), "the page is healed")
        assert [pages.withheld(page) for page in range(32)] == [False] * 32
        assert early.look_at(pages.array[5]) == late.look_at(pages.array[5]) == pages.content[5]
        pages.array[5] = 1  # one page still, for all of them
        assert early.look_at(pages.array[5]) == late.look_at(pages.array[5]) == bytes([1]) * PAGE
        wait_until(lambda: state_of(region) == "available", "the service says that the store is back")
        early.close()
        late.close()
        with inside(region) as look:
            look.validate()

    def test_the_signal_names_the_very_byte(self, open_region: OpenRegion, redis_server: RedisServer) -> None:
        region = open_region(*SMALL, *BRIEF, f"store.url={redis_server.unix_url}")
        pages = Pages(region, 16)
        code = """
            import ctypes, os, sys
            import dmh
            from dmh.native import ffi, lib
            class Action(ctypes.Structure):  # struct sigaction of glibc
                _fields_ = [("handler", ctypes.c_void_p), ("mask", ctypes.c_ulong * 16), ("flags", ctypes.c_int),
                            ("restorer", ctypes.c_void_p)]
            region = dmh.attach(sys.argv[1])
            array = region.ndarray(16 * 4096, "u1", int(sys.argv[2]))
            base = array.ctypes.data
            @ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
            def caught(number, info, context):
                os.write(1, b"%d %d" % (number, ctypes.c_void_p.from_address(info + 16).value - base))
                os._exit(0)
            SA_SIGINFO = 4
            action = Action(ctypes.cast(caught, ctypes.c_void_p), (ctypes.c_ulong * 16)(), SA_SIGINFO, None)
            assert ctypes.CDLL(None).sigaction(7, ctypes.byref(action), None) == 0
            lib.dmh_touch(ffi.cast("void *", base + 7 * 4096 + 123), 1, 1)
            """
        with paused(redis_server):
            ended = run_python(code, region.name, region.offset_of(pages.array))
        number, offset = map(int, ended.stdout.split())
        assert number == signal.SIGBUS, ended.stderr
        assert offset // PAGE == 7
        assert offset in (7 * PAGE, 7 * PAGE + 123)  # kernels differ in whether they keep the place within the page

    def test_only_the_page_that_is_waited_for(self, open_region: OpenRegion, redis_server: RedisServer) -> None:
        region = open_region(*SMALL, *BRIEF, f"store.url={redis_server.unix_url}", *AHEAD)
        pages = Pages(region, 32)
        assert not any(pages.withheld(page) for page in range(6))  # a scan, so a window goes with the next fault
        region.evict(pages.array)
        with paused(redis_server), inside(region) as look:
            assert pages.withheld(6)
            wait_until(lambda: not look.table.states()[State.FETCHING], "nothing is asked for any more")
            assert look.table.in_state(State.POISONED).tolist() == [pages.first + 6]
            assert look.states(pages.first + 7, 8) == [State.STORED] * 8
        wait_until(lambda: healed(region), "the page is healed")
        assert region.stats().counters["withheld"] == 1

    def test_pages_that_did_not_come_back_are_lost_until_they_are_discarded(
        self, open_region: OpenRegion, redis_server: RedisServer
    ) -> None:
        region = open_region(*SMALL, *BRIEF, f"store.url={redis_server.unix_url}")
        pages = Pages(region, 8)
        redis_server.kill()
        assert pages.withheld(3)
        redis_server.start()  # empty
        wait_until(lambda: region.stats().counters["poisoned"] == 1, "the page is known to be lost")
        assert pages.withheld(3)
        region.discard(pages.array[3])
        assert look_at(pages.array[3]) == bytes(PAGE)
        pages.array[3] = 4
        assert look_at(pages.array[3]) == bytes([4]) * PAGE

    def test_a_withheld_page_can_be_discarded_meanwhile(
        self, open_region: OpenRegion, redis_server: RedisServer, reader: Callable[[dmh.Region], Reader]
    ) -> None:
        region = open_region(*SMALL, *BRIEF, f"store.url={redis_server.unix_url}")
        pages, other = Pages(region, 8), reader(region)
        with paused(redis_server):
            assert pages.withheld(3)
            assert other.look_at(pages.array[3]) is None
            region.discard(pages.array[3])
            assert look_at(pages.array[3]) == other.look_at(pages.array[3]) == bytes(PAGE)
            pages.array[3] = 9
        assert other.look_at(pages.array[3]) == bytes([9]) * PAGE
        assert region.stats().counters["healed"] == 0

    def test_more_pages_than_there_is_room_for(self, open_region: OpenRegion, redis_server: RedisServer) -> None:
        """Healing takes room like any fault; the limit holds, and LPET makes way."""
        limits = ("region.size=1MiB", "memory.limit=32KiB", "evictor.buffer=1 pages", "workers.resolvers=6", *ALONE)
        region = open_region(*limits, *BRIEF, f"store.url={redis_server.unix_url}", "prefetch.enabled=false")
        pages = Pages(region, 12)
        with paused(redis_server), ThreadPoolExecutor(12) as threads:
            assert all(threads.map(pages.withheld, range(12)))
        with inside(region) as look:
            while not healed(region):
                assert sum(look.allocated()) <= 32 << 10
            assert not any(pages.withheld(page) for page in range(12))
            region.evict()
            look.validate()

    def test_a_page_of_several_kernel_pages(
        self, open_region: OpenRegion, redis_server: RedisServer, reader: Callable[[dmh.Region], Reader]
    ) -> None:
        limits = ("region.size=4MiB", "region.page_size=64KiB", "memory.limit=1MiB", *ALONE)
        region = open_region(*limits, *BRIEF, f"store.url={redis_server.unix_url}")
        pages, other = Pages(region, 8), reader(region)
        with paused(redis_server):
            assert pages.withheld(3)
            assert other.look_at(pages.array[3]) is None
        wait_until(lambda: healed(region), "the page is healed")
        assert look_at(pages.array[3]) == other.look_at(pages.array[3]) == pages.content[3]

    @pytest.mark.parametrize("on_failure", ["wait", "poison"])
    def test_a_password_that_was_changed(
        self, open_region: OpenRegion, redis_server: RedisServer, on_failure: str
    ) -> None:
        """Refused at run time is away, not lost: an operator will mend it."""
        settings = ("store.timeout=1s", f"store.on_failure={on_failure}", f"store.url={redis_server.unix_url}")
        region = open_region(*SMALL, *settings)
        pages = Pages(region, 8)
        redis_server.admin().config_set("requirepass", "another")
        redis_server.requirepass = "another"
        redis_server.admin().execute_command("CLIENT", "KILL", "TYPE", "normal")
        seen: list[bool] = []
        looking = threading.Thread(target=lambda: seen.append(pages.withheld(3)), daemon=True)
        looking.start()
        wait_until(lambda: "check user, password" in state_of(region), "the service says what is wrong")
        if on_failure == "poison":
            looking.join(10)
        redis_server.admin().config_set("requirepass", "")
        looking.join(10)
        assert seen == [on_failure == "poison"]
        wait_until(lambda: not pages.withheld(3), "the page can be used again")
        assert region.stats().counters["poisoned"] == 0


class TestAWorkerThatDies:
    def test_while_it_marks_a_page(
        self, open_region: OpenRegion, redis_server: RedisServer, reader: Callable[[dmh.Region], Reader]
    ) -> None:
        """Some programs have the mark and others do not: all of them have it afterwards, and it can be healed."""
        region = open_region(*SMALL, *BRIEF, f"store.url={redis_server.unix_url}")
        pages, other = Pages(region, 8), reader(region)
        other.look_at(pages.array[0])
        with paused(redis_server), inside(region) as look:
            killer = Killer(look, "marking")
            assert pages.withheld(3)
            killer.join()
            wait_until(lambda: restarts(region) == 1, "a successor is at work")
            assert look.states(pages.first + 3, 1) == [State.POISONED]
            assert other.look_at(pages.array[3]) is None
            assert pages.withheld(3)
        wait_until(lambda: not pages.withheld(3), "the page is healed")
        assert other.look_at(pages.array[3]) == pages.content[3]
        with inside(region) as look:
            look.validate()

    def test_while_it_marks_a_page_for_a_program_that_joined_later(
        self, open_region: OpenRegion, redis_server: RedisServer, reader: Callable[[dmh.Region], Reader]
    ) -> None:
        region = open_region(*SMALL, *BRIEF, f"store.url={redis_server.unix_url}")
        pages = Pages(region, 8)
        with paused(redis_server), inside(region) as look:
            assert pages.withheld(3)
            late = reader(region)
            killer = Killer(look, "marking")
            assert late.look_at(pages.array[3]) is None
            killer.join()
            wait_until(lambda: restarts(region) == 1, "a successor is at work")
            assert pages.withheld(3)
        wait_until(lambda: not pages.withheld(3), "the page is healed")
        assert late.look_at(pages.array[3]) == pages.content[3]

    @pytest.mark.parametrize("step", ["healing", "copied", "claimed"])
    def test_while_it_heals(
        self, open_region: OpenRegion, redis_server: RedisServer, reader: Callable[[dmh.Region], Reader], step: str
    ) -> None:
        region = open_region(*SMALL, *BRIEF, f"store.url={redis_server.unix_url}")
        pages, other = Pages(region, 8), reader(region)
        with inside(region) as look:
            with paused(redis_server):
                assert [pages.withheld(page) for page in (3, 4)] == [True, True]
                assert other.look_at(pages.array[3]) is None
                killer = Killer(look, step)
            killer.join()
            wait_until(lambda: restarts(region) == 1, "a successor is at work")
            wait_until(lambda: not any(pages.withheld(page) for page in (3, 4)), "the pages are healed")
            assert [other.look_at(pages.array[page]) for page in (3, 4)] == pages.content[3:5]
            region.evict()
            look.validate()

    def test_while_it_discards_a_page_that_raises_sigbus(
        self, open_region: OpenRegion, redis_server: RedisServer, reader: Callable[[dmh.Region], Reader]
    ) -> None:
        region = open_region(*SMALL, *BRIEF, f"store.url={redis_server.unix_url}")
        pages, other = Pages(region, 8), reader(region)
        with paused(redis_server), inside(region) as look:
            assert pages.withheld(3)
            assert other.look_at(pages.array[3]) is None
            killer = Killer(look, "healing")
            region.discard(pages.array[3])
            killer.join()
            assert look_at(pages.array[3]) == other.look_at(pages.array[3]) == bytes(PAGE)
            look.validate()


class TestTheEvictorGoesOn:
    FLUSH = """
        import sys
        import dmh
        region = dmh.attach(sys.argv[1])
        array = region.ndarray(4 * 4096, "u1", int(sys.argv[2]))
        print("asks", flush=True)
        region.flush(array)
        print("done")
        """

    def dirty_more_than_fits(self, region: dmh.Region, pages: int) -> threading.Thread:
        """A thread that writes to pages until there is no room for the next."""
        array = region.empty((pages, PAGE), "u1")

        def write() -> None:
            for page in range(pages):
                os.preadv(zeroes, [array[page].data], 0)

        zeroes = os.memfd_create("ones")
        os.write(zeroes, b"\1" * PAGE)
        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        return thread

    def test_requests_that_need_no_store_are_answered_and_the_limit_holds(
        self, open_region: OpenRegion, redis_server: RedisServer
    ) -> None:
        region = open_region(*SMALL, *PATIENT, f"store.url={redis_server.unix_url}")
        kept, given_up, other = (Pages(region, n) for n in (4, 4, 4))
        with inside(region) as look:
            kept.array[:] = 7
            with paused(redis_server):
                writer = self.dirty_more_than_fits(region, 60)
                wait_until(lambda: region.stats().counters["room_waits"] > 0, "memory is full of dirty pages")
                wait_until(lambda: "unavailable" in state_of(region), "the evictor knows that the store is away")
                flushing = start_python(self.FLUSH, region.name, region.offset_of(kept.array))
                assert flushing.stdout is not None
                assert flushing.stdout.readline() == "asks\n"
                began = time.monotonic()
                held = {
                    "first": kept.first,
                    "count": 1,
                }  # not `Region.pin`, which touches the page, and there is no room for it
                region._request({"op": "pin"} | held)
                region._request({"op": "unpin"} | held)
                region.discard(given_up.array)
                region.stats()
                assert time.monotonic() - began < 4
                before = _cpu_seconds(look.workers["evictor"][0])
                time.sleep(1)
                assert _cpu_seconds(look.workers["evictor"][0]) - before < 0.3
                assert flushing.poll() is None
                assert writer.is_alive()
                assert sum(look.allocated()) <= 128 << 10
            writer.join(20)
            assert not writer.is_alive()
            assert flushing.communicate(timeout=20)[0] == "done\n"
            wait_until(lambda: state_of(region) == "available", "the service says that the store is back")
            assert (kept.array == 7).all()
            assert not given_up.array.any()
            assert not any(other.withheld(page) for page in range(4))
            copies = look.table.copies[given_up.first : given_up.first + 4]
            wait_until(lambda: (copies == Copy.NONE).all(), "what was discarded is deleted from the store")
            region.evict()
            look.validate()

    @pytest.mark.parametrize("request_", ["flush", "evict"])
    def test_a_request_that_needs_the_store_ends_in_time_or_waits(
        self, open_region: OpenRegion, redis_server: RedisServer, request_: str
    ) -> None:
        for patience in (BRIEF, PATIENT):
            region = open_region(*SMALL, *patience, f"store.url={redis_server.unix_url}")
            array = region.empty((4, PAGE), "u1")
            array[:] = 3
            failed: list[str] = []

            def ask(request: Callable[[Any], None], array: Any, failed: list[str]) -> None:
                try:
                    request(array)
                except dmh.RegionError as error:
                    failed.append(str(error))

            asking = threading.Thread(target=ask, args=(getattr(region, request_), array, failed), daemon=True)
            with paused(redis_server):
                asking.start()
                asking.join(3)
                assert asking.is_alive() == (patience is PATIENT)
            asking.join(10)
            assert [text.split(":")[0] for text in failed] == (
                ["the store did not take every page"] if patience is BRIEF else []
            )
            assert (array == 3).all()
            region.flush()
            with inside(region) as look:
                first = page_of(region, array)
                assert (look.table.copies[first : first + 4] == Copy.VALID).all()

    def test_a_full_store_then_a_larger_one(self, open_region: OpenRegion, start_redis: StartRedis) -> None:
        """Nothing is lost and the program stands still until there is room; then everything goes out by itself."""
        server = start_redis(maxmemory=3 << 20)
        region = open_region("region.size=8MiB", "memory.limit=256KiB", *PATIENT, f"store.url={server.unix_url}")
        array = region.empty((1500, PAGE), "u1")
        content = [pattern(page, PAGE) for page in range(len(array))]

        def fill() -> None:
            source = os.memfd_create("content")
            for page, data in enumerate(content):
                os.pwrite(source, data, 0)
                assert os.preadv(source, [array[page].data], 0) == PAGE
            os.close(source)

        filling = threading.Thread(target=fill, daemon=True)
        filling.start()
        wait_until(lambda: "maxmemory" in state_of(region), "the service says what is wrong")
        assert filling.is_alive()
        server.admin().config_set("maxmemory", 0)
        filling.join(20)
        assert not filling.is_alive()
        assert all(look_at(array[page]) == data.tobytes() for page, data in enumerate(content))


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

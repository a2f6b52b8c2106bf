"""The store goes away under a working region, in every way a real one does, and comes back.

With `on_failure: wait` the program stands still and then goes on; with `poison` it is told by SIGBUS, and the page
is healed when the store is back.  Nothing that was only local is lost, the limit holds, nothing else is held up, and
`stats` says what is wrong.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from regions import inside, page_of, pattern, start_python, wait_until
from store_pages import empty, numbers, spec_for
from store_servers import RedisServer

import dmh
from dmh.errors import RegionError, StoreUnavailable
from dmh.lspt.states import State
from dmh.store.redis import RedisStore

OpenRegion = Callable[..., dmh.Region]
StartRedis = Callable[..., RedisServer]
SIZE = 4096
LIMITS = (
    "region.size=1MiB",
    "memory.limit=256KiB",
    "memory.high=40 pages",
    "memory.low=24 pages",
    "evictor.buffer=16 pages",
    "prefetch.enabled=false",
)
WAIT, POISON = "store.on_failure=wait", "store.on_failure=poison"


def fill(array: np.ndarray, version: int = 0) -> None:
    for page in range(len(array)):
        array[page] = pattern(page, SIZE, version)


def right(array: np.ndarray, version: int = 0) -> bool:
    return all((array[page] == pattern(page, SIZE, version)).all() for page in range(len(array)))


def state(region: dmh.Region) -> str:
    return str(region.stats().store["state"])


def use(array: np.ndarray) -> int:
    """0, or the errno with which a system call on the page fails."""
    fd = os.memfd_create("copy")
    try:
        os.pwrite(fd, array.data, 0)
    except OSError as error:
        return int(error.errno or 0)
    finally:
        os.close(fd)
    return 0


class Mover:
    """Another process that writes a new version over every page and reads it back: it will stand still meanwhile."""

    CODE = """
        import sys, dmh
        from regions import pattern
        region = dmh.attach(sys.argv[1])
        array = region.ndarray((int(sys.argv[3]), 4096), "u1", int(sys.argv[2]))
        for version in (1, 2):
            for page in range(len(array)):
                array[page] = pattern(page, 4096, version)
            for page in range(len(array)):
                assert (array[page] == pattern(page, 4096, version)).all(), page
        print("right", flush=True)
        """

    def __init__(self, region: dmh.Region, array: np.ndarray) -> None:
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        offset = region.offset_of(array)
        self.process = start_python(self.CODE, region.name, offset, len(array), env=os.environ | {"PYTHONPATH": path})

    def finish(self) -> None:
        out, _ = self.process.communicate(timeout=40)
        assert (out, self.process.returncode) == ("right\n", 0)


class Stop:
    """Ways to take a server away and to bring it back with what it had."""

    @staticmethod
    def killed(server: RedisServer) -> Callable[[], object]:
        server.kill()
        return server.start

    @staticmethod
    def frozen(server: RedisServer) -> Callable[[], object]:
        server.pause()
        return server.resume

    @staticmethod
    def full(server: RedisServer) -> Callable[[], object]:
        server.admin().config_set("maxmemory", 1)
        return lambda: server.admin().config_set("maxmemory", 0)

    @staticmethod
    def locked(server: RedisServer) -> Callable[[], object]:
        server.admin().config_set("requirepass", "another word")
        server.requirepass = "another word"
        server.admin().execute_command("CLIENT", "KILL", "TYPE", "normal")
        return lambda: server.admin().config_set("requirepass", "")


@pytest.mark.parametrize("how", [Stop.killed, Stop.frozen, Stop.full, Stop.locked])
def test_the_program_waits_and_goes_on(
    how: Callable[[RedisServer], Callable[[], object]],
    open_region: OpenRegion,
    start_redis: StartRedis,
    capfd: pytest.CaptureFixture[str],
) -> None:
    server = start_redis(appendonly="always")
    region = open_region(*LIMITS, f"store.url={server.unix_url}", WAIT, "store.timeout=2s")
    array, other = region.empty((120, SIZE), "u1"), region.empty((4, SIZE), "u1")
    fill(array)
    with inside(region) as look:
        back = how(server)
        mover = Mover(region, array)
        wait_until(lambda: state(region).startswith("unavailable since"), "stats say that the store is away")
        wait_until(lambda: region.stats().counters["store_retries"] > 0, "a worker has asked in vain, and asks again")
        if how is Stop.full:  # it still reads: the program goes on until nothing more can leave
            wait_until(lambda: look.table.staged == look.table.slots, "what could not be written fills the buffer")
        region.discard(other)  # others are served meanwhile
        assert mover.process.poll() is None
        assert sum(look.allocated()) <= 64 * SIZE
        back()
        mover.finish()
        wait_until(lambda: state(region) == "available", "stats say that it is back")
        assert right(array, 2)
        region.evict()
        look.validate()
    assert "the store answers again" in capfd.readouterr().err


@pytest.mark.parametrize("ahead", ["prefetch.enabled=false", "prefetch.enabled=true"])
def test_connections_that_are_cut_again_and_again(
    ahead: str, open_region: OpenRegion, redis_server: RedisServer
) -> None:
    """While the program reads: in the middle of replies, between them, during a window, while resolvers doze."""
    region = open_region(*LIMITS[:-1], ahead, f"store.url={redis_server.unix_url}", WAIT)
    array = region.empty((200, SIZE), "u1")
    fill(array)
    region.evict(array)
    admin, reading, cuts = redis_server.admin(), threading.Event(), 0
    reading.set()

    def cut() -> None:
        nonlocal cuts
        while reading.is_set():
            cuts += int(admin.execute_command("CLIENT", "KILL", "TYPE", "normal"))  # not this connection
            threading.Event().wait(0.002)

    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        for _ in range(3):
            assert right(array)
    finally:
        reading.clear()
        cutter.join()
    assert cuts > 10
    with inside(region) as look:
        look.validate()
    counters = region.stats().counters
    assert (counters["poisoned"], counters["withheld"]) == (0, 0)


def test_pins_and_discards_do_not_wait_for_the_store(open_region: OpenRegion, redis_server: RedisServer) -> None:
    region = open_region(*LIMITS, f"store.url={redis_server.unix_url}", WAIT)
    array = region.empty((30, SIZE), "u1")
    fill(array)
    redis_server.pause()
    flushed: list[str] = []

    def flush() -> None:
        with dmh.attach(region.name) as again:  # its own connection: this one stays free
            again.flush(again.ndarray((30, SIZE), "u1", region.offset_of(array)))
            flushed.append("done")

    thread = threading.Thread(target=flush)
    thread.start()
    wait_until(lambda: state(region).startswith("unavailable"), "the flush has met the outage")
    with region.pin(array[:2]):
        region.discard(array[28:])
    assert not flushed
    redis_server.resume()
    thread.join(20)
    assert flushed == ["done"]
    assert right(array[:28])


class TestPoison:
    def test_sigbus_at_the_address_and_healing(
        self, open_region: OpenRegion, redis_server: RedisServer, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """A handler of SIGBUS that returns makes the processor try again: when the store is back it succeeds."""
        region = open_region(*LIMITS, f"store.url={redis_server.unix_url}", POISON, "store.timeout=300ms")
        array = region.empty((8, SIZE), "u1")
        fill(array)
        region.evict(array)
        redis_server.pause()
        program = start_python(self.PROGRAM, region.name, region.offset_of(array[3]) + 100)
        assert program.stdout is not None
        assert program.stdout.readline() == "SIGBUS at 100\n"
        with inside(region) as look:
            first = page_of(region, array)
            assert look.states(first, 8).count(State.POISONED) == 1  # what nobody asked for stays as it is
            assert use(array[3]) == errno.EFAULT
            redis_server.resume()
            assert program.communicate(timeout=20)[0] == f"read {pattern(3, SIZE)[100]}\n"
            assert use(array[3]) == 0  # here, too, where another mark was
            assert right(array)
            look.validate()
        assert "page 3 can be used again" in capfd.readouterr().err

    PROGRAM = """
        import ctypes, sys, time, dmh
        region = dmh.attach(sys.argv[1])
        page = region.ndarray(4096, "u1", int(sys.argv[2]) - 100)
        start = page.ctypes.data
        libc = ctypes.CDLL(None)
        seen = []
        Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(ctypes.c_uint64), ctypes.c_void_p)
        def handle(number, info, context):
            if not seen:
                seen.append(info[2] - start)
                print("SIGBUS at", seen[0], flush=True)
            time.sleep(0.02)
        handler = Handler(handle)
        class Action(ctypes.Structure):
            _fields_ = [("handler", Handler), ("mask", ctypes.c_char * 128), ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p)]
        assert libc.sigaction(7, ctypes.byref(Action(handler, bytes(128), 4, None)), None) == 0
        one = ctypes.create_string_buffer(1)
        libc.memcpy(one, ctypes.c_void_p(start + 100), ctypes.c_size_t(1))  # the interpreter lock is free meanwhile
        print("read", one.raw[0], flush=True)
        """

    def test_what_did_not_come_back_stays_lost(self, open_region: OpenRegion, redis_server: RedisServer) -> None:
        region = open_region(*LIMITS, f"store.url={redis_server.unix_url}", POISON, "store.timeout=300ms")
        array = region.empty((2, SIZE), "u1")
        fill(array)
        region.evict(array)
        redis_server.kill()
        assert use(array[0]) == errno.EFAULT
        redis_server.start()
        wait_until(lambda: state(region) == "available", "the evictor has asked again")
        assert [use(page) for page in array] == [errno.EFAULT] * 2  # never zeros
        region.discard(array)
        assert not array.any()

    def test_evict_and_flush_tell_that_the_store_took_nothing(
        self, open_region: OpenRegion, redis_server: RedisServer
    ) -> None:
        region = open_region(*LIMITS, f"store.url={redis_server.unix_url}", POISON, "store.timeout=300ms")
        array = region.empty((4, SIZE), "u1")
        fill(array)
        redis_server.kill()
        for ask in (region.evict, region.flush):
            with pytest.raises(
                RegionError, match="the store did not take every page: the page store .* is unavailable"
            ):
                ask(array)
        assert right(array)
        redis_server.start()
        region.evict(array)
        assert right(array)


def test_clean_pages_are_written_again_to_a_server_that_came_back_empty(
    open_region: OpenRegion, redis_server: RedisServer
) -> None:
    """It had them, so they would be dropped unwritten: but it is not the one it was, and this is the last copy."""
    region = open_region(*LIMITS, f"store.url={redis_server.unix_url}", POISON)
    array, other = region.empty((8, SIZE), "u1"), region.empty((8, SIZE), "u1")
    for part in (array, other):
        fill(part)
        region.evict(part)
        assert right(part)
        region.evict(part)
        assert right(part)
    assert region.stats().counters["clean"] == 16
    redis_server.kill()
    redis_server.start()
    threading.Event().wait(1.1)  # dmh asks once a second
    region.evict(array)  # the evictor finds its connection broken, ...
    region.evict(other)  # ... and has another one now, to another server
    assert right(array)
    assert right(other)
    assert region.stats().counters["poisoned"] == 0


class Delayed:
    """A proxy before a server: what clients send waits until it is let through."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self.open = threading.Event()
        self.open.set()
        self.held = threading.Event()
        """A connection whose bytes are not let through has sent some."""
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            upstream = socket.create_connection(("127.0.0.1", self._server.port))
            threading.Thread(target=self._pass, args=(client, upstream, True), daemon=True).start()
            threading.Thread(target=self._pass, args=(upstream, client, False), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, hold: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if hold and not self.open.is_set():
                    self.held.set()
                    self.open.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        self.open.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def delayed(redis_server: RedisServer) -> Iterator[Delayed]:
    proxy = Delayed(redis_server)
    yield proxy
    proxy.close()


def test_a_write_that_was_given_up_does_not_overtake_a_later_one(redis_server: RedisServer, delayed: Delayed) -> None:
    """It may lie in a slow network for longer than anybody waits for it."""
    store = RedisStore.open(spec_for(delayed.url, timeout=1.0), [])
    old, new = np.full((1, SIZE), 1, np.uint8), np.full((1, SIZE), 2, np.uint8)
    store.put_many(numbers(5), old)
    first_way = delayed.open
    first_way.clear()
    with pytest.raises(StoreUnavailable):
        store.put_many(numbers(5), old)
    assert delayed.held.is_set()
    delayed.open = threading.Event()
    delayed.open.set()  # a connection made now is quick
    store.put_many(numbers(5), new)
    first_way.set()
    out = empty(1)
    for _ in range(50):
        store.get_many(numbers(5), out)
        assert out[0, 0] == 2
        threading.Event().wait(0.002)
    store.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk(open_region: OpenRegion, small_disk: Path) -> None:
    region = open_region(*LIMITS, f"store.url=file://{small_disk}/pages", WAIT)
    array = region.empty((120, SIZE), "u1")
    fill(array)
    filler = small_disk / "somebody elses"
    with inside(region) as look:
        with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(SIZE))
        fresh = region.empty((100, SIZE), "u1")
        mover = Mover(region, fresh)
        wait_until(lambda: "No space left on device" in state(region), "stats say that the disk is full")
        wait_until(lambda: look.table.staged == look.table.slots, "the victim buffer is full")
        assert mover.process.poll() is None
        assert sum(look.allocated()) <= 64 * SIZE
        filler.unlink()
        mover.finish()
        assert right(array)
        assert right(fresh, 2)
        look.validate()

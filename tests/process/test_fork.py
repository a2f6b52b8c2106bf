"""Forked children: they share the region where forks are followed, and get SIGSEGV where not; nobody gets zeros."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from regions import follows, inside, page_of, run_python, settings, start_python, wait_until

import dmh
from dmh.lspt.steps import NUMBERS

OpenRegion = Callable[..., dmh.Region]
PAGES = 200


pytestmark = pytest.mark.skipif(not follows(), reason="needs CAP_SYS_PTRACE: UFFD_FEATURE_EVENT_FORK")


@pytest.fixture(scope="module")
def lasting() -> Iterator[dmh.Region]:
    with dmh.open(settings()) as region:
        yield region


@pytest.fixture
def region(lasting: dmh.Region) -> Iterator[dmh.Region]:
    """A region for several tests, each of which leaves it empty and without other programs."""
    yield lasting
    gc.collect()

    def empty() -> bool:
        stats = lasting.stats()
        return (stats.programs, stats.allocated, stats.pinned) == (1, 0, 0)

    wait_until(empty, "nothing is left of the test")


def in_child(work: Callable[[], object]) -> int:
    """Fork, work, end: 0 where `work` was truthy or None, 1 where it was not, -N for signal N."""
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.alarm(20)
            faulthandler.disable()  # the ends that are expected need no report
            result = work()
            status = 0 if result is None or result else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def filled(region: dmh.Region, pages: int = PAGES) -> np.ndarray:
    """An array much larger than local memory, each page full of its number modulo 251."""
    array = region.empty((pages, 4096), "u1")
    for page in range(pages):
        array[page] = page % 251
    return array


def holds(array: np.ndarray) -> bool:
    return all((array[page] == page % 251).all() for page in range(len(array)))


class TestFollowed:
    def test_a_child_sees_and_changes_what_its_parent_has(self, region: dmh.Region) -> None:
        array = filled(region)

        def work() -> bool:
            right = holds(array)
            array[:, 5] = 252
            return right and region.stats().programs == 2

        assert in_child(work) == 0
        assert (array[:, 5] == 252).all()
        wait_until(lambda: region.stats().programs == 1, "the child is forgotten")

    def test_a_child_is_a_program_of_its_own(self, open_region: OpenRegion) -> None:
        """Its allocations, pins and hints go over a connection of its own, and end with it."""
        region = open_region("prefetch.enabled=false")
        array = filled(region, 20)

        def work() -> bool:
            own = region.empty(10 * 4096, "u1")
            own[:] = 3
            with region.pin(own):
                pinned = region.stats().pinned
            region.evict(array)
            region.prefetch(array)
            return pinned == 10 and (own == 3).all() and not np.shares_memory(own, array) and holds(array)

        assert in_child(work) == 0
        wait_until(lambda: region.stats().allocated == 20, "what the child held is given back")
        assert holds(array)

    def test_an_array_that_ends_in_the_child_stays_in_the_parent_and_the_other_way_round(
        self, region: dmh.Region
    ) -> None:
        kept, dropped = [filled(region, 50)], [filled(region, 50)]
        ready, go = os.pipe(), os.pipe()

        def work() -> bool:
            kept.clear()
            gc.collect()
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            return holds(dropped[0])

        child = os.fork()
        if not child:
            signal.alarm(20)
            os._exit(0 if work() else 1)
        os.read(ready[0], 1)
        dropped.clear()
        gc.collect()
        other = region.empty((region.size // 4096 - 100, 4096), "u1")  # all that is free
        other[:] = 255
        assert holds(kept[0])
        os.write(go[1], b"x")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        wait_until(lambda: region.stats().allocated == len(other) + 50, "the last holder has ended")
        for fd in (*ready, *go):
            os.close(fd)

    def test_what_is_freed_right_after_the_fork_the_child_still_has(self, region: dmh.Region) -> None:
        """The launcher hears of the end of an array and of the child by two ways; it must ask for the second first."""
        for _ in range(20):
            array = filled(region, 3)
            reading, writing = os.pipe()
            child = os.fork()
            if not child:
                signal.alarm(20)
                os.read(reading, 1)
                os._exit(0 if holds(array) else 1)
            del array
            other = region.empty((3, 4096), "u1")
            other[:] = 255
            region.stats()
            os.write(writing, b"x")
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            os.close(reading)
            os.close(writing)

    def test_grandchildren(self, region: dmh.Region) -> None:
        array = filled(region)

        def grandchild() -> bool:
            array[3] = 77
            return bool((array[100] == 100).all())

        assert in_child(lambda: in_child(lambda: in_child(grandchild) == 0) == 0) == 0
        assert (array[3] == 77).all()
        wait_until(lambda: region.stats().programs == 1, "all are forgotten")

    def test_a_parent_may_end_first(self, region: dmh.Region) -> None:
        code = """
            import os, sys, time
            import dmh
            region = dmh.attach(sys.argv[1])
            array = region.empty((100, 4096), "u1")
            for page in range(100):
                array[page] = page
            if os.fork():
                os._exit(0)
            while os.getppid() == int(sys.argv[2]):
                time.sleep(0.001)
            while region.stats().programs != 2:
                time.sleep(0.001)
            print(all((array[page] == page).all() for page in range(100)), region.stats().allocated)
            """
        assert run_python(code, region.name, os.getpid()).stdout == "True 100\n"
        wait_until(lambda: region.stats().allocated == 0, "the child's end gives everything back")

    def test_a_child_that_is_killed(self, region: dmh.Region) -> None:
        array = filled(region)
        for pause in (0.0, 0.001, 0.01, 0.05):
            child = os.fork()
            if not child:
                while True:
                    array[:, 0].sum()
            time.sleep(pause)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert holds(array)
        wait_until(lambda: region.stats().programs == 1, "they are forgotten")

    def test_a_child_that_is_forked_while_the_service_dies(self) -> None:
        """It cannot be told of its userfaultfd any more: an address error then, no zeros."""
        code = """
            import os, signal, sys
            import dmh
            from dmh.config import Config
            region = dmh.open(Config.from_wire(sys.argv[1]))
            array = region.empty((10, 4096), "u1")
            array[:] = 255
            launcher = region._connection._launcher.pid
            os.kill(launcher, signal.SIGSTOP)  # it learns of no child
            child = os.fork()
            if not child:
                os._exit(0 if array[0, 0] == 255 else 1)
            workers = open(f"/proc/{launcher}/task/{launcher}/children").read().split()
            for pid in [launcher, *map(int, workers)]:
                os.kill(pid, signal.SIGKILL)
            print(os.waitpid(child, 0)[1], flush=True)
            os._exit(0)
            """
        ended = run_python(code, settings("service.grace=5s").to_wire())
        assert ended.stdout == "11\n", ended.stderr

    def test_a_child_that_runs_none_of_pythons_hooks(self, region: dmh.Region) -> None:
        """A C library may fork: nobody says which process it is, and its end is noticed all the same."""
        array = filled(region)
        libc = ctypes.PyDLL(None)  # its calls keep the interpreter lock, which is not usable in such a child
        address, none = ctypes.c_void_p(array.ctypes.data), ctypes.c_int(252)
        child = libc.fork()
        if not child:
            libc.memchr(address, none, ctypes.c_size_t(array.nbytes))
            libc._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert holds(array)
        del array
        gc.collect()
        assert not region.empty(region.size, "u1")[:: 50 * 4096].any(), "what it held is free when it is needed"
        wait_until(lambda: region.stats().programs == 1, "it is forgotten")

    def test_the_evictor_looks_into_a_child_as_into_any_program(self, open_region: OpenRegion) -> None:
        """A view that it cannot look into makes every page seem idle, or none: it must learn which process that is."""
        try:
            region = open_region("evictor.policy=idle-walk", "evictor.idle=unmap")
        except dmh.DmhError as error:
            pytest.skip(f"needs the idle source unmap: {error}")
        array = filled(region, 20)
        child = os.fork()
        if not child:
            signal.alarm(20)
            array[:, 0].sum()
            signal.pause()
        with inside(region) as look:
            directory = Path(f"/proc/{look.workers['evictor'][0]}/fd")

            def looks() -> bool:
                links = [os.readlink(link) for link in directory.iterdir()]
                return f"/proc/{child}/pagemap" in links

            wait_until(looks, "the evictor has the child's page table in sight")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    def test_a_sealed_mapping(self, open_region: OpenRegion) -> None:
        code = """
            import os, sys, dmh
            from dmh.config import Config
            region = dmh.open(Config.from_wire(sys.argv[1]))
            array = region.empty((100, 4096), "u1")
            array[:] = 5
            child = os.fork()
            if not child:
                os._exit(0 if (array == 5).all() else 1)
            print(os.waitpid(child, 0)[1])
            """
        assert run_python(code, settings("region.seal=true").to_wire()).stdout == "0\n"

    def test_a_lost_page_is_sigbus_in_the_child_too(self, open_region: OpenRegion, tmp_path: Path) -> None:
        region = open_region(f"store.url=file://{tmp_path}/pages", "prefetch.enabled=false")
        array = region.empty(4096, "u1")
        array[:] = 7
        region.evict(array)
        with open(tmp_path / "pages", "r+b") as file:
            file.seek(page_of(region, array) * 4096 + 100)
            file.write(b"\x08")
        assert in_child(lambda: array[0]) == -signal.SIGBUS
        assert in_child(lambda: array[0]) == -signal.SIGBUS

    @pytest.mark.parametrize("inline", ["true", "false"])
    def test_forks_of_a_threaded_program_under_load(self, open_region: OpenRegion, inline: str) -> None:
        """While a fork is under way UFFDIO_COPY says EAGAIN: nobody may wait for himself there, or lose a write."""
        region = open_region(f"workers.inline={inline}")
        counters = region.empty((2, PAGES, 512), "u8")
        counters[:] = 0
        stop = threading.Event()
        rounds = [0, 0]

        def count(own: int) -> None:
            while not stop.is_set():
                counters[own, :, own * 7] += 1
                rounds[own] += 1

        threads = [threading.Thread(target=count, args=(own,)) for own in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(15):
                assert in_child(lambda: bool((counters[0, ::5, 0] > 0).any())) == 0
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        for own in range(2):
            assert (counters[own, :, own * 7] == rounds[own]).all()

    def test_a_fork_that_begins_while_the_monitor_fills_a_page(self, open_region: OpenRegion) -> None:
        """The kernel refuses to fill until the fork is announced, and it is the monitor that would read that."""
        region = open_region("prefetch.enabled=false", "workers.inline=true")
        code = """
            import os, sys, threading
            import dmh
            from dmh.native import lib
            region = dmh.attach(sys.argv[1])
            array = region.zeros((2, 4096), "u1")
            address = region._mapping.pointer(region.offset_of(array))
            touching = threading.Thread(target=lib.dmh_touch, args=(address, 1, 1))  # without the interpreter lock
            print("ready", flush=True)
            sys.stdin.readline()
            touching.start()
            sys.stdin.readline()
            child = os.fork()
            if not child:
                os._exit(array[1, 1])
            touching.join()
            print("forked", os.waitpid(child, 0)[1], flush=True)
            """
        with inside(region) as look, start_python(code, region.name) as program:
            assert program.stdin is not None
            assert program.stdout is not None
            assert program.stdout.readline() == "ready\n"
            look.table.raw.park = NUMBERS["claimed"] + 1
            program.stdin.write("touch\n")
            program.stdin.flush()
            wait_until(lambda: look.table.raw.parked == 1, "the monitor has claimed the page")
            program.stdin.write("fork\n")
            program.stdin.flush()
            wchan = Path(f"/proc/{program.pid}/task/{program.pid}/wchan")
            wait_until(lambda: "userfault" in wchan.read_text(), "fork() waits for its announcement to be read")
            look.table.raw.parked = 0
            assert program.stdout.readline() == "forked 0\n"

    def test_everything_dies_at_once(self, tmp_path: Path) -> None:
        """A child holds a userfaultfd of its own, or it would read zeros when the service's are closed."""
        code = """
            import os, signal, sys
            import dmh
            from dmh.config import Config
            region = dmh.open(Config.from_wire(sys.argv[1]))
            array = region.empty((500, 4096), "u1")
            array[:] = 255
            reading, writing = os.pipe()
            child = os.fork()
            if not child:
                signal.alarm(20)
                os.write(writing, b"x")
                while True:
                    for page in range(500):
                        if array[page, 17] != 255:
                            print("WRONG", page, flush=True)
            os.read(reading, 1)
            launcher = region._connection._launcher.pid
            workers = open(f"/proc/{launcher}/task/{launcher}/children").read().split()
            for pid in [launcher, *map(int, workers)]:
                os.kill(pid, signal.SIGKILL)
            print(os.waitpid(child, 0)[1], flush=True)
            os._exit(0)
            """
        ended = run_python(code, settings("service.grace=300ms").to_wire())
        assert ended.stdout in ("7\n", ""), ended.stdout  # "": the parent's guardian was first
        assert ended.stderr.count("is gone, and with it the pages of this program") >= 1


class TestOtherWaysToStartProcesses:
    @pytest.mark.parametrize("with_hooks", [False, True])
    def test_subprocess(self, region: dmh.Region, with_hooks: bool) -> None:
        """The new program has nothing of the region, and is not counted as one that has."""
        array = filled(region, 20)
        for _ in range(3):
            subprocess.run(["true"], check=True, preexec_fn=(lambda: None) if with_hooks else None)
        wait_until(lambda: region.stats().programs == 1, "none is counted")
        assert holds(array)

    @pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
    def test_multiprocessing(self, region: dmh.Region, method: str) -> None:
        array = filled(region)
        context = multiprocessing.get_context(method)
        with context.Pool(2) as pool:
            work = [(region.name, region.offset_of(array), part, 2) for part in range(2)]
            assert pool.starmap(_sum_part, work) == [int(array[part::2].sum(dtype="u8")) for part in range(2)]
        wait_until(lambda: region.stats().programs == 1, "the pool's processes are forgotten")


def _sum_part(name: str, offset: int, part: int, parts: int) -> int:
    with dmh.attach(name) as region:
        array = region.ndarray((PAGES, 4096), "u1", offset)
        return int(array[part::parts].sum(dtype="u8"))


WITHOUT = """
    import ctypes, os, sys
    if len(sys.argv) < 3:
        ctypes.CDLL(None).prctl(24, 19, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_SYS_PTRACE
        os.execv(sys.executable, [sys.executable, "-c", open("/proc/self/cmdline").read().split(chr(0))[2], sys.argv[1], "again"])
    import dmh
    from dmh.config import Config
    try:
        region = dmh.open(Config.from_wire(sys.argv[1]))
    except dmh.DmhError as error:
        print(type(error).__name__, error)
        os._exit(0)
    array = region.empty((200, 4096), "u1")
    array[:] = 5
    child = os.fork()
    if not child:
        array[0, 0]
        os._exit(0)
    print(os.waitpid(child, 0)[1], (array == 5).all())
    region.close()
    """


class TestWithoutTheCapability:
    def test_the_child_gets_sigsegv_and_the_parent_keeps_its_pages(self) -> None:
        ended = run_python(WITHOUT, settings().to_wire())
        assert ended.stdout == f"{int(signal.SIGSEGV)} True\n", ended.stderr

    def test_following_is_refused_where_it_is_asked_for(self) -> None:
        ended = run_python(WITHOUT, settings("region.fork=follow").to_wire())
        assert ended.stdout.startswith("KernelError forks cannot be followed here (Operation not permitted)"), ended
        assert "CAP_SYS_PTRACE" in ended.stdout

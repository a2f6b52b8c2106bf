"""Programs that only read (mode "r"): what they are kept from, and pages that leave unseen while nobody else is there."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from readonly import CAN_SEAL, SMALL, Service, service, some_pages, stored_in
from regions import follows, run_python, wait_until
from store_servers import RedisServer

import dmh
from dmh.errors import RegionError
from dmh.lspt.states import Copy, State
from dmh.lspt.steps import NUMBERS

OpenRegion = Callable[..., dmh.Region]
needs_seals = pytest.mark.skipif(not CAN_SEAL, reason="needs mseal")


def quiet(running: Service) -> int:
    return int(running.look.table.raw.quiet)


class TestWhatAReaderMayDo:
    """One program that writes is there all the time: the test's own."""

    PRELUDE = """
        import ctypes, os, pickle, sys
        import numpy as np
        import dmh
        from dmh.errors import RegionError
        region = dmh.attach(sys.argv[1], mode="r")
        """

    def run(self, region: dmh.Region, code: str, *arguments: object) -> tuple[str, int, str]:
        ended = run_python(self.PRELUDE + code, region.name, *arguments)
        return ended.stdout.strip(), ended.returncode, ended.stderr

    @pytest.fixture
    def written(self, open_region: OpenRegion) -> tuple[dmh.Region, np.ndarray]:
        region = open_region()
        array = region.empty((100, 4096), "u1")
        array[:] = np.arange(100)[:, None]
        region.evict()
        return region, array

    def test_it_reads_and_its_arrays_are_not_writeable(self, written: tuple[dmh.Region, np.ndarray]) -> None:
        region, array = written
        code = """
        a = region.ndarray((100, 4096), "u1", int(sys.argv[2]))
        assert (a == np.arange(100)[:, None]).all()
        assert (np.frombuffer(region.buf, "u1")[int(sys.argv[2]):][: a.size] == a.ravel()).all()
        for array in (a, a[3:], a.T, region.ndarray((0, 3)), np.asarray(a)):
            assert not array.flags.writeable
            try: array[...] = 1
            except ValueError: pass
            else: sys.exit(f"{array!r} was written to")
        for array in (a, np.asarray(a)):
            try: array.flags.writeable = True
            except ValueError: pass
            else: sys.exit("it was made writeable")
        assert region.buf.readonly and region.mode == "r" and not region.writable
        b = a + 1
        b[0] = 5
        assert type(b) is np.ndarray
        print("read")
        """
        assert self.run(region, code, region.offset_of(array)) == ("read", 0, "")
        assert (array == np.arange(100)[:, None]).all()

    def test_what_would_change_the_region_says_what_to_do(self, written: tuple[dmh.Region, np.ndarray]) -> None:
        region, array = written
        code = """
        a = region.ndarray((100, 4096), "u1", int(sys.argv[2]))
        for call in (lambda: region.empty(3), lambda: region.zeros((2, 2)), lambda: region.empty(0),
                     lambda: region.discard(a)):
            try: call()
            except RegionError as error: assert "mode 'r+'" in str(error) and region.name in str(error), error
            else: sys.exit("no error")
        region.prefetch(a)
        for advice in ("sequential", "random", "normal", "willneed", "dontneed"):
            region.advise(a, advice)
        with region.pin(a[:4]) as pinned:
            assert (pinned == a[:4]).all()
        region.flush(a)
        region.flush()
        region.evict(a)
        region.evict()
        assert region.stats().programs == 2
        assert (a == np.arange(100)[:, None]).all()
        region.close()
        region.close()
        print("done")
        """
        assert self.run(region, code, region.offset_of(array)) == ("done", 0, "")

    def test_another_mode_is_refused(self, written: tuple[dmh.Region, np.ndarray]) -> None:
        region, _ = written
        for mode in ("w", "rb", "c", "", None):
            with pytest.raises(RegionError, match="is not one of 'r', to read, and 'r\\+'"):
                dmh.attach(region.name, mode=mode)  # type: ignore[arg-type]
        assert region.stats().programs == 1

    def test_a_store_through_a_pointer_is_sigsegv(self, written: tuple[dmh.Region, np.ndarray]) -> None:
        region, array = written
        code = """
        a = region.ndarray((100, 4096), "u1", int(sys.argv[2]))
        assert a[7, 0] == 7
        ctypes.memset(a[int(sys.argv[3]):].__array_interface__["data"][0], 1, 1)
        """
        for page in (7, 50):  # one that is in its page table, and one that may not be
            assert self.run(region, code, region.offset_of(array), page)[1] == -signal.SIGSEGV
        assert (array == np.arange(100)[:, None]).all()

    @needs_seals
    def test_the_mapping_cannot_be_made_writable(self, written: tuple[dmh.Region, np.ndarray]) -> None:
        region, array = written
        code = """
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_size_t]
        base = region._mapping.base
        for first, size in ((0, region.size), (4096, 4096)):
            assert libc.mprotect(base + first, size, 3) == -1, "mprotect"
            assert ctypes.get_errno() == 1
            assert libc.mmap(base + first, size, 3, 0x31, -1, 0) == 2**64 - 1, "mmap"
        for fd in os.listdir("/proc/self/fd"):  # nor is there a descriptor left to map it anew
            if os.path.exists(f"/proc/self/fd/{fd}"):
                assert "dmh-region" not in os.readlink(f"/proc/self/fd/{fd}")
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(base)
            try: memory.write(b"x")
            except OSError: print("safe")
        """
        assert self.run(region, code, region.offset_of(array))[0] == "safe"

    def test_arrays_that_come_in_pickled_are_read_only(self, written: tuple[dmh.Region, np.ndarray]) -> None:
        region, array = written
        code = """
        a, whole = pickle.loads(bytes.fromhex(sys.argv[2]))
        assert whole is region and not a.flags.writeable
        assert isinstance(a, dmh.Array) and (a == np.arange(100)[:, None]).all()
        try: a[0] = 1
        except ValueError: print(pickle.dumps(a[5:8]).hex())
        """
        sent = pickle.dumps((array, region)).hex()
        came, status, problem = self.run(region, code, sent)
        assert status == 0, problem
        back = pickle.loads(bytes.fromhex(came))
        assert not back.flags.writeable
        assert (back == array[5:8]).all()

    def test_whoever_gets_a_readers_array_joins_as_a_reader(self, written: tuple[dmh.Region, np.ndarray]) -> None:
        region, array = written
        code = """
        import subprocess
        a = region.ndarray((100, 4096), "u1", int(sys.argv[2]))
        then = ("import pickle, sys; a = pickle.loads(bytes.fromhex(sys.argv[1])); "
                "from dmh.region.array import region_of; "
                "print(a.flags.writeable, int(a[9].sum()), region_of(a).mode)")
        print(subprocess.check_output([sys.executable, "-c", then, pickle.dumps(a).hex()], text=True))
        """
        assert self.run(region, code, region.offset_of(array))[0] == f"False {9 * 4096} r"

    @pytest.mark.skipif(not follows(), reason="needs CAP_SYS_PTRACE, to follow forks")
    def test_a_forked_child_reads_and_cannot_write(self, written: tuple[dmh.Region, np.ndarray]) -> None:
        region, array = written
        code = """
        a = region.ndarray((100, 4096), "u1", int(sys.argv[2]))
        for act in (lambda: os._exit(0 if (a == np.arange(100)[:, None]).all() and not region.writable else 1),
                    lambda: ctypes.memset(a.__array_interface__["data"][0], 1, 1)):
            child = os.fork()
            if not child:
                act()
            print(os.waitpid(child, 0)[1])
        """
        assert self.run(region, code, region.offset_of(array))[0].split() == ["0", str(int(signal.SIGSEGV))]


@needs_seals
class TestPagesThatNobodyCanHaveWrittenTo:
    @pytest.mark.parametrize("policy", ["fifo", "duel"])
    @pytest.mark.parametrize("inline", ["true", "false"])
    def test_they_leave_unseen(self, tmp_path: Path, inline: str, policy: str) -> None:
        with service(*SMALL, stored_in(tmp_path), f"workers.inline={inline}", f"evictor.policy={policy}") as running:
            versions = running.fill()
            readers = [running.program("r") for _ in range(2)]
            assert quiet(running)
            running.evict(readers[0])  # what the writer left is captured once, as always
            stored = (tmp_path / "pages").stat().st_mtime_ns
            before = running.counters()
            for reader in readers:
                reader.tell("check", versions)
            assert [reader.answer() for reader in readers] == [[], []]
            running.evict(readers[0])
            gained = {name: n - before[name] for name, n in running.counters().items()}
            assert gained["dropped_clean"] == gained["evicted"] >= running.pages
            assert gained["written"] == gained["write_calls"] == gained["clean"] == gained["zeroed"] == 0
            assert (tmp_path / "pages").stat().st_mtime_ns == stored
            assert running.stats()["writers"] == 0
            assert running.look.states(0, running.pages) == [State.STORED] * running.pages
            running.look.validate()

    def test_of_several_kernel_pages(self, tmp_path: Path) -> None:
        sizes = ("region.size=8MiB", "region.page_size=64KiB", "memory.limit=1MiB", "evictor.buffer=4 pages")
        with service(*sizes, stored_in(tmp_path)) as running:
            writer = running.program("r+")
            versions = dict.fromkeys(range(2048), 3)
            writer.ask("write", versions)
            writer.leave()
            reader = running.program("r")
            running.evict(reader)
            before = running.counters()
            assert reader.ask("check", versions) == []
            running.evict(reader)
            gained = {name: n - before[name] for name, n in running.counters().items()}
            assert gained["dropped_clean"] == gained["evicted"] >= 128
            running.look.validate()

    def test_new_ones_stay_new(self) -> None:
        with service(*SMALL) as running:
            reader = running.program("r")
            assert reader.ask("int(array.sum())") == 0
            running.evict(reader)
            counters = running.counters()
            assert counters["dropped_clean"] == counters["evicted"] >= running.pages
            assert running.look.states(0, running.pages) == [State.NEW] * running.pages
            assert reader.ask("int(array.sum())") == 0

    def test_what_was_there_before_the_last_writer_left_is_captured(self) -> None:
        with service(*SMALL) as running:
            running.fill()
            reader = running.program("r")
            writer = running.program("r+")
            versions = dict.fromkeys(range(running.pages), 2)
            assert writer.ask("write", versions) is None
            writer.leave()
            wait_until(lambda: quiet(running) > 0, "the writer is gone")
            assert reader.ask("check", versions) == []
            running.evict(reader)
            assert reader.ask("check", versions) == []

    def test_a_pinned_one_stays(self) -> None:
        with service(*SMALL) as running:
            versions = running.fill()
            reader = running.program("r")
            running.evict(reader)
            reader.ask("(globals().update(held=region.pin(array[:8])), held.__enter__()) and None")
            assert reader.ask("check", versions) == []
            running.evict(reader)
            assert running.look.states(0, 9) == [*[State.RESIDENT] * 8, State.STORED]

    def test_not_where_the_store_has_been_started_anew(self, redis_server: RedisServer) -> None:
        """It has forgotten everything: what is local is the only copy."""
        with service(*SMALL, f"store.url={redis_server.unix_url}", "prefetch.enabled=false") as running:
            versions = running.fill()
            reader = running.program("r")
            running.evict(reader)
            few = {page: versions[page] for page in range(16)}
            assert reader.ask("check", few) == []
            redis_server.stop()
            redis_server.start()
            time.sleep(1.2)  # the evictor asks once a second
            running.evict(reader)
            assert reader.ask("check", few) == []

    def test_not_where_a_write_may_have_failed_half_way(self, tmp_path: Path) -> None:
        # Without read-ahead: a page that arrives after the table was looked at is none of those.
        with service(*SMALL, stored_in(tmp_path), "prefetch.enabled=false") as running:
            versions = running.fill()
            reader = running.program("r")
            running.evict(reader)
            assert reader.ask("check", {page: versions[page] for page in range(16)}) == []
            running.look.validate()  # the last page is there before the table says so
            resident = running.look.table.in_state(State.RESIDENT)
            assert len(resident) == 16
            running.look.table.copies[resident] = Copy.UNKNOWN  # as the evictor notes it
            before = running.counters()
            running.evict(reader)
            gained = {name: n - before[name] for name, n in running.counters().items()}
            assert gained["dropped_clean"] == 0
            assert gained["written"] == gained["evicted"] == len(resident)
            assert reader.ask("check", versions) == []


@needs_seals
class TestAWriterThatComesAndGoes:
    def test_no_byte_of_it_is_lost(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(4)
        with service(*SMALL, stored_in(tmp_path)) as running:
            versions = running.fill()
            scanners = [running.program("r") for _ in range(2)]
            judge, writer = running.program("r"), running.program("r")  # which attaches anew for each visit
            running.evict(judge)
            before = running.counters()
            for scanner in scanners:
                scanner.tell("scan", 5)
            end, version, drops = time.monotonic() + 5, 1, 0
            while time.monotonic() < end:
                version += 1
                written = some_pages(rng, running.pages, int(rng.integers(1, 200)), version)
                assert writer.ask("visit", written) == []
                versions |= written
                assert judge.ask("check", versions) == []
                drops = running.counters()["dropped_clean"] - before["dropped_clean"]
            assert [scanner.answer() for scanner in scanners] == [[], []]
            assert version > 10
            assert drops > 1000, "hardly a page was dropped: nothing was tried"
            assert running.counters()["written"] > before["written"]
            running.evict(judge)
            assert judge.ask("check", versions) == []
            running.look.validate()

    def test_it_waits_until_no_page_is_being_dropped(self, tmp_path: Path) -> None:
        """Whoever attaches may write to what is in memory: it must not be on its way out unseen."""
        with service(*SMALL, stored_in(tmp_path)) as running:
            versions = running.fill()
            reader = running.program("r")
            running.evict(reader)
            raw = running.look.table.raw
            reader.ask("check", {page: versions[page] for page in range(20)})
            raw.park = NUMBERS["dropping"] + 1
            reader.tell("region.evict()")
            wait_until(lambda: raw.parked != 0, "the evictor is in the middle of it")
            writer = running.start("r+")
            wait_until(lambda: quiet(running) == 0, "the writer is about to join")
            assert not writer.says_something(0.5)
            raw.parked = 0
            writer.ready()
            reader.answer()
            versions = dict.fromkeys(range(running.pages), 2)
            writer.ask("write", versions)
            assert reader.ask("check", versions) == []

    def test_what_it_wrote_before_its_page_was_published(self, tmp_path: Path) -> None:
        """A page is there for the program a moment before the table says so; by then the writer may have gone."""
        with service(*SMALL, stored_in(tmp_path), "workers.inline=false", "prefetch.enabled=false") as running:
            versions = running.fill()
            reader = running.program("r")
            running.evict(reader)
            writer = running.program("r+")
            raw = running.look.table.raw
            raw.park = NUMBERS["copied"] + 1
            assert writer.ask("write", {7: 2}) is None
            assert raw.parked
            writer.kill()  # not `leave`, which is answered when every worker has let go of its view
            wait_until(lambda: quiet(running) > 0, "the writer is gone")
            raw.parked = 0
            wait_until(lambda: running.look.table.state(7) is State.RESIDENT, "the page is published")
            running.evict(reader)
            assert reader.ask("check", versions | {7: 2}) == []

    @pytest.mark.parametrize("how", ["detaches", "is killed", "hangs up", "leaves a child"])
    def test_the_quiet_begins_when_its_mapping_is_gone(self, how: str) -> None:
        if how == "leaves a child" and not follows():
            pytest.skip("needs CAP_SYS_PTRACE, to follow forks")
        with service(*SMALL) as running:
            versions = running.fill()
            reader = running.program("r")
            wait_until(lambda: quiet(running) > 0, "whoever filled it is gone")
            first = quiet(running)
            writer = running.program("r+")
            assert quiet(running) == 0
            assert running.stats()["writers"] == 1
            if how == "detaches":
                writer.ask("region.close()")
            elif how == "is killed":
                writer.kill()
            elif how == "hangs up":
                # Its mapping stays, and it goes on writing to what is in memory, until its guardian ends it.
                reader.ask("check", {page: versions[page] for page in range(8)})
                writer.ask("region._connection.guardian.stop() or region._connection.channel.socket.shutdown(2)")
                wait_until(lambda: running.stats()["programs"] == 1, "its end was noticed")
                time.sleep(0.3)
                assert quiet(running) == 0
                writer.kill()
            else:
                child = writer.ask("fork")
                wait_until(lambda: running.stats()["programs"] == 3, "the child is known")
                writer.kill()
                wait_until(lambda: running.stats()["programs"] == 2, "the parent is gone")
                time.sleep(0.3)
                assert quiet(running) == 0
                assert running.stats()["writers"] == 1
                os.kill(child, signal.SIGKILL)
            wait_until(lambda: quiet(running) > first, "the next period has begun")
            assert running.stats()["writers"] == 0

    @pytest.mark.skipif(not follows(), reason="needs CAP_SYS_PTRACE, to follow forks")
    def test_word_of_a_child_of_it_may_have_died_with_the_monitor(self) -> None:
        """Only a program that can write matters; and then there is no quiet any more, for who knows who inherited it."""
        with service(*SMALL) as running:
            versions = running.fill()
            reader = running.program("r")
            raw = running.look.table.raw

            def kill_monitor() -> None:
                before = running.counters()["restarts"]
                os.kill(int(raw.pids[0]), signal.SIGKILL)
                wait_until(lambda: running.counters()["restarts"] > before, "a successor is at work")

            kill_monitor()
            assert quiet(running) > 0
            assert reader.ask("check", versions) == []
            writer = running.program("r+")
            kill_monitor()
            writer.leave()
            wait_until(lambda: running.stats()["writers"] == 0, "the writer is gone")
            assert quiet(running) == 0
            dropped = running.counters()["dropped_clean"]
            assert reader.ask("check", versions) == []
            running.evict(reader)
            assert running.counters()["dropped_clean"] == dropped

    def test_a_sealed_mapping_that_can_be_written_through_counts_until_its_process_ends(self) -> None:
        with service(*SMALL, "region.seal=true") as running:
            writer = running.program("r+")
            writer.ask("region.close()")
            wait_until(lambda: running.stats()["programs"] == 0, "it has detached")
            time.sleep(0.3)
            assert quiet(running) == 0
            writer.kill()
            wait_until(lambda: quiet(running) > 0, "its process is gone")


def test_a_reader_that_cannot_seal_counts_as_a_writer(tmp_path: Path) -> None:
    """On a kernel without mseal a program could make its mapping writable: then nothing is dropped unseen."""
    code = """
        import sys
        from dmh.native import lib
        import dmh.region.mapping as mapping
        class Unsealed:
            def __getattr__(self, name):
                return (lambda *arguments: -38) if name == "dmh_seal_mapping" else getattr(lib, name)
        mapping.lib = Unsealed()
        import dmh
        region = dmh.attach(sys.argv[1], mode="r")
        array = region.ndarray((region.size // 4096, 512), "u8")
        assert not array.flags.writeable and not array.any()
        region.evict()
        counters = region.stats().counters
        print(region.stats().writers, counters["dropped_clean"], counters["evicted"] > 0)
        """
    with service(*SMALL) as running:
        assert run_python(code, running.name).stdout == "1 0 True\n"


def test_a_service_of_ones_own_is_for_writing(open_region: OpenRegion) -> None:
    region = open_region()
    assert region.mode == "r+"
    assert region.writable
    assert region.stats().writers == 1

"""Settings and surroundings that cannot work, as a Python program meets them: a clear error of the right kind, and nothing lost or left."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from denied import DENIED
from regions import BASE, run_python, settings, traces, unique_name

import dmh
from dmh.config import loads
from dmh.errors import ConfigError, DmhError, KernelError, ProtocolError, ServiceError, StoreError
from dmh.region.connection import connect
from dmh.service.channel import MAX_BYTES
from dmh.service.paths import base_directory, control_socket, service_directory

OpenRegion = Callable[..., dmh.Region]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """A start that failed leaves no service directory, no descriptor and no process."""

    def services() -> set[str]:
        return {path.name for path in base_directory().glob(f"t{os.getpid()}-*")}

    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    before = services(), traces(), children()
    yield
    assert (services() - before[0], traces() - before[1], children() - before[2]) == (set(), set(), set())


class TestSettings:
    @pytest.mark.parametrize(
        ("override", "says"),
        [
            ("store.url=nothing:x", r"store\.url.*file, memory, redis"),
            ("memory.limit=8MiB", r"memory\.limit.*at most region\.size"),
            ("memory.limit=7 pages", r"memory\.limit"),
            ("memory.limit=28KiB", r"memory\.limit.*at least 8 pages"),
            ("memory.low=0.99", r"memory\.low.*below memory\.high"),
            ("region.size=65TiB", r"region\.size.*at most 64TiB"),
            ("region.page_size=5000", r"region\.page_size.*power of two"),
            ("evictor.policy=lru", r"evictor\.policy.*fifo, idle-walk"),
            ("memory.lim=1MiB", r"memory\.lim"),
        ],
    )
    def test_are_refused_with_what_is_allowed(self, tmp_path: Path, override: str, says: str) -> None:
        path = tmp_path / "dmh.yaml"
        path.write_text(BASE)
        with pytest.raises(ConfigError, match=says):
            dmh.open(path, overrides=[f"region.name={unique_name()}", override])

    def test_every_problem_is_told_at_once(self) -> None:
        with pytest.raises(ConfigError) as caught:
            settings("memory.low=0.99", "store.url=nothing:x", "evictor.policy=lru")
        assert len(caught.value.problems) == 3

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot be read"):
            dmh.open(tmp_path / "none.yaml")

    def test_more_memory_than_the_machine_has(self) -> None:
        with pytest.raises(
            ServiceError, match=r"memory: .*memory\.limit is 4TiB.*available on this machine.*bytes\) missing"
        ):
            dmh.open(settings("region.size=8TiB", "memory.limit=4TiB"))


class TestStores:
    def test_a_redis_that_nobody_serves(self) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = f"redis://127.0.0.1:{unused.getsockname()[1]}/0"
            with pytest.raises(StoreError, match=re.escape(url.removesuffix("/0"))):
                dmh.open(settings(f"store.url={url}", "store.timeout=1s"))

    def test_a_redis_socket_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError):
            dmh.open(settings(f"store.url=unix://{tmp_path}/none.sock", "store.timeout=1s"))

    def test_a_region_larger_than_the_disk_is_refused_before_anything_is_written(self, tmp_path: Path) -> None:
        path = tmp_path / "pages"
        with pytest.raises(StoreError, match=r"GiB free.*make region\.size smaller"):
            dmh.open(
                settings("region.size=32TiB", "region.page_size=2MiB", "memory.limit=64MiB", f"store.url=file://{path}")
            )
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("place", ["/proc/none/pages", "/dev/null/pages"])
    def test_a_place_where_no_file_can_be(self, place: str) -> None:
        with pytest.raises(StoreError, match="cannot be used as a page file"):
            dmh.open(settings(f"store.url=file://{place}"))

    def test_a_file_of_somebody_elses_is_not_overwritten(self, tmp_path: Path) -> None:
        """One wrong path in the settings must not cost a data file: it was never dmh's."""
        path = tmp_path / "results.npy"
        np.save(path, np.arange(1000))
        content = path.read_bytes()
        with pytest.raises(StoreError, match=str(path)):
            dmh.open(settings(f"store.url=file://{path}")).close()
        assert path.read_bytes() == content
        assert list(tmp_path.iterdir()) == [path]

    def test_what_a_killed_service_left_is_taken_over(self, tmp_path: Path) -> None:
        """What a crash left behind is dmh's own, and no reason to refuse."""
        path = tmp_path / "pages"
        code = """
            import os, sys, dmh
            from dmh.config import Config
            region = dmh.open(Config.from_wire(sys.argv[1]))
            region.zeros(200_000)[:] = 1
            pids = [region._connection._launcher.pid]
            pids += map(int, open(f"/proc/{pids[0]}/task/{pids[0]}/children").read().split())
            for pid in pids: os.kill(pid, 19)
            for pid in pids: os.kill(pid, 9)
            os._exit(0)
            """
        same = settings(f"store.url=file://{path}")
        run_python(code, same.to_wire())
        assert path.exists()
        with dmh.open(same) as region:
            array = region.zeros(200_000)
            assert not array.any()
            array[:] = 2
            assert array.sum() == 400_000

    def test_a_page_file_in_use_is_refused_and_unharmed(self, open_region: OpenRegion, tmp_path: Path) -> None:
        first = open_region(f"store.url=file://{tmp_path}/pages")
        array = first.zeros(200_000)
        array[:] = np.arange(200_000)
        with pytest.raises(StoreError, match="in use by another service"):
            dmh.open(settings(f"store.url=file://{tmp_path}/pages"))
        assert np.array_equal(array, np.arange(200_000))
        assert first.stats().counters["poisoned"] == 0
        first.close()


class TestServices:
    def test_a_second_one_of_the_same_name_is_refused_and_the_first_unharmed(self, open_region: OpenRegion) -> None:
        first = open_region()
        array = first.zeros(200_000)
        array[:] = 5
        with pytest.raises(ServiceError, match=f"{first.name}.*already running"):
            dmh.open(loads(BASE, [f"region.name={first.name}"]))
        assert (array == 5).all()
        with dmh.attach(first.name) as again:
            assert again.size == first.size
        first.close()

    def test_a_name_is_free_again_after_the_end(self, open_region: OpenRegion) -> None:
        first = open_region()
        first.close()
        with dmh.open(loads(BASE, [f"region.name={first.name}"])) as second:
            assert second.name == first.name

    def test_a_directory_that_others_may_enter_is_refused(self) -> None:
        """Whoever can reach the sockets can read every page."""
        name = unique_name()
        directory = service_directory(name)
        directory.mkdir(parents=True)
        directory.chmod(0o755)
        try:
            with pytest.raises(ServiceError, match="mode 0700"):
                dmh.open(loads(BASE, [f"region.name={name}"]))
        finally:
            directory.rmdir()

    def test_malformed_requests_harm_nobody(self, open_region: OpenRegion) -> None:
        packets = [
            b"no json",
            b"[1, 2]",
            b"{}",
            b'{"op": 7}',
            b'{"op": "hello"}',
            b'{"op": "register", "base": 0}',
            b'{"op": "evict", "first": 0, "count": 1}',
            b'{"op": "__init__"}',
            b"\xff\xfe",
            b"{" * 60_000,
            b"x" * (MAX_BYTES + 1),
        ]
        region = open_region()
        array = region.zeros(100_000)
        array[:] = 1
        for packet in packets:
            channel = connect(control_socket(service_directory(region.name)))
            channel.socket.settimeout(10)
            channel.socket.send(packet)
            try:
                answer = channel.receive()
            except ProtocolError:
                answer = None
            assert answer is None or "error" in answer[0], packet[:50]
            channel.close()
        assert array.sum() == 100_000
        assert region.stats().programs == 1
        region.close()

    def test_wrong_requests_are_answered_with_errors(self, open_region: OpenRegion) -> None:
        messages: list[dict[str, object]] = [
            {"op": "evict", "first": -1, "count": 2},
            {"op": "discard", "first": 1023, "count": 2},
            {"op": "flush", "first": 0, "count": 0},
            {"op": "pin", "first": 1 << 70, "count": 1},
            {"op": "discard"},
            {"op": "discard", "first": "x", "count": []},
            {"op": "allocate", "count": -5},
            {"op": "allocate", "count": 1 << 80},
            {"op": "allocate"},
            {"op": "take", "first": 5, "count": 0},
            {"op": "unpin", "first": 5, "count": 1},
            {"op": "register", "base": 1},
        ]
        region = open_region()
        array = region.zeros(100_000)
        array[:] = 1
        for message in messages:
            with pytest.raises(DmhError):
                region._connection.request(message)
        assert array.sum() == 100_000
        stats = region.stats()
        assert (stats.programs, stats.allocated) == (1, -(-800_000 // 4096))
        region.close()

    def test_freeing_what_was_not_allocated_is_ignored(self, open_region: OpenRegion) -> None:
        region = open_region()
        array = region.zeros(10_000)
        array[:] = 1
        with dmh.attach(region.name) as other:
            other._connection.tell({"op": "free", "first": region.offset_of(array) // 4096})
        assert (array == 1).all()
        region.close()

    def test_a_program_that_only_connects_and_goes(self, open_region: OpenRegion) -> None:
        region = open_region()
        for _ in range(20):
            connect(control_socket(service_directory(region.name))).close()
        assert region.stats().programs == 1
        region.close()


class TestAddressSpace:
    def test_a_region_that_does_not_fit_is_told_and_the_service_ends(self) -> None:
        code = """
            import resource, sys, dmh
            from dmh.config import Config
            from dmh.region import connection
            started = connection.start_service(Config.from_wire(sys.argv[1]))
            resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
            try:
                dmh.Region(started, owner=True)
            except dmh.KernelError as error:
                print(error)
            """
        wire = settings("region.size=1TiB", "region.page_size=2MiB", "memory.limit=64MiB").to_wire()
        ended = run_python(code, wire)
        assert "1024.0 GiB of address space cannot be mapped" in ended.stdout, ended.stderr
        assert "ulimit -v" in ended.stdout

    def test_under_ulimit_v_opening_fails_with_a_message(self) -> None:
        """The service's processes inherit the limit, and they map the region too."""
        code = """
            import resource, sys, dmh
            from dmh.config import Config
            resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
            try:
                dmh.open(Config.from_wire(sys.argv[1]))
            except dmh.DmhError as error:
                print(type(error).__name__, error)
            """
        wire = settings("region.size=1TiB", "region.page_size=2MiB", "memory.limit=64MiB").to_wire()
        ended = run_python(code, wire)
        assert ended.returncode == 0, ended.stderr
        assert "ulimit" in ended.stdout + ended.stderr


PROGRAM = (
    DENIED
    + """
    import dmh
    from dmh.config import Config

    try:
        with dmh.open(Config.from_wire(sys.argv[2])) as region:
            array = region.zeros(100_000)
            array[:] = 3
            region.evict(array)
            print("sum", array.sum())
            region.evict(array)
            with open("/dev/zero", "rb", buffering=0) as zero:
                try:
                    print("read", zero.readinto(memoryview(array).cast("B")))
                except OSError as error:
                    print("errno", error.errno)
            print("sum", array.sum())
    except dmh.DmhError as error:
        print(type(error).__name__, error)
    """
)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="needs x86-64: the filter names its system calls' numbers")
class TestWithoutPermission:
    def run(self, how: str) -> subprocess.CompletedProcess[str]:
        ended = run_python(PROGRAM, how, settings().to_wire())
        if ended.returncode == 77:
            pytest.skip("needs seccomp filters")
        return ended

    def test_no_userfaultfd_at_all_is_an_error_that_names_the_mend(self) -> None:
        ended = self.run("denied")
        assert ended.stdout.startswith(KernelError.__name__), ended.stderr
        assert "chmod a+rw /dev/userfaultfd" in ended.stdout
        assert "Traceback" not in ended.stderr

    def test_user_mode_faults_only_work_with_a_warning_that_says_what_breaks(self) -> None:
        ended = self.run("user mode")
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.splitlines() == ["sum 300000.0", "errno 14", "sum 300000.0"], ended.stderr
        assert "chmod a+rw /dev/userfaultfd" in ended.stderr
        assert "EFAULT" in ended.stderr

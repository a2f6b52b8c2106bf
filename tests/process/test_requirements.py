"""Starts on machines that have too little: real limits, each refused with the number that is missing, or lived with."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from regions import run_python, settings, unique_name

import dmh
from dmh.errors import ServiceError, StoreError
from dmh.machine import limits
from dmh.machine.memory import group_directories
from dmh.service.requirements import check

LIBC = ctypes.CDLL(None)
PR_CAPBSET_DROP = 24
OpenRegion = Callable[..., dmh.Region]

OPEN = """
    import os, resource, sys, dmh
    from dmh.config import Config

    def opened():
        try:
            with dmh.open(Config.from_wire(sys.argv[1])) as region:
                array = region.zeros(200_000)
                array[:] = 1
                print("sum", int(array.sum()))
        except dmh.DmhError as error:
            print(type(error).__name__, error)
"""


def outcome(code: str, *overrides: str, **options: object) -> str:
    """What a program prints that sets limits of its own and opens a region."""
    ended = run_python(OPEN + code, settings(*overrides).to_wire(), **options)  # type: ignore[arg-type]
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def as_root(what: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(os.getuid() != 0, reason=f"needs root, {what}")


@pytest.mark.parametrize(
    ("limit", "overrides", "says"),
    [
        ("NOFILE, (60, 60)", ["workers.resolvers=12"], r"descriptors: (\d+) descriptors needed .* 60 descriptors .*\(`ulimit -n`\): (\d+) descriptors missing"),
        ("AS, (4 << 30, 4 << 30)", ["region.size=1TiB", "region.page_size=2MiB", "memory.limit=64MiB"], r"address space: 1\.001 TiB needed .* 4 GiB allowed .*`ulimit -v`.*: 1021 GiB \([\d,]+ bytes\) missing"),
        ("FSIZE, (1 << 20, 1 << 20)", [], r"file size: 4 MiB needed .*1 MiB allowed .*`ulimit -f`.*: 3 MiB \(3,145,728 bytes\) missing"),
    ],
)  # fmt: skip
def test_a_limit_of_the_process_is_told_with_what_is_missing(limit: str, overrides: list[str], says: str) -> None:
    printed = outcome(f"    resource.setrlimit(resource.RLIMIT_{limit}); opened()", *overrides)
    assert re.match(f"ServiceError {says}", printed), printed


def test_the_number_of_descriptors_asked_for_is_enough() -> None:
    """A refusal that names a number which then does not work either would be worse than none."""
    code = """
    import re
    resource.setrlimit(resource.RLIMIT_NOFILE, (50, 2000))
    opened()
    """
    wanted = re.search(r"`ulimit -n (\d+)`", outcome(code, "workers.resolvers=16"))
    assert wanted is not None
    code = f"    resource.setrlimit(resource.RLIMIT_NOFILE, ({wanted[1]},) * 2); opened()"
    assert outcome(code, "workers.resolvers=16") == "sum 200000\n"


@as_root("to become a user of few processes")
def test_a_limit_of_processes_is_told_with_what_is_missing() -> None:
    code = """
    from dmh.service import requirements
    os.setgroups([]); os.setgid(64123); os.setuid(64123)
    resource.setrlimit(resource.RLIMIT_NPROC, (12, 12))
    try:
        requirements.check(Config.from_wire(sys.argv[1]))
    except dmh.DmhError as error:
        print(type(error).__name__, error)
    """
    printed = outcome(code)
    assert re.match(
        r"ServiceError processes: 20 processes and threads needed .*, (\d+) processes and threads left of this user's "
        r"\(`ulimit -u`\): (\d+) processes and threads missing",
        printed,
    ), printed


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A memory cgroup of 96 MiB below the root's."""
    roots = [d for d in group_directories("memory") if os.access(d, os.W_OK) and not d.name.endswith("unified")]
    limits = {"memory.limit_in_bytes", "memory.max"}
    if not roots:
        pytest.skip("needs a memory cgroup that may be divided")
    group = roots[-1] / unique_name()
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"needs a memory cgroup that may be divided: {error}")
    try:
        file = next((group / name for name in limits if (group / name).exists()), None)
        if file is None:
            pytest.skip("needs the memory controller")
        file.write_text(str(96 << 20))
        yield group
    finally:
        group.rmdir()


class TestMemory:
    def test_a_cgroup_that_is_smaller_than_the_limit(self, memory_group: Path) -> None:
        """Its OOM killer would end the program, or a worker, when the region fills."""
        code = f"""
    with open("{memory_group}/cgroup.procs", "w") as procs: procs.write(str(os.getpid()))
    opened()
    """
        printed = outcome(code, "region.size=1GiB", "memory.limit=512MiB")
        assert re.match(
            r"ServiceError memory: [\d.]+ MiB needed \(memory\.limit is 512MiB, and .*\), [\d.]+ MiB left in the memory "
            rf"cgroup {memory_group}: [\d.]+ MiB \([\d,]+ bytes\) missing",
            printed,
        ), printed

    def test_a_machine_that_is_smaller_than_the_limit(self) -> None:
        with pytest.raises(
            ServiceError, match=r"memory: .*MemAvailable.* TiB \([\d,]+ bytes\) missing; lower memory.limit"
        ):
            dmh.open(settings("region.size=8TiB", "memory.limit=4TiB"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB and 16 files."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=16,mode=700", "tmpfs", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@as_root("to mount")
class TestDisk:
    def test_a_disk_without_room_for_the_region_is_told_with_what_is_missing(self, small_disk: Path) -> None:
        with pytest.raises(StoreError, match=r"8 MiB free.*8 MiB \(8,388,608 bytes\) missing"):
            dmh.open(settings("region.size=16MiB", f"store.url=file://{small_disk}/pages"))
        assert list(small_disk.iterdir()) == []

    def test_a_runtime_directory_without_room_is_told(self, small_disk: Path) -> None:
        for n in range(15):
            (small_disk / f"{n}").touch()
        printed = outcome("    opened()", env={"XDG_RUNTIME_DIR": str(small_disk)})
        assert re.match(rf"ServiceError {small_disk}/dmh.* cannot be made: No space left", printed), printed


class TestFewDescriptors:
    def test_a_service_lives_with_256(self) -> None:
        """What many systems gave a process until lately."""
        code = """
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    import numpy as np
    with dmh.open(Config.from_wire(sys.argv[1])) as region:
        array = region.empty(400_000, np.int64)
        guests = [dmh.attach(region.name) for _ in range(20)]
        for turn in range(3):
            array[:] = np.arange(turn, turn + 400_000)
            for n, guest in enumerate(guests):
                there = guest.ndarray(400_000, np.int64, region.offset_of(array))
                assert there[n * 20_000] == turn + n * 20_000
            assert np.array_equal(array, np.arange(turn, turn + 400_000))
        assert region.stats().counters["evicted"] > 1000
        for guest in guests: guest.close()
        print("right")
    """
        assert outcome(code) == "right\n"

    def test_a_program_too_many_is_turned_away_and_the_others_go_on(self) -> None:
        code = """
    import numpy as np
    from dmh.region.connection import find_socket, connect
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, 2000))
    with dmh.open(Config.from_wire(sys.argv[1])) as region:
        resource.setrlimit(resource.RLIMIT_NOFILE, (2000, 2000))
        array = region.zeros(200_000)
        array[:] = 7
        guests = []
        try:
            while len(guests) < 60: guests.append(dmh.attach(region.name))
        except dmh.ServiceError as error:
            print(1 + len(guests), error)
        idle = [connect(find_socket(region.name)) for _ in range(200)]
        for one in idle: one.close()
        assert guests[-1].ndarray(200_000, float, region.offset_of(array)).sum() == array.sum() == 1_400_000
        guests.pop().close()
        dmh.attach(region.name).close()
        for guest in guests: guest.close()
    """
        printed = outcome(code)
        programs = re.match(r"(\d+) (\d+) programs use this service, and it has descriptors for no more", printed)
        assert programs is not None, printed
        assert programs[1] == programs[2]
        assert 1 <= int(programs[1]) <= 20


PIPE_PROGRAM = """
    import fcntl, glob
    import numpy as np

    def turns(region, turns, seed=3):
        rng = np.random.default_rng(seed)
        array = region.empty(region.size // 8, np.int64)
        shadow = rng.integers(0, 1 << 60, len(array))
        array[:] = shadow
        for _ in range(turns):
            at = rng.integers(0, len(array), 60)
            array[at] += 1
            shadow[np.unique(at)] += 1
            region.evict(array)
        assert np.array_equal(array, shadow)
        counters = region.stats().counters
        assert counters["evicted"] >= (region.size // region.page_size)
        print("right", counters["poisoned"])

    def capture_pipe(region):
        # The one of which the launcher has both ends.
        launcher = region._connection._launcher.pid
        links = {link: os.readlink(link) for link in glob.glob(f"/proc/{launcher}/fd/*")}
        pipes = [link for link, to in links.items() if to.startswith("pipe:") and list(links.values()).count(to) == 2]
        return os.open(pipes[0], os.O_RDWR | os.O_NONBLOCK)
    """


def without_capabilities() -> None:
    """In a child: whatever it executes has neither CAP_SYS_ADMIN nor CAP_SYS_RESOURCE, and is bound like any user."""
    for capability in (21, 24):
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


class TestSmallPipes:
    @pytest.mark.parametrize("page_size", ["4KiB", "64KiB", "2MiB"])
    def test_the_evictor_works_with_a_pipe_of_one_page(self, page_size: str) -> None:
        """The smallest that the kernel makes: every capture of a larger page goes through it in pieces."""
        code = (
            PIPE_PROGRAM
            + """
    with dmh.open(Config.from_wire(sys.argv[1])) as region:
        pipe = capture_pipe(region)
        assert fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 1) == 4096
        turns(region, 2)
        assert fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ) == 4096
    """
        )
        size = {"4KiB": "1MiB", "64KiB": "4MiB", "2MiB": "20MiB"}[page_size]
        limit = {"4KiB": "256KiB", "64KiB": "1MiB", "2MiB": "16MiB"}[page_size]
        overrides = [f"region.page_size={page_size}", f"region.size={size}", f"memory.limit={limit}"]
        assert outcome(code, *overrides) == "right 0\n"

    @as_root("to give up what makes pipes unlimited")
    @pytest.mark.parametrize("page_size", ["4KiB", "64KiB"])
    def test_a_user_whose_pipes_are_used_up_gets_the_smallest_and_it_works(
        self, page_size: str, tmp_path: Path
    ) -> None:
        code = (
            PIPE_PROGRAM
            + """
    most = int(open("/proc/sys/fs/pipe-user-pages-soft").read())
    hoard = []
    for _ in range(most // 16 + 8):
        hoard.append(os.pipe())
    with dmh.open(Config.from_wire(sys.argv[1])) as region:
        size = fcntl.fcntl(capture_pipe(region), fcntl.F_GETPIPE_SZ)
        assert size < 1 << 20, size  # not what was asked for
        turns(region, 2)
    """
        )
        overrides = [f"region.page_size={page_size}", "region.size=4MiB", "memory.limit=1MiB"]
        assert outcome(code, *overrides, preexec_fn=without_capabilities) == "right 0\n"


def test_a_user_without_any_pipe_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """fs.pipe-user-pages-hard is the whole machine's, and not for a test to change: the kernel's answer is played."""

    def refused(wanted: int) -> int:
        raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))

    monkeypatch.setattr(limits, "pipe_bytes", refused)
    with pytest.raises(ServiceError, match=r"no pipe can be made.*pipe-user-pages-hard is \d+ pages"):
        check(settings())


def test_a_stopped_flood_of_connections_leaves_the_service_alive(open_region: OpenRegion) -> None:
    """More connections than the launcher has descriptors for: turned away, not fatal."""
    code = """
    from dmh.region.connection import find_socket, connect
    resource.setrlimit(resource.RLIMIT_NOFILE, (4000, 4000))
    held = []
    for _ in range(int(sys.argv[3])):
        try: held.append(connect(find_socket(sys.argv[2])))
        except dmh.ServiceError: pass
    """
    region = open_region()
    launcher = region._connection._launcher
    assert launcher is not None
    resource.prlimit(launcher.pid, resource.RLIMIT_NOFILE, (64, 64))
    flood = run_python(OPEN + code, settings().to_wire(), region.name, 300)
    assert flood.returncode == 0, flood.stderr
    array = region.zeros(200_000)
    array[:] = 3
    assert array.sum() == 600_000
    assert launcher.poll() is None
    region.close()

"""Idle sources against programs whose accesses are known: what was used since the mark is found, and nothing else."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmh.errors import KernelError
from dmh.evict import unmap
from dmh.evict.idle import choose_source, page_idle
from dmh.evict.idle import unmap as unmap_source
from dmh.evict.idle.base import IdleSource
from dmh.evict.idle.unmap import UnmapSource
from dmh.evict.swap import SwapWatch
from dmh.evict.unmap import Unmapper
from dmh.lspt.table import Bounds, Table
from dmh.native import check, ffi, lib

PAGES, SPARE = 128, 128
"""The newest pages may not be on the kernel's lists yet, and are then passed over: as many again stand behind those that
the tests look at."""

PROGRAM = """
    import os, sys
    import numpy as np
    from dmh.native import ffi, lib
    fd, bytes_, size = map(int, sys.argv[1:])
    base = lib.dmh_map_region(fd, bytes_, 1 << 21, 1)
    how, features = ffi.new("int *"), ffi.new("uint64_t *")
    uffd = lib.dmh_uffd_open(how, features)
    assert uffd >= 0 and lib.dmh_uffd_register(uffd, base, bytes_) == 0
    memory = np.frombuffer(ffi.buffer(base, bytes_), np.uint8).reshape(-1, size)
    words = memory.view(np.uint64)
    print(int(ffi.cast("uintptr_t", base)), flush=True)
    for line in sys.stdin:
        what, *numbers = line.split()
        pages = list(map(int, numbers))
        if what == "read":
            for page in pages:
                memory[page, size // 2]
        elif what == "write":
            for page in pages:
                memory[page, size - 1] = 7
        elif what == "add":
            for _ in range(pages[0]):
                words[: pages[1], ::64] += 1
        print("done", flush=True)
"""


class Program:
    """A process that maps the memory as an application does, and touches the pages it is told to."""

    def __init__(self, fd: int, size: int, page_size: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), str(fd), str(size), str(page_size)],
            pass_fds=[fd],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.base = int(self.process.stdout.readline())

    def start(self, what: str, *numbers: int) -> None:
        assert self.process.stdin is not None
        print(what, *numbers, file=self.process.stdin, flush=True)

    def wait(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "done\n"

    def ready(self) -> bool:
        """Is the last command done?"""
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def read(self, *pages: int) -> None:
        self.start("read", *pages)
        self.wait()

    def write(self, *pages: int) -> None:
        self.start("write", *pages)
        self.wait()

    def end(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class Stage:
    """Memory full of pages, the programs that use it, and the native context that an idle source looks through."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.size = (PAGES + SPARE) * page_size
        self.fd = check(lib.dmh_region_create(b"dmh-test", self.size), "memfd")
        table_fd = Table.create(PAGES + SPARE, page_size, 1, 1, Bounds(PAGES, PAGES, 1))
        self.table = Table(table_fd)
        os.close(table_fd)
        self.context: Any = lib.dmh_ctx_new(self.table.raw, self.fd, ffi.NULL, 0)
        self.programs: list[Program] = []
        for page in range(PAGES + SPARE):
            os.pwrite(self.fd, bytes([page % 251]) * page_size, page * page_size)

    def join(self) -> Program:
        """A program that has the memory mapped, none of it in its page table.  The source must exist already."""
        program = Program(self.fd, self.size, self.page_size)
        self.programs.append(program)
        uffd = check(lib.dmh_uffd_open(ffi.new("int *"), ffi.new("uint64_t *")), "userfaultfd")
        lib.dmh_view_add(self.context, len(self.programs), uffd, program.base, program.process.pid, 0)
        return program

    def close(self) -> None:
        for number, program in enumerate(self.programs, 1):
            lib.dmh_view_remove(self.context, number)
            program.end()
        self.table.close()
        os.close(self.fd)


@pytest.fixture(params=[4096, 65536], ids=["4KiB", "64KiB"])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    made = Stage(request.param)
    yield made
    made.close()


def pages(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


ALL = pages(*range(PAGES))


def which(mask: np.ndarray) -> set[int]:
    return set(np.flatnonzero(mask).tolist())


@pytest.fixture(params=["unmap", "page_idle"])
def make(request: pytest.FixtureRequest) -> Callable[[Stage], IdleSource]:
    """Both sources are held to the same behaviour; a skipped test names the feature that is missing here."""

    def made(stage: Stage) -> IdleSource:
        reason = unmap_source.probe(stage.page_size) if request.param == "unmap" else page_idle.probe()
        if reason:
            pytest.skip(reason)
        if request.param == "unmap":
            return UnmapSource(Unmapper(stage.context))
        return page_idle.PageIdleSource(stage.context)

    return made


def test_what_was_used_since_the_mark_is_found_and_nothing_else(
    stage: Stage, make: Callable[[Stage], IdleSource]
) -> None:
    source = make(stage)
    program = stage.join()
    program.read(*range(PAGES + SPARE))
    assert source.mark(ALL).all()
    assert which(source.used(ALL)) == set()
    program.read(3, 40, 41, 99)
    program.write(7, 127)
    assert which(source.used(ALL)) == {3, 7, 40, 41, 99, 127}
    # Marked again, they are judged anew; those that were not keep their mark.
    assert source.mark(pages(3, 41)).all()
    program.write(41)
    assert which(source.used(ALL)) == {7, 40, 41, 99, 127}


def test_use_by_either_of_two_programs_counts(stage: Stage, make: Callable[[Stage], IdleSource]) -> None:
    source = make(stage)
    one, two = stage.join(), stage.join()
    one.read(*range(PAGES + SPARE))
    assert source.mark(ALL).all()
    one.read(5, 6)
    two.read(6, 7)
    two.write(90)
    assert which(source.used(ALL)) == {5, 6, 7, 90}


def test_a_page_that_two_programs_have_mapped_is_not_taken_for_idle(stage: Stage) -> None:
    """The kernel does not unmap it, so it cannot be marked; the others of its batch are."""
    if reason := unmap_source.probe(stage.page_size):
        pytest.skip(reason)
    source = UnmapSource(Unmapper(stage.context))
    one, two = stage.join(), stage.join()
    one.read(*range(PAGES + SPARE))
    two.read(10, 11)
    assert which(~source.mark(ALL)) == {10, 11}
    assert which(source.used(ALL)) == {10, 11}


def test_marks_lose_no_write(stage: Stage, make: Callable[[Stage], IdleSource]) -> None:
    """A program adds to every page as fast as it can while all of them are marked again and again."""
    source = make(stage)
    program = stage.join()
    before = np.frombuffer(os.pread(stage.fd, stage.size, 0), np.uint64).reshape(PAGES + SPARE, -1)[:PAGES, ::64].copy()
    times = rounds = found = 0
    while rounds < 50 or not found:
        program.start("add", 200, PAGES)
        times += 200
        while not program.ready():
            source.mark(ALL)
            found += int(source.used(ALL).sum())
            rounds += 1
        program.wait()
    after = np.frombuffer(os.pread(stage.fd, stage.size, 0), np.uint64).reshape(PAGES + SPARE, -1)[:PAGES, ::64]
    assert (after - before == times).all()


def test_page_idle_sets_and_reads_the_bits_of_the_page_s_frames(tmp_path: Path) -> None:
    """Against a file that stands in for the kernel's bitmap (but overwrites, where the kernel would OR)."""
    if lib.dmh_probe_frames() < 0:
        pytest.skip("/proc/PID/pagemap does not show frame numbers to this user (CAP_SYS_ADMIN)")
    bitmap = tmp_path / "bitmap"
    with bitmap.open("wb") as file:
        file.truncate(1 << 30)  # sparse: bits for 32 TiB of frames, wherever this machine's are
    stage = Stage(4096)
    try:
        source = page_idle.PageIdleSource(stage.context, bitmap)
        program = stage.join()
        program.read(*range(PAGES + SPARE))
        (frame,) = _frames(program, stage, 20)
        assert which(source.mark(pages(20))) == {0}
        words = np.memmap(bitmap, np.uint64, "r+")
        assert int(words[frame // 64]) == 1 << frame % 64
        assert which(source.used(pages(20))) == set()
        words[frame // 64] ^= np.uint64(1 << frame % 64)
        assert which(source.used(pages(20))) == {0}
        assert which(source.used(pages(21))) == {0}, "a frame that was never marked has counted as idle"
    finally:
        stage.close()


def _frames(program: Program, stage: Stage, page: int) -> list[int]:
    address = program.base + page * stage.page_size
    with Path(f"/proc/{program.process.pid}/pagemap").open("rb", buffering=0) as file:
        file.seek(address // 4096 * 8)
        entries = np.frombuffer(file.read(stage.page_size // 4096 * 8), np.uint64)
    return [int(entry) & ((1 << 55) - 1) for entry in entries]


SWAPS = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"


@pytest.fixture
def system(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A /proc and a /sys/fs/cgroup with swap or without, and the process 42 in the group /a/b."""

    def made(*, swap: bool, group: str = "0::/a/b", **limits: str) -> tuple[Path, Path]:
        proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
        (proc / "42").mkdir(parents=True)
        (cgroups / "a" / "b").mkdir(parents=True)
        (proc / "swaps").write_text(SWAPS + ("/dev/sda2   partition\t1048572\t\t0\t\t-2\n" if swap else ""))
        (proc / "42" / "cgroup").write_text(group + "\n")
        for name, value in limits.items():
            (cgroups / {"root": ".", "a": "a", "b": "a/b"}[name] / "memory.swap.max").write_text(value + "\n")
        return proc, cgroups

    return made


@pytest.mark.parametrize(
    ("limits", "group", "safe"),
    [
        ({}, "0::/a/b", False),
        ({"a": "max", "b": "max"}, "0::/a/b", False),
        ({"a": "max", "b": "0"}, "0::/a/b", True),
        ({"a": "0", "b": "max"}, "0::/a/b", True),
        ({"root": "0"}, "0::/", True),
        ({"b": "1048576"}, "0::/a/b", False),
        ({"b": "0"}, "4:memory:/a/b", False),
    ],
    ids=["no limits", "max", "own group 0", "group above 0", "namespace's root 0", "some", "cgroup v1"],
)
def test_swap_in_reach_by_the_groups_of_a_process(
    system: Callable[..., tuple[Path, Path]], limits: dict[str, str], group: str, safe: bool
) -> None:
    proc, cgroups = system(swap=True, group=group, **limits)
    reason = SwapWatch(proc, cgroups).in_reach(lambda: [42])
    assert (reason is None) is safe
    assert safe or "/dev/sda2" in str(reason)


def test_without_swap_nothing_is_in_reach(system: Callable[..., tuple[Path, Path]]) -> None:
    assert SwapWatch(*system(swap=False)).in_reach(lambda: [42]) is None


def test_unmap_is_refused_where_there_is_swap(
    system: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    proc, cgroups = system(swap=True)
    (proc / str(os.getpid())).mkdir()
    (proc / str(os.getpid()) / "cgroup").write_text("0::/a\n")
    reason = unmap.probe(proc, cgroups)
    assert reason is not None
    assert "swapoff" in reason
    monkeypatch.setattr(unmap, "probe", lambda: reason)
    with pytest.raises(KernelError, match="swapoff"):
        choose_source("unmap", 4096)
    assert choose_source("auto", 4096) in ("page_idle", "buffer")


def test_unmap_stops_when_swap_appears(
    system: Callable[..., tuple[Path, Path]], caplog: pytest.LogCaptureFixture
) -> None:
    proc, cgroups = system(swap=False)
    stage = Stage(4096)
    try:
        if reason := unmap.probe(proc, cgroups):
            pytest.skip(reason)
        source = UnmapSource(Unmapper(stage.context, proc, cgroups))
        program = stage.join()
        (proc / str(program.process.pid)).mkdir()
        (proc / str(program.process.pid) / "cgroup").write_text("0::/a\n")
        program.read(*range(PAGES + SPARE))
        assert source.mark(pages(1, 2)).all()
        (proc / "swaps").write_text(SWAPS + "/swapfile   file\t1048572\t\t0\t\t-2\n")
        assert not source.mark(pages(3, 4)).any()
        assert which(source.used(pages(3, 4))) == {0, 1}, "pages were unmapped although there is swap"
        assert "/swapfile" in caplog.text
    finally:
        stage.close()

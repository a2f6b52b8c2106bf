"""What atomic eviction stands on: memfds, splice, hole punching, presence.  The facts are those of KERNEL-NOTES."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from userfault import LIBC, MADV_COLLAPSE, PAGE, Memory

from dmh.native import check, ffi, lib

F_ADD_SEALS, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_FUTURE_WRITE, F_GETPIPE_SZ, F_SETPIPE_SZ = 1033, 2, 4, 16, 1032, 1031


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory(64)
    yield made
    made.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    yield ends
    for fd in ends:
        os.close(fd)


@pytest.fixture
def plain(memory: Memory) -> Iterator[mmap.mmap]:
    mapped = mmap.mmap(memory.fd, memory.size)
    yield mapped
    mapped.close()


class TestSplice:
    def test_a_store_after_the_splice_is_in_the_pipe(
        self, memory: Memory, plain: mmap.mmap, pipe: tuple[int, int]
    ) -> None:
        """Capture does not stop the program: what it writes until the punch must still be in what was captured."""
        plain[:PAGE] = b"a" * PAGE
        assert os.splice(memory.fd, pipe[1], PAGE, offset_src=0) == PAGE
        plain[:PAGE] = b"b" * PAGE
        memory.punch(0)
        assert memory.present() == []
        assert os.read(pipe[0], PAGE) == b"b" * PAGE

    def test_a_store_after_the_punch_is_not(self, memory: Memory, plain: mmap.mmap, pipe: tuple[int, int]) -> None:
        """After the punch the captured content is final: later stores go to a new page and are evicted with that."""
        plain[:PAGE] = b"a" * PAGE
        os.splice(memory.fd, pipe[1], PAGE, offset_src=0)
        memory.punch(0)
        plain[:4] = b"late"
        assert os.read(pipe[0], PAGE) == b"a" * PAGE
        assert os.pread(memory.fd, 6, 0) == b"late\0\0"

    def test_a_hole_comes_out_as_zeros(self, memory: Memory, pipe: tuple[int, int]) -> None:
        """Presence must be checked before the splice: nothing else tells a hole from a page of zeros."""
        assert os.splice(memory.fd, pipe[1], PAGE, offset_src=3 * PAGE) == PAGE
        assert os.read(pipe[0], PAGE) == bytes(PAGE)
        assert memory.present() == []

    def test_a_pipe_holds_sixteen_pages_and_can_be_made_to_hold_256(
        self, memory: Memory, plain: mmap.mmap, pipe: tuple[int, int]
    ) -> None:
        """How long a run one capture may take."""
        plain[:] = b"x" * memory.size
        fcntl.fcntl(pipe[1], F_SETPIPE_SZ, 16 * PAGE)
        moved = 0
        with pytest.raises(BlockingIOError):
            while True:
                moved += os.splice(
                    memory.fd, pipe[1], memory.size - moved, offset_src=moved, flags=os.SPLICE_F_NONBLOCK
                )
        assert moved == 16 * PAGE
        assert fcntl.fcntl(pipe[1], F_SETPIPE_SZ, 256 * PAGE) == 256 * PAGE

    def test_a_leftover_byte_costs_a_slot(self, memory: Memory, plain: mmap.mmap, pipe: tuple[int, int]) -> None:
        """Why the pipe must be read empty between two runs."""
        plain[:] = b"x" * memory.size
        fcntl.fcntl(pipe[1], F_SETPIPE_SZ, 16 * PAGE)
        assert os.splice(memory.fd, pipe[1], PAGE, offset_src=0) == PAGE
        os.read(pipe[0], PAGE - 1)
        moved = 0
        with pytest.raises(BlockingIOError):
            while True:
                moved += os.splice(
                    memory.fd, pipe[1], memory.size - moved, offset_src=moved, flags=os.SPLICE_F_NONBLOCK
                )
        assert moved == 15 * PAGE


class TestPresence:
    def test_seek_tells_the_truth(self, memory: Memory, plain: mmap.mmap) -> None:
        """The only look at presence that neither faults nor makes pages."""
        for page in (1, 2, 5, 63):
            plain[page * PAGE] = 1
        assert memory.present() == [1, 2, 5, 63]
        memory.punch(2)
        assert memory.present() == [1, 5, 63]
        os.pwrite(memory.fd, b"", 7 * PAGE)
        assert memory.present() == [1, 5, 63]

    def test_a_page_of_zeros_is_present(self, memory: Memory, plain: mmap.mmap) -> None:
        """Presence is not content: a page that was filled with zeros must not count as absent."""
        plain[:PAGE] = bytes(PAGE)
        assert memory.present() == [0]

    def test_pread_and_mincore_make_no_page(self, memory: Memory, plain: mmap.mmap) -> None:
        """Looking must not fill: tools and tests may use both on a live region."""
        assert os.pread(memory.fd, PAGE, 0) == bytes(PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(plain))
        seen = (ctypes.c_ubyte * 64)()
        assert LIBC.mincore(ctypes.c_void_p(address), ctypes.c_size_t(memory.size), seen) == 0
        assert not any(seen)
        assert memory.present() == []

    def test_reading_an_unregistered_mapping_makes_zeros_for_everybody(self, memory: Memory) -> None:
        """The worst failure: wrong bytes without an error.  It is why every mapping of a region is registered."""
        watched, stray = memory.view(), memory.view(registered=False)
        assert lib.dmh_touch(stray.pointer, 1, 1) == 0
        assert memory.present() == [0]
        assert lib.dmh_touch(watched.pointer, 1, 1) == 0  # does not fault: it would hang here
        assert watched.message(0) is None


class TestPunch:
    def test_it_unmaps_everywhere(self, memory: Memory) -> None:
        """No process may keep a page that dmh has taken out: its stores would be lost."""
        views = [memory.view(), memory.view()]
        os.pwrite(memory.fd, b"x" * PAGE, 0)
        assert [lib.dmh_touch(view.pointer, 1, 1) for view in views] == [ord("x")] * 2
        memory.punch(0)
        for view in views:
            assert view.zero(0) in (0, errno.EEXIST)
            assert lib.dmh_touch(view.pointer, 1, 1) == 0

    def test_it_ignores_mlock(self, memory: Memory, plain: mmap.mmap) -> None:
        """A program that locks its memory does not stop eviction (Region.pin is what does)."""
        plain[:PAGE] = b"x" * PAGE
        address = ctypes.addressof(ctypes.c_char.from_buffer(plain))
        if LIBC.mlock(ctypes.c_void_p(address), ctypes.c_size_t(PAGE)) != 0:
            pytest.skip("needs RLIMIT_MEMLOCK of a page")
        memory.punch(0)
        assert memory.present() == []

    def test_the_regions_seals_allow_it_and_stop_resizing(self, memory: Memory, plain: mmap.mmap) -> None:
        """A truncated region would raise SIGBUS in the workers."""
        plain[:PAGE] = b"x" * PAGE
        for size in (memory.size - PAGE, memory.size + PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(memory.fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(
                memory.fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE
            )  # no one may add the seal that the next test is about
        memory.punch(0)
        assert memory.present() == []

    def test_a_seal_against_future_writes_stops_it(self) -> None:
        """The seal that looks harmless and is not: a region that has it could never evict."""
        fd = os.memfd_create("dmh-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, PAGE)
            fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
            assert lib.dmh_punch_file(fd, 0, PAGE) == -errno.EPERM
        finally:
            os.close(fd)


class TestHugePages:
    SIZE = 2 << 20

    @pytest.fixture
    def aligned(self) -> Iterator[Callable[[int], int]]:
        """Maps a memfd at an address where a huge page could be."""
        spaces: list[int] = []

        def make(fd: int) -> int:
            space = LIBC.mmap(None, 2 * self.SIZE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
            base = -(-space // self.SIZE) * self.SIZE
            spaces.append(space)
            assert LIBC.mmap(base, self.SIZE, 3, mmap.MAP_SHARED | 0x10, fd, 0) == base  # MAP_FIXED
            return int(base)

        yield make
        for space in spaces:
            LIBC.munmap(ctypes.c_void_p(space), ctypes.c_size_t(2 * self.SIZE))

    def collapse(self, base: int) -> int:
        done = LIBC.madvise(ctypes.c_void_p(base), ctypes.c_size_t(self.SIZE), MADV_COLLAPSE)
        return 0 if done == 0 else ctypes.get_errno()

    def test_the_regions_mapping_cannot_be_collapsed(self, aligned: Callable[[int], int]) -> None:
        """MADV_NOHUGEPAGE on every mapping keeps the hazard of the next test out."""
        fd = os.memfd_create("dmh-test", os.MFD_CLOEXEC)
        os.ftruncate(fd, self.SIZE)
        os.pwrite(fd, b"x" * self.SIZE, 0)
        if self.collapse(aligned(fd)) != 0:
            os.close(fd)
            pytest.skip("needs MADV_COLLAPSE of shared memory: without it there is no hazard")
        os.close(fd)
        fd = check(lib.dmh_region_create(b"dmh-test", self.SIZE), "memfd")
        os.pwrite(fd, b"x" * self.SIZE, 0)
        base = lib.dmh_map_region(fd, self.SIZE, self.SIZE, 1)
        try:
            assert self.collapse(int(ffi.cast("uintptr_t", base))) == errno.EINVAL
        finally:
            lib.dmh_unmap(base, self.SIZE)
            os.close(fd)

    def test_punching_into_a_huge_page_destroys_what_the_pipe_holds(
        self, aligned: Callable[[int], int], pipe: tuple[int, int]
    ) -> None:
        """Why `not a hole after the punch` is fatal to a worker: the only copy would be gone."""
        fd = os.memfd_create("dmh-test", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, self.SIZE)
            os.pwrite(fd, b"x" * self.SIZE, 0)
            if self.collapse(aligned(fd)) != 0:
                pytest.skip("needs MADV_COLLAPSE of shared memory")
            assert os.splice(fd, pipe[1], PAGE, offset_src=0) == PAGE
            check(lib.dmh_punch_file(fd, 0, PAGE), "punching")
            hole = os.lseek(fd, 0, os.SEEK_DATA) != 0
            captured = os.read(pipe[0], PAGE)
            if hole and captured == b"x" * PAGE:
                pytest.skip("needs a kernel with this hazard: this one splits the huge page and keeps the data")
            assert not hole, "the check after the punch would not notice"
            assert captured == bytes(PAGE)
        finally:
            os.close(fd)


class TestProbe:
    @pytest.mark.parametrize("page_size", [4096, 65536, 2 << 20])
    def test_says_that_this_kernel_will_do(self, page_size: int) -> None:
        assert lib.dmh_probe_capture(page_size) == 0

    def test_leaves_no_descriptor(self) -> None:
        before = len(list(Path("/proc/self/fd").iterdir()))
        lib.dmh_probe_capture(4096)
        assert len(list(Path("/proc/self/fd").iterdir())) == before

    def test_a_pipe_is_as_large_as_this_user_may_have(self) -> None:
        ends = ffi.new("int[2]")
        got = check(lib.dmh_pipe(ends, 1 << 20), "pipe")
        assert got == fcntl.fcntl(ends[1], F_GETPIPE_SZ) >= PAGE
        os.close(ends[0])
        os.close(ends[1])

"""Page contents in C: the hash against the xxhash package, the zero test, and pages to and from files."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from dmh.native import ffi, lib, pointer

PAGE_SIZES = [4096 << n for n in range(10)]
LENGTHS = st.integers(4, 400).map(lambda n: 64 * n)  # the hash is for multiples of 64 above 240


def native_hash(data: Any) -> int:
    return int(lib.dmh_hash(pointer(data), len(data)))


class TestHash:
    @pytest.mark.parametrize("size", [256, 320, 1024, 1088, *PAGE_SIZES])
    def test_is_xxh3(self, rng: np.random.Generator, size: int) -> None:
        for data in (rng.integers(0, 256, size, np.uint8), np.zeros(size, np.uint8), np.full(size, 255, np.uint8)):
            assert native_hash(data) == xxhash.xxh3_64_intdigest(data)

    @given(st.integers(0, 2**32), LENGTHS)
    def test_of_any_length_and_content(self, seed: int, size: int) -> None:
        data = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
        assert native_hash(data) == xxhash.xxh3_64_intdigest(data)

    def test_does_not_depend_on_alignment(self, rng: np.random.Generator) -> None:
        data = rng.integers(0, 256, 4096 + 64, np.uint8)
        for shift in range(64):
            part = data[shift : shift + 4096]
            assert native_hash(part) == xxhash.xxh3_64_intdigest(part.tobytes())

    @given(st.integers(0, 4095), st.integers(0, 7))
    def test_every_bit_counts(self, byte: int, bit: int) -> None:
        data = np.arange(4096, dtype=np.uint16).astype(np.uint8)
        before = native_hash(data)
        data[byte] ^= 1 << bit
        assert native_hash(data) != before

    @pytest.mark.parametrize("size", [4096, 65536, 2 << 20])
    def test_of_several_pages(self, rng: np.random.Generator, size: int) -> None:
        data = rng.integers(0, 256, (3, size), np.uint8)
        out = np.empty(3, np.uint64)
        lib.dmh_hash_pages(pointer(data), 3, size, ffi.from_buffer("uint64_t[]", out))
        assert out.tolist() == [xxhash.xxh3_64_intdigest(row) for row in data]


class TestZero:
    @pytest.mark.parametrize("size", PAGE_SIZES)
    def test_zeros(self, size: int) -> None:
        assert lib.dmh_is_zero(pointer(np.zeros(size, np.uint8)), size) == 1

    @given(st.sampled_from([4096, 65536]), st.data())
    def test_one_byte_makes_the_difference(self, size: int, data: st.DataObject) -> None:
        page = np.zeros(size, np.uint8)
        page[data.draw(st.integers(0, size - 1))] = data.draw(st.integers(1, 255))
        assert lib.dmh_is_zero(pointer(page), size) == 0

    def test_the_last_bytes_count(self) -> None:
        for at in (0, 7, 8, 9, 4087, 4088, 4095):
            page = np.zeros(4096, np.uint8)
            page[at] = 1
            assert not lib.dmh_is_zero(pointer(page), 4096), at

    @pytest.mark.parametrize("function", ["dmh_is_zero", "dmh_hash"])
    def test_reads_nothing_behind_the_page(self, function: str) -> None:
        """Behind a page stands the next one, which may be on its way out: reading it would fault."""
        two = mmap.mmap(-1, 2 * mmap.PAGESIZE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(two))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(base + mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        getattr(lib, function)(ffi.cast("uint8_t *", base), mmap.PAGESIZE)  # SIGSEGV if it did
        libc.mprotect(ctypes.c_void_p(base + mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 3)


class TestFiles:
    @pytest.fixture
    def fd(self, tmp_path: Path) -> Iterator[int]:
        opened = os.open(tmp_path / "pages", os.O_RDWR | os.O_CREAT)
        yield opened
        os.close(opened)

    @staticmethod
    def fetch(fd: int, index: Any, places: Any, out: Any, *, nowait: bool = False) -> tuple[int, list[bool]]:
        found = np.full(len(places), 7, np.uint8)
        result = lib.dmh_fetch_pages(
            fd, pointer(index, "uint64_t[]"), pointer(places, "uint64_t[]"), len(places), out.shape[1],
            ffi.from_buffer("uint8_t[]", out), ffi.from_buffer("uint8_t[]", found), nowait,
        )  # fmt: skip
        return result, found.tolist()

    @staticmethod
    def write(fd: int, places: Any, data: Any) -> int:
        return int(lib.dmh_write_pages(fd, pointer(places, "uint64_t[]"), len(places), data.shape[1], pointer(data)))

    @pytest.mark.parametrize("size", [4096, 65536, 2 << 20])
    @pytest.mark.parametrize("nowait", [False, True])
    def test_pages_come_back_from_any_places(self, fd: int, rng: np.random.Generator, size: int, nowait: bool) -> None:
        places = np.array([7, 8, 9, 3, 0, 1, 12], np.uint64)  # runs, backwards, alone
        data = rng.integers(0, 256, (len(places), size), np.uint8)
        assert self.write(fd, places, data) == 0
        for place, row in zip(places.tolist(), data, strict=True):
            assert os.pread(fd, size, place * size) == row.tobytes()
        index = np.zeros(16, np.uint64)
        index[places] = 1
        asked = rng.permutation(13).astype(np.uint64)  # those that were never stored, too
        out = np.full((13, size), 99, np.uint8)
        result, found = self.fetch(fd, index, asked, out, nowait=nowait)
        if nowait and result == -errno.EAGAIN:
            pytest.skip("needs a page cache that has kept what was just written")
        if nowait and result == -errno.EOPNOTSUPP:
            pytest.skip("needs a file system with RWF_NOWAIT")
        assert result == 0
        assert found == [bool(index[page]) for page in asked]
        for page, row, there in zip(asked.tolist(), out, found, strict=True):
            if there:
                assert np.array_equal(row, data[places.tolist().index(page)])

    def test_no_pages(self, fd: int) -> None:
        assert self.fetch(fd, np.zeros(1, np.uint64), np.empty(0, np.uint64), np.empty((0, 4096), np.uint8)) == (0, [])

    def test_a_file_that_ends_early_is_told_of_the_page_and_gives_no_zeros(self, fd: int) -> None:
        os.ftruncate(fd, 4096 + 100)
        index, places, out = np.ones(2, np.uint64), np.array([0, 1], np.uint64), np.empty((2, 4096), np.uint8)
        assert self.fetch(fd, index, places, out) == (0, [1, 2])

    def test_a_descriptor_that_cannot_be_used_is_an_error(self, fd: int) -> None:
        os.close(fd)
        index, places, out = np.ones(1, np.uint64), np.array([0], np.uint64), np.empty((1, 4096), np.uint8)
        try:
            assert self.fetch(fd, index, places, out)[0] == -errno.EBADF
            assert self.write(fd, places, out) == -errno.EBADF
        finally:
            assert os.open(os.devnull, os.O_RDONLY) == fd  # for the fixture to close

    def test_a_hole_is_punched(self, fd: int) -> None:
        os.pwrite(fd, b"x" * 16384, 0)
        os.fsync(fd)
        if (result := lib.dmh_punch_file(fd, 4096, 8192)) == -errno.EOPNOTSUPP:
            pytest.skip("needs a file system with FALLOC_FL_PUNCH_HOLE")
        assert result == 0
        assert os.pread(fd, 16384, 0) == b"x" * 4096 + b"\0" * 8192 + b"x" * 4096

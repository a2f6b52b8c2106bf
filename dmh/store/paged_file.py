"""Pages in a sparse file, page n at byte n * page_size, with an index of what is stored.

The part that `file:` and `memory:` share: they differ in where the file lives.  The index is shared memory, out of
reach of whoever may write to the file: an array of 64-bit words, 1 where the file has that page, else 0.  The evictor
writes it, after the page; the resolvers read it.  A place that follows from the page
number needs no look-up and keeps runs of pages runs in the file, which is worth more here than a log's sequential
writes: the kernel's page cache absorbs the rest.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from dmh.errors import StoreUnavailable
from dmh.native import ffi, lib
from dmh.store.base import Mask, PageBytes, PageNumbers, Store, StoreSpec

HOLE_BYTES = 1 << 20
"""Deleted runs shorter than this keep their blocks in the file: punching costs some 80 µs a call whatever the
length.
"""


def make_index(spec: StoreSpec) -> int:
    """The index of a new, empty page file."""
    fd = os.memfd_create("dmh-page-index", os.MFD_CLOEXEC)
    os.ftruncate(fd, spec.pages * 8)
    return fd


class PagedFile(Store):
    """A store over two descriptors: the page file and its index."""

    def __init__(self, spec: StoreSpec, descriptors: Sequence[int]) -> None:
        self.spec = spec
        self._fd, self._index_fd = descriptors
        memory = mmap.mmap(self._index_fd, spec.pages * 8)
        self._index: npt.NDArray[np.uint64] = np.frombuffer(memory, np.uint64)
        self._index_pointer = ffi.from_buffer("uint64_t[]", self._index)

    @classmethod
    def open(cls, spec: StoreSpec, descriptors: Sequence[int]) -> Self:
        return cls(spec, descriptors)

    def get_many(self, pages: PageNumbers, out: PageBytes) -> Mask:
        found = np.empty(len(pages), np.uint8)
        result = lib.dmh_fetch_pages(
            self._fd, self._index_pointer, *self._arguments(pages), ffi.from_buffer("uint8_t[]", out),
            ffi.from_buffer("uint8_t[]", found), 0
        )  # fmt: skip
        self._check(result, "reading")
        return found

    def local(self) -> tuple[int, Any]:
        """For the monitor, which may read pages itself where that cannot block: the page file and a pointer to its
        index.
        """
        return self._fd, self._index_pointer

    def put_many(self, pages: PageNumbers, data: PageBytes) -> None:
        source = ffi.from_buffer("uint8_t[]", data)
        self._check(lib.dmh_write_pages(self._fd, *self._arguments(pages), source), "writing")
        self._index[pages] = 1

    def delete_many(self, pages: PageNumbers) -> None:
        self._index[pages] = 0
        ordered = np.sort(pages)
        for run in np.split(ordered, np.flatnonzero(np.diff(ordered) != 1) + 1):
            if len(run) * self.spec.page_size >= HOLE_BYTES:
                offset = int(run[0]) * self.spec.page_size
                lib.dmh_punch_file(self._fd, offset, len(run) * self.spec.page_size)

    def flush(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._index_fd)

    def stats(self) -> dict[str, Any]:
        return {"pages": int(np.count_nonzero(self._index)), "bytes_on_disk": os.fstat(self._fd).st_blocks * 512}

    def _arguments(self, pages: PageNumbers) -> tuple[Any, int, int]:
        return ffi.from_buffer("uint64_t[]", pages), len(pages), self.spec.page_size

    def _check(self, result: int, doing: str) -> None:
        if result < 0:
            raise StoreUnavailable(f"{doing} {self.spec.url} failed: {os.strerror(-result)}", region=self.spec.region)

"""Pages in a sparse file, page n at byte n * page_size, with an index of what is stored and each page's checksum.

The part that `file:` and `memory:` share: they differ in where the two files live.  The index is an array of 64-bit
words mapped by every process, one a page: 0 where the file has no such page, else the page's XXH3-64 (a checksum of 0
is kept as 1). The evictor writes it, after the page; the resolvers read it.  A place that follows from the page
number needs no look-up and keeps runs of pages runs in the file, which is worth more here than a log's sequential
writes: the kernel's page cache absorbs the rest.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from dmh.errors import PageCorrupt, StoreUnavailable
from dmh.native import ffi, lib
from dmh.store.base import Mask, PageBytes, PageNumbers, Store, StoreSpec

HOLE_BYTES = 1 << 20
"""Deleted runs shorter than this keep their blocks in the file: punching costs some 80 µs a call whatever the
length.
"""


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
        found = np.empty(len(pages), np.bool_)
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
        sums = np.empty(len(pages), np.uint64)
        source = ffi.from_buffer("uint8_t[]", data)
        lib.dmh_hash_pages(source, len(pages), self.spec.page_size, ffi.from_buffer("uint64_t[]", sums))
        self._check(lib.dmh_write_pages(self._fd, *self._arguments(pages), source), "writing")
        self._index[pages] = np.maximum(sums, 1)

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
        if result == 0:
            return
        reason = os.strerror(-result)
        if -result == errno.ENODATA:
            raise PageCorrupt(
                f"{self.spec.url} was truncated: pages that were stored are beyond its end", region=self.spec.region
            )
        raise StoreUnavailable(f"{doing} {self.spec.url} failed: {reason}", region=self.spec.region)

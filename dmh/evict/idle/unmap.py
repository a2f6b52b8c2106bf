"""Idle source `unmap`: take the page out of the page tables and see whether it comes back.

    mark(p):  process_madvise(MADV_PAGEOUT) on p in every program that has the region; p stays in memory, because
              there is no swap
    used(p):  is p in a program's page table again (/proc/PID/pagemap)?

A use between the two is an ordinary minor fault of the kernel's, without a userfaultfd message.  The kernel passes
over a page that two programs have mapped; it cannot be marked, and `mark` says so.  One batch is one system call a
program and the reads of its pagemap (about 1 µs a page).
"""

from __future__ import annotations

import os

import numpy as np

from dmh.evict import unmap
from dmh.evict.idle.base import IdleSource, Mask, Pages
from dmh.evict.unmap import Unmapper
from dmh.native import ffi, lib

FAULT_AROUND = 65536
"""Bytes that the kernel maps at once when an unmapped page is read, unless the mapping keeps it from doing so."""


def probe(page_size: int) -> str | None:
    """Why this source is not to be had here; None where it is."""
    if reason := unmap.probe():
        return reason
    how, features = ffi.new("int *"), ffi.new("uint64_t *")
    fd = lib.dmh_uffd_open(how, features)
    if fd >= 0:
        os.close(fd)
    if page_size < FAULT_AROUND and not (fd >= 0 and lib.dmh_uffd_exact(features[0])):
        return (
            "this kernel maps up to 16 pages when one is read (userfaultfd write protection of shared memory, which "
            "would keep it from that, needs Linux 5.19): unused neighbours would count as used"
        )
    return None


class UnmapSource(IdleSource):
    """Marks by unmapping."""

    name = "unmap"

    def __init__(self, unmapper: Unmapper) -> None:
        self._unmapper = unmapper

    def mark(self, pages: Pages) -> Mask:
        return self._unmapper.mark(pages).astype(np.bool_)

    def used(self, pages: Pages) -> Mask:
        return self._unmapper.mapped(pages).astype(np.bool_)

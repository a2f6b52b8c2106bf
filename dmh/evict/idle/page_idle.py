"""Idle source `page_idle`: the kernel's idle page tracking (CONFIG_IDLE_PAGE_TRACKING).

    mark(p):  set the idle flag of p's frames in /sys/kernel/mm/page_idle/bitmap
    used(p):  has the kernel cleared one of them?  It does when it finds an accessed bit in any page table.

The bitmap holds one bit a physical frame, in aligned 64-bit words; bits written as 0 change nothing.  A page's frames
are found in /proc/PID/pagemap, whose frame numbers need CAP_SYS_ADMIN.  Nothing is unmapped, so a use costs the
program nothing, and a page that several programs have mapped can be marked.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from dmh.errors import KernelError
from dmh.evict.idle.base import IdleSource, Mask, Pages
from dmh.native import check, ffi, lib

BITMAP = Path("/sys/kernel/mm/page_idle/bitmap")


def probe(bitmap: Path = BITMAP) -> str | None:
    """Why this source is not to be had here; None where it is."""
    if not bitmap.exists():
        return f"this kernel has no {bitmap} (CONFIG_IDLE_PAGE_TRACKING)"
    if not os.access(bitmap, os.R_OK | os.W_OK):
        return f"{bitmap} may not be written by this user"
    if lib.dmh_probe_frames() < 0:
        return "/proc/PID/pagemap does not show frame numbers to this user (CAP_SYS_ADMIN)"
    return None


class PageIdleSource(IdleSource):
    """Marks by the kernel's own flag."""

    name = "page_idle"

    def __init__(self, context: Any, bitmap: Path = BITMAP) -> None:
        """`context` is the native one of this process, whose views are looked through."""
        if reason := probe(bitmap):
            raise KernelError(f"evictor.idle=page_idle: {reason}")
        self._context = context
        self._fd = os.open(bitmap, os.O_RDWR | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)
        lib.dmh_ctx_look(context)

    def mark(self, pages: Pages) -> Mask:
        marked = np.zeros(len(pages), np.uint8)
        if len(pages):
            result = lib.dmh_mark_page_idle(
                self._context, self._fd,
                ffi.from_buffer("uint64_t[]", pages), len(pages),
                ffi.from_buffer("uint8_t[]", marked),
            )  # fmt: skip
            check(result, "marking pages as idle")
        return marked.astype(np.bool_)

    def used(self, pages: Pages) -> Mask:
        used = np.zeros(len(pages), np.uint8)
        if len(pages):
            result = lib.dmh_look_page_idle(
                self._context, self._fd,
                ffi.from_buffer("uint64_t[]", pages), len(pages),
                ffi.from_buffer("uint8_t[]", used),
            )  # fmt: skip
            check(result, "reading which pages are idle")
        return used.astype(np.bool_)

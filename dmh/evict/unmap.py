"""Takes pages out of the page tables of every program, many at a time, and leaves them in memory.

Owns the question whether that is safe: MADV_PAGEOUT writes to swap where there is any, so there must be none in reach
(`dmh.evict.swap`).  The idle source `unmap` makes use of it.  Capture does not: of scattered pages the kernel unmaps
each by itself and interrupts the processors that run the program twice for it, where a punch does so once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmh.evict.swap import CGROUPS, PROC, SwapWatch
from dmh.native import ffi, lib

log = logging.getLogger("dmh")

Pages = npt.NDArray[np.uint64]


def probe(proc: Path = PROC, cgroups: Path = CGROUPS) -> str | None:
    """Why pages of programs cannot be unmapped here; None where they can."""
    if reason := SwapWatch(proc, cgroups).in_reach(lambda: [os.getpid()]):
        return reason
    result = lib.dmh_probe_unmap()
    if result < 0:
        return (
            f"unmapping another process's page does not work here ({os.strerror(-result)}): it needs Linux 5.10, "
            "CAP_SYS_NICE and the right to trace the program"
        )
    return None


class Unmapper:
    """Unmaps through one process's native context.  Pauses, with one warning, where swap appears or a program cannot
    be looked into.
    """

    def __init__(self, context: Any, proc: Path = PROC, cgroups: Path = CGROUPS) -> None:
        """`context` is the native one of this process, whose views are looked through.  `probe` first."""
        self._context = context
        self._swap = SwapWatch(proc, cgroups)
        self._pids = ffi.new(f"int[{lib.DMH_MAX_VIEWS}]")
        self._paused: str | None = None
        lib.dmh_ctx_look(context)

    def mark(self, pages: Pages) -> npt.NDArray[np.uint8]:
        """Unmap these pages, if that is safe now; 0 for those that are mapped all the same."""
        marked = np.zeros(len(pages), np.uint8)
        arrays = ffi.from_buffer("uint64_t[]", pages), len(pages), ffi.from_buffer("uint8_t[]", marked)
        if not self._run(lambda: lib.dmh_mark_unmap(self._context, *arrays)):
            marked[:] = 0
        return marked

    def mapped(self, pages: Pages) -> npt.NDArray[np.uint8]:
        """1 for pages that are in some program's page table, or may be."""
        mapped = np.ones(len(pages), np.uint8)
        arrays = ffi.from_buffer("uint64_t[]", pages), len(pages), ffi.from_buffer("uint8_t[]", mapped)
        if lib.dmh_look_unmap(self._context, *arrays) < 0:
            mapped[:] = 1
        return mapped

    def _run(self, call: Callable[[], int]) -> bool:
        reason = self._swap.in_reach(self._programs)
        if reason is None and (result := call()) < 0:
            reason = f"a program's pages cannot be looked at ({os.strerror(-result)})"
        if reason != self._paused:
            if reason:
                log.warning("the evictor unmaps no pages for now: %s", reason)
            self._paused = reason
        return reason is None

    def _programs(self) -> list[int]:
        n = lib.dmh_view_pids(self._context, self._pids, lib.DMH_MAX_VIEWS)
        return list(self._pids[0:n])

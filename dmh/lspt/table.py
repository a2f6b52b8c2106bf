"""The local stored page table (LSPT) as Python sees it: the shared memory that every dmh process maps.

Owns the mapping and numpy views of its arrays.  Does not own any rule about states (`dmh.lspt.states`) nor any loop
over pages (the native module).  Used by the launcher, the workers and the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dmh.errors import KernelError
from dmh.lspt.states import SLOT_BITS, SLOT_SHIFT, State, Word, unpack
from dmh.native import check, ffi, lib
from dmh.observe.names import CELLS, COUNTERS


def slots_of(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """The slots that pages' words name; -1 for those that name none."""
    return ((words >> np.uint64(SLOT_SHIFT)) & np.uint64((1 << SLOT_BITS) - 1)).astype(np.int64) - 1


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the table enforces and LPET aims for, in pages."""

    resident_max: int
    high: int
    low: int


class Table:
    """One process's mapping of the shared table.

    Invariants, for `validate`: ``resident <= resident_max``; ``staged <= slots``; ``resident`` is at least the number
    of pages in RESIDENT, FETCHING and EVICTING that hold memory.
    """

    def __init__(self, fd: int) -> None:
        """Map the table behind `fd` (which stays the caller's)."""
        self.raw: Any = lib.dmh_shared_map(fd)
        if self.raw == ffi.NULL:
            raise KernelError(
                "the shared page table cannot be mapped: not a table of this version of dmh, or no memory"
            )
        self.pages = int(self.raw.pages)
        self.page_size = int(self.raw.page_size)
        self.slots = int(self.raw.slots)
        self.workers = int(self.raw.workers)
        self.words: npt.NDArray[np.uint64] = self._array(lib.dmh_words(self.raw), self.pages, np.uint64)
        self.sums: npt.NDArray[np.uint64] = self._array(lib.dmh_sums(self.raw), self.pages, np.uint64)
        self.copies: npt.NDArray[np.uint8] = self._array(lib.dmh_copies(self.raw), self.pages, np.uint8)
        self.pins: npt.NDArray[np.uint8] = self._array(lib.dmh_pins(self.raw), self.pages, np.uint8)
        self.calm: npt.NDArray[np.uint32] = self._array(lib.dmh_calm(self.raw), self.pages, np.uint32)
        self.advice: npt.NDArray[np.uint8] = self._array(lib.dmh_advice(self.raw), self.pages, np.uint8)

    @staticmethod
    def create(pages: int, page_size: int, slots: int, workers: int, bounds: Bounds) -> int:
        """A new table, every page NEW; returns its memfd."""
        fd = check(lib.dmh_shared_create(pages, page_size, slots, workers), "creating the shared page table")
        table = Table(fd)
        table.raw.resident_max, table.raw.high, table.raw.low = bounds.resident_max, bounds.high, bounds.low
        table.close()
        return int(fd)

    @staticmethod
    def _array(base: Any, n: int, dtype: Any) -> Any:
        return np.frombuffer(ffi.buffer(base, n * np.dtype(dtype).itemsize), dtype=dtype)

    def close(self) -> None:
        """Unmap; the arrays must not be used afterwards."""
        if self.raw != ffi.NULL:
            lib.dmh_shared_unmap(self.raw)
            self.raw = ffi.NULL

    @property
    def resident(self) -> int:
        """Pages that occupy, or are promised, memory of the region."""
        return int(self.raw.resident)

    @property
    def staged(self) -> int:
        """Slots of the victim buffer in use."""
        return int(self.raw.staged)

    @property
    def local(self) -> int:
        """Pages held on this machine: what the thresholds are about."""
        return self.resident + self.staged

    def word(self, page: int) -> Word:
        """One page's word, taken apart."""
        return unpack(int(self.words[page]))

    def state(self, page: int) -> State:
        """One page's state."""
        return self.word(page).state

    def states(self) -> dict[State, int]:
        """How many pages are in each state (a moment's view, not a snapshot)."""
        out = np.zeros(16, np.uint64)
        lib.dmh_count_states(self.raw, ffi.from_buffer("uint64_t[]", out))
        return {state: int(out[state]) for state in State}

    def in_state(self, state: State, first: int = 0, end: int | None = None) -> npt.NDArray[np.uint64]:
        """Page numbers in one state, ascending, within first .. end - 1."""
        end = self.pages if end is None else end
        out = np.empty(max(end - first, 0), np.uint64)
        n = lib.dmh_pages_in_state(self.raw, int(state), first, end, ffi.from_buffer("uint64_t[]", out), out.size)
        return out[:n]

    def count(self, worker: int, counter: str, n: int = 1) -> None:
        """Add to one of a worker's counters."""
        lib.dmh_count(self.raw, worker, CELLS[counter], n)

    def counter(self, name: str) -> int:
        """One counter, summed over the workers."""
        cell = CELLS[name]
        return sum(int(lib.dmh_counters_of(self.raw, worker).cell[cell]) for worker in range(self.workers))

    def counters(self) -> dict[str, int]:
        """Every counter, summed over the workers."""
        total = np.zeros(len(COUNTERS), np.uint64)
        for worker in range(self.workers):
            cells = lib.dmh_counters_of(self.raw, worker).cell
            total += np.frombuffer(ffi.buffer(cells), np.uint64)[: len(COUNTERS)]
        return dict(zip(COUNTERS, map(int, total), strict=True))

    def fault_times(self) -> npt.NDArray[np.uint64]:
        """Histogram over the workers: cell k counts faults resolved in 2^k .. 2^(k+1) - 1 ns after they were
        received.
        """
        total = np.zeros(64, np.uint64)
        for worker in range(self.workers):
            total += np.frombuffer(ffi.buffer(lib.dmh_counters_of(self.raw, worker).fault_ns), np.uint64)
        return total

    def validate(self) -> None:
        """Check the invariants that hold at any moment; AssertionError names the one that does not."""
        assert self.resident <= int(self.raw.resident_max), f"{self.resident} pages resident, over the limit"
        assert self.staged <= self.slots, f"{self.staged} of {self.slots} slots in use"

"""How pages leave: captured into the victim buffer, settled, written, acknowledged.

Owns the victim buffer's slots and the one connection that writes to the DMS.  Does not choose (`dmh.evict.lpet`).
Everything here runs in the evictor's main thread, so a page has one writer and the DMS never sees an old version
after a new one.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from dmh.errors import StoreError
from dmh.lspt.states import Copy, State
from dmh.lspt.steps import NUMBERS
from dmh.lspt.table import Table
from dmh.native import ffi, lib
from dmh.store.base import OpenStore
from dmh.store.retry import Retry, Stopped

log = logging.getLogger("dmh")

Pages = npt.NDArray[np.uint64]


class Leaver:
    """Moves pages out of the region.

    Invariant: a slot is taken only here, and freed by whoever moves its page out of STAGED.
    """

    def __init__(
        self,
        table: Table,
        context: Any,
        number: int,
        slots: npt.NDArray[np.uint8],
        pipe: tuple[int, int],
        store: OpenStore,
        retry: Retry,
    ) -> None:
        self._table = table
        self._context = context
        self._number = number
        self._slots = slots
        self._pipe_out, self._pipe_in = pipe
        self._pipe_bytes = lib.dmh_pipe_bytes(self._pipe_in)
        self._store = store
        self._retry = retry
        self._rotor = 0

    def stage(self, pages: Pages) -> Pages:
        """Capture resident pages into the victim buffer and leave them there; returns those that were captured."""
        return self._capture(pages)[0]

    def evict(self, pages: Pages) -> None:
        """Move pages out to the DMS: resident ones by way of the victim buffer, staged ones from there."""
        states = self._table.words[pages] & 15
        self._write_out(pages[states == State.STAGED])
        waiting = pages[states == State.RESIDENT]
        while len(waiting):
            room = self._table.slots - self._table.staged
            if not room:
                # Marked pages fill the buffer: the oldest must make way, whatever they were kept for.
                self.write_staged()
                room = self._table.slots - self._table.staged
                if not room:
                    return
            part, waiting = waiting[:room], waiting[room:]
            self._write_out(*self._capture(part))

    def _capture(self, pages: Pages) -> tuple[Pages, npt.NDArray[np.uint32]]:
        """RESIDENT -> STAGED; returns the pages captured and their slots, ascending."""
        pages = np.sort(pages)
        slots = np.empty(len(pages), np.uint32)
        n = lib.dmh_take_slots(self._context, ffi.from_buffer("uint32_t[]", slots), len(pages), self._rotor)
        pages, slots = pages[:n], slots[:n]
        if not n:
            return pages, slots
        self._rotor = (int(slots[-1]) + 1) % self._table.slots
        outcome = np.zeros(n, np.uint8)
        lib.dmh_capture(
            self._context, self._pipe_out, self._pipe_in, self._pipe_bytes, ffi.from_buffer("uint64_t[]", pages), n,
            ffi.from_buffer("uint32_t[]", slots), ffi.from_buffer("uint8_t[]", outcome),
        )  # fmt: skip
        captured = outcome == lib.DMH_OUT_DIRTY
        lib.dmh_return_slots(
            self._context, ffi.from_buffer("uint32_t[]", slots), ffi.from_buffer("uint8_t[]", outcome), n
        )
        for page in pages[outcome == lib.DMH_OUT_LOST].tolist():
            log.error("page %d is lost: its memory was removed by something outside dmh; access raises SIGBUS", page)
        return pages[captured], slots[captured]

    def _write_out(self, pages: Pages, slots: npt.NDArray[np.uint32] | None = None, *, keep: bool = False) -> bool:
        """Settle staged pages, write the dirty ones, acknowledge.  With `keep` they stay STAGED.  False: not
        written.
        """
        if not len(pages):
            return True
        if slots is None:
            pages, slots = self._slots_of(pages)
        n = len(pages)
        outcome, sums = np.zeros(n, np.uint8), np.empty(n, np.uint64)
        arrays = ffi.from_buffer("uint64_t[]", pages), n, ffi.from_buffer("uint32_t[]", slots)
        lib.dmh_settle(
            self._context, *arrays, ffi.from_buffer("uint8_t[]", outcome), ffi.from_buffer("uint64_t[]", sums), keep
        )
        dirty = outcome == lib.DMH_OUT_DIRTY
        if not dirty.any():
            return True
        pages, slots, sums = pages[dirty], slots[dirty], sums[dirty]
        try:
            self._retry.call("writing pages", lambda: self._store.put_many(pages, self._contents(slots)))
        except Stopped:
            return False
        except StoreError as error:
            # They stay STAGED, which counts against the limit; the next run tries again.
            log.error("%d pages could not be written and stay local: %s", len(pages), error)
            return False
        self._table.count(self._number, "write_calls")
        lib.dmh_step(self._context, NUMBERS["put"])
        lib.dmh_acknowledge(
            self._context, ffi.from_buffer("uint64_t[]", pages), len(pages), ffi.from_buffer("uint32_t[]", slots),
            ffi.from_buffer("uint64_t[]", sums), keep,
        )  # fmt: skip
        return True

    def _slots_of(self, pages: Pages) -> tuple[Pages, npt.NDArray[np.uint32]]:
        """The slots of staged pages; pages that were taken back meanwhile fall out."""
        words = self._table.words[pages]
        slots = ((words >> np.uint64(12)) & np.uint64(0xFFFFF)).astype(np.int64) - 1
        staged = ((words & np.uint64(15)) == State.STAGED) & (slots >= 0)
        order = np.argsort(pages[staged])
        return pages[staged][order], slots[staged][order].astype(np.uint32)

    def _contents(self, slots: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
        first = int(slots[0])
        if int(slots[-1]) - first == len(slots) - 1 and (np.diff(slots) == 1).all():
            return self._slots[first : first + len(slots)]
        return self._slots[slots]

    def flush(self, first: int, end: int) -> bool:
        """Write every page of first .. end - 1 that the DMS does not have, and leave it resident where there is room.

        Each page is captured as a whole, so what is written is a content it had; a program that writes meanwhile
        waits for microseconds, as for any eviction.
        """
        complete = self._write_out(self._table.in_state(State.STAGED, first, end))
        resident = self._table.in_state(State.RESIDENT, first, end)
        resident = resident[self._table.pins[resident] == 0] if len(resident) else resident
        while len(resident):
            if self._table.staged == self._table.slots:
                self.write_staged()  # marked pages give way
            room = max(min(self._table.slots - self._table.staged, 256), 1)
            part, resident = resident[:room], resident[room:]
            captured, slots = self._capture(part)
            complete &= self._write_out(captured, slots, keep=True)
            # What found no slot (the store does not take what is in them) was not written either.
            missed = np.setdiff1d(part, captured, assume_unique=True)
            complete &= not bool(((self._table.words[missed] & np.uint64(15)) == State.RESIDENT).any())
            if len(captured):
                lib.dmh_take_back(self._context, ffi.from_buffer("uint64_t[]", captured), len(captured))
                self._write_out(captured[(self._table.words[captured] & 15) == State.STAGED])
        if complete:
            self._retry.call("flushing the store", self._store.flush)
        return complete

    def discard(self, first: int, count: int) -> Pages:
        """Give up the content of pages: NEW, and forgotten by the DMS.  Returns pages that are being fetched: ask
        again.
        """
        step = 1024
        busy = np.empty(step, np.uint64)
        left: list[Pages] = []
        for start in range(first, first + count, step):
            n = min(step, first + count - start)
            k = lib.dmh_discard(self._context, start, n, ffi.from_buffer("uint64_t[]", busy))
            left.append(busy[:k].copy())
            # What is being fetched must still be there; everything else of these pages is of no use in the DMS any
            # more.
            known = np.flatnonzero(self._table.copies[start : start + n] != Copy.NONE).astype(np.uint64) + np.uint64(
                start
            )
            self._delete(np.setdiff1d(known, left[-1], assume_unique=True))
        return np.concatenate(left) if left else np.empty(0, np.uint64)

    def write_staged(self) -> bool:
        """Write whatever is in the victim buffer.  False: the store did not take it."""
        return self._write_out(self._table.in_state(State.STAGED))

    def delete_stale(self) -> None:
        """Forget in the DMS what has become all zeros since it was written."""
        stale = np.flatnonzero(self._table.copies == Copy.STALE).astype(np.uint64)
        if len(stale):
            self._delete(stale)

    def _delete(self, pages: Pages) -> None:
        if not len(pages):
            return
        self._retry.call("deleting pages", lambda: self._store.delete_many(pages))
        self._table.copies[pages] = Copy.NONE
        self._table.count(self._number, "deleted", len(pages))

"""How pages leave: captured into the victim buffer, settled, written, acknowledged.

Owns the victim buffer's slots and the one connection that writes to the DMS.  Does not choose (`dmh.evict.lpet`).
Everything here runs in the evictor's main thread, but for a batch that is being written (`dmh.evict.writing`), during
which nothing else is asked of the store.  Nothing here waits for a store that does not answer: what could not be
written stays STAGED.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from dmh.errors import StoreError
from dmh.evict.writing import NO_PAGES, Pages, Slots, Writing
from dmh.lspt.states import Copy, State
from dmh.lspt.table import Table, slots_of
from dmh.native import ffi, lib
from dmh.store.base import OpenStore
from dmh.store.retry import Retry

log = logging.getLogger("dmh")

MOST_LEAVING = 1024
"""Pages that leave in one call."""

TRUST_SECONDS = 1.0
"""So long after the store has said that it is the one it was, pages that it has are dropped without asking again."""


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
        self._pipe_out, self._pipe_in = pipe
        self._pipe_bytes = lib.dmh_pipe_bytes(self._pipe_in)
        self._store = store
        self._retry = retry
        self._rotor = 0
        self._leaving = ffi.new("struct dmh_leaving *")
        whole = np.frombuffer(ffi.buffer(self._leaving), np.uint8)
        self._leaving_pages, self._leaving_sums = _field(whole, "page", np.uint64), _field(whole, "sum", np.uint64)
        self._leaving_slots = _field(whole, "slot", np.uint32)
        self._leaving_stayed, self._leaving_lost = _field(whole, "stayed", np.uint64), _field(whole, "lost", np.uint64)
        self._epoch: str | None = None
        with contextlib.suppress(StoreError):  # then the first answer counts as another store's
            self._epoch = store.epoch()
        self._trusted_at = 0.0
        self.writing = Writing(table, context, number, slots, store, retry, self._has_failed)

    def _has_failed(self) -> None:
        self._trusted_at = 0.0

    @property
    def away(self) -> bool:
        """The store has failed and not answered since."""
        return bool(self._retry.since)

    @property
    def rest_ms(self) -> int:
        """Milliseconds until it is worth trying to write again."""
        return int(self._retry.resting * 1000) + 1 if self._retry.since else 0

    def stage(self, pages: Pages) -> Pages:
        """Capture resident pages into the victim buffer and leave them there; returns those that were captured."""
        return self._capture(pages)[0]

    def evict(self, pages: Pages) -> Pages:
        """Move pages out to the DMS: resident ones by way of the victim buffer, staged ones from there.

        Returns those that have not gone: pinned ones, those that are not there (any more), and those that are still
        local because the store did not take them, or because what it did not take fills the victim buffer.  The last
        batch may still be on its way (`finish`).
        """
        resident = (self._table.words[pages] & np.uint64(15)) == State.RESIDENT
        if resident.all():
            return self._evict_resident(pages)
        left, others = self._evict_resident(pages[resident]), pages[~resident]
        self.writing.finish()
        staged = others[(self._table.words[others] & np.uint64(15)) == State.STAGED]
        return np.concatenate([left, np.setdiff1d(others, self._write_out(staged))])

    def _evict_resident(self, pages: Pages) -> Pages:
        pages = np.sort(pages)
        if self._table.raw.quiet:
            pages = np.setdiff1d(pages, self._drop(pages), assume_unique=True)
        left: list[Pages] = []
        while len(pages):
            part, pages = pages[:MOST_LEAVING], pages[MOST_LEAVING:]
            self._check_epoch(part)
            not_looked_at = self._leave(part, left)
            if len(not_looked_at) == len(part) and not self.writing.idle:
                left.append(self.writing.go_on())  # its slots are free again
            elif len(not_looked_at) == len(part):
                # What could not be written fills the buffer, or marked pages do: the oldest must make way, whatever
                # they were kept for.
                self.write_staged()
                if self._table.staged == self._table.slots:
                    return np.concatenate([*left, not_looked_at, pages])
            pages = np.concatenate([not_looked_at, pages]) if len(not_looked_at) else pages
        return np.concatenate(left) if left else NO_PAGES

    def _leave(self, pages: Pages, left: list[Pages]) -> Pages:
        """One batch of resident pages, ascending.  Returns those for which there was no slot; adds those to `left`
        that have not gone for any other reason.
        """
        leaving, n = self._leaving, len(pages)
        self._leaving_pages[:n] = pages
        leaving.n = n
        dirty = lib.dmh_leave(self._context, self._pipe_out, self._pipe_in, self._pipe_bytes, leaving)
        not_looked_at: Pages = self._leaving_pages[n - leaving.left : n].copy()
        if leaving.stayed_n:
            left.append(self._leaving_stayed[: leaving.stayed_n].copy())
        if leaving.lost_n:
            self._report_lost(self._leaving_lost[: leaving.lost_n].tolist())
        if dirty:
            batch = self._leaving_pages[:dirty], self._leaving_slots[:dirty], self._leaving_sums[:dirty]
            left.append(self.writing.begin(*batch))
        return not_looked_at

    @property
    def on_its_way(self) -> int:
        """So many pages are being written, or gathered for it."""
        return self.writing.pages

    def finish(self) -> Pages:
        """Wait for what is on its way to the DMS; returns the pages that it did not take."""
        return self.writing.finish()

    def _drop(self, pages: Pages) -> Pages:
        """Let those of these resident pages (ascending) go unseen that nobody can have written to since they came in;
        returns them.
        """
        pages = pages[self._table.calm[pages] == self._table.raw.quiet]
        if not len(pages):
            return NO_PAGES
        self._check_epoch(pages)
        outcome = np.zeros(len(pages), np.uint8)
        arrays = ffi.from_buffer("uint64_t[]", pages), len(pages), ffi.from_buffer("uint8_t[]", outcome)
        lib.dmh_drop_clean(self._context, *arrays)
        dropped: Pages = pages[outcome != lib.DMH_OUT_SKIPPED]
        return dropped

    def _capture(self, pages: Pages) -> tuple[Pages, Slots]:
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
        self._report_lost(pages[outcome == lib.DMH_OUT_LOST].tolist())
        return pages[captured], slots[captured]

    def _report_lost(self, pages: list[int]) -> None:
        for page in pages:
            log.error("page %d is lost: its memory was removed by something outside dmh; access raises SIGBUS", page)

    def _write_out(self, pages: Pages, slots: Slots | None = None, *, keep: bool = False) -> Pages:
        """Settle staged pages, write the dirty ones, acknowledge.  With `keep` they stay STAGED.

        Returns those whose content the DMS has now, or needs not have; where the store fails, without the dirty ones.
        """
        self.writing.finish()
        if slots is None:
            if self._retry.resting:
                return NO_PAGES  # they were settled before, and found dirty
            pages, slots = self._slots_of(pages)
        if not len(pages):
            return NO_PAGES
        self._check_epoch(pages)
        n = len(pages)
        outcome, sums = np.zeros(n, np.uint8), np.empty(n, np.uint64)
        arrays = ffi.from_buffer("uint64_t[]", pages), n, ffi.from_buffer("uint32_t[]", slots)
        lib.dmh_settle(
            self._context, *arrays, ffi.from_buffer("uint8_t[]", outcome), ffi.from_buffer("uint64_t[]", sums), keep
        )
        dirty = outcome == lib.DMH_OUT_DIRTY
        done: Pages = pages[~dirty & (outcome != lib.DMH_OUT_SKIPPED)]
        if not dirty.any():
            return done
        pages = pages[dirty]
        written = self.writing.write(pages, slots[dirty], sums[dirty], keep=keep)
        return np.concatenate([done, pages]) if written else done

    def _check_epoch(self, pages: Pages) -> None:
        """Before pages are dropped because the store has them: has it?  One that was restarted may have come back
        empty, and what is local may be the only copy.

        Whatever may be the only copy is noted as UNKNOWN to the DMS, and so written when it leaves.
        """
        now, local = time.monotonic(), pages[self._table.copies[pages] == Copy.VALID]
        if not len(local) or now - self._trusted_at < TRUST_SECONDS:
            return
        try:
            self.writing.finish()
            if self._retry.resting:
                raise StoreError("it did not answer a moment ago")
            epoch = self._retry.attempt("asking the store whether it is the one it was", self._store.epoch)
        except StoreError:
            self._table.copies[local] = Copy.UNKNOWN
            return
        if epoch != self._epoch:
            self.distrust()
        self._epoch, self._trusted_at = epoch, now

    def distrust(self) -> None:
        """The store may have forgotten pages: everything that is local will be written again when it leaves."""
        for state in (State.RESIDENT, State.STAGED, State.FETCHING):
            local = self._table.in_state(state)
            self._table.copies[local[self._table.copies[local] == Copy.VALID]] = Copy.UNKNOWN

    def _slots_of(self, pages: Pages) -> tuple[Pages, Slots]:
        """The slots of staged pages; pages that were taken back meanwhile fall out."""
        words = self._table.words[pages]
        slots = slots_of(words)
        staged = ((words & np.uint64(15)) == State.STAGED) & (slots >= 0)
        order = np.argsort(pages[staged])
        return pages[staged][order], slots[staged][order].astype(np.uint32)

    def local(self, first: int, end: int) -> Pages:
        """Pages of first .. end - 1 whose content is, or may be about to be, on this machine only."""
        words = self._table.words[first:end]
        state = words & np.uint64(15)
        held = (state == State.RESIDENT) & (self._table.pins[first:end] == 0)
        held |= (state == State.STAGED) | (state == State.FETCHING)
        return np.flatnonzero(held).astype(np.uint64) + np.uint64(first)

    def flush(self, todo: Pages) -> Pages:
        """Write those of these pages that the DMS does not have, and leave them resident where there is room.

        Each page is captured as a whole, so what is written is a content it had; a program that writes meanwhile
        waits for microseconds, as for any eviction.

        Returns the pages that were not written: they are on their way in, or the store does not take them.  A page is
        done once its content was written, or was seen to be the DMS's; not before, however often it comes and goes.
        """
        self.writing.finish()
        words = self._table.words[todo]
        state = words & np.uint64(15)
        done = [todo[(state == State.NEW) | (state == State.STORED) | (state == State.POISONED)]]
        done.append(self._write_out(todo[state == State.STAGED]))
        resident = todo[state == State.RESIDENT]
        pinned = self._table.pins[resident] != 0
        done.append(resident[pinned])
        resident = resident[~pinned]
        while len(resident):
            if self._table.staged == self._table.slots:
                self.write_staged()  # marked pages give way
            room = min(self._table.slots - self._table.staged, 256)
            if not room:
                break
            part, resident = resident[:room], resident[room:]
            captured, slots = self._capture(part)
            done.append(self._write_out(captured, slots, keep=True))
            if len(captured):
                lib.dmh_take_back(self._context, ffi.from_buffer("uint64_t[]", captured), len(captured))
                self._write_out(captured[(self._table.words[captured] & 15) == State.STAGED])
        return np.setdiff1d(todo, np.concatenate(done))

    def make_durable(self) -> bool:
        """What the store has is as safe as it can make it.  False: it does not answer."""
        self.writing.finish()
        if self._retry.resting:
            return False
        try:
            self._retry.attempt("flushing the store", self._store.flush)
        except StoreError:
            return False
        return True

    def discard(self, first: int, count: int) -> Pages:
        """Give up the content of pages: NEW, and forgotten by the DMS.  Returns pages that are being fetched: ask
        again.
        """
        self.writing.finish()
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

    def write_staged(self) -> None:
        """Write whatever is in the victim buffer, if the store takes it."""
        self._write_out(self._table.in_state(State.STAGED))

    def tidy(self) -> None:
        """When there is nothing else to do: after an outage, write what it kept here; and forget in the DMS what has
        become all zeros since it was written.
        """
        self.writing.finish()
        if self._retry.resting:
            return
        if self._retry.since:
            self.write_staged()
        if self._retry.since and not self._retry.resting:
            with contextlib.suppress(StoreError):
                self._retry.attempt("asking the store", self._store.epoch)
        self._delete(np.flatnonzero(self._table.copies == Copy.STALE).astype(np.uint64))

    def _delete(self, pages: Pages) -> None:
        if not len(pages) or self._retry.resting:
            return  # they are noted as STALE: `tidy` comes back to them
        try:
            self._retry.attempt("deleting pages", lambda: self._store.delete_many(pages))
        except StoreError:
            return
        self._table.copies[pages] = Copy.NONE
        self._table.count(self._number, "deleted", len(pages))

    @property
    def reason(self) -> str:
        """What the store said last, where it is away."""
        return self._retry.reason

    def has_failed_since(self, began: float) -> bool:
        """The store is away, and a request of that time (monotonic clock) has waited for it as long as it is to."""
        return self.away and self._retry.is_over(began)


def _field(whole: npt.NDArray[np.uint8], name: str, kind: type[np.generic]) -> Any:
    """An array of a `struct dmh_leaving`, in place."""
    at = ffi.offsetof("struct dmh_leaving", name)
    return whole[at : at + MOST_LEAVING * np.dtype(kind).itemsize].view(kind)

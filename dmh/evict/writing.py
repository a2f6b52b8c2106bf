"""Writing to the DMS; where another process takes the pages in, and the victim buffer has room for it, beside what the
evictor does meanwhile.

Owns the order of writes and their acknowledgement.  Does not own what is written (`dmh.evict.leave`) nor what a store's
failure means (`dmh.store.retry`).  One batch is on its way at most; what becomes ready meanwhile is gathered, and goes
as one batch when that one is over.  Nobody else uses the store before all is over (`finish`): so a page has one writer,
and the DMS never sees an old version after a new one.

What a page goes through between `begin` and its acknowledgement, and why no byte is lost:

- It is touched, and taken back from its slot.  The slot is not given out again before the batch is over, so what is
  being written stays what it was.  Afterwards the DMS has that version for sure: its hash is noted, and the page may
  turn out clean when it leaves again.  While it is only gathered, it is left out.
- It leaves again before the batch is over.  It gets another slot, and a place in a later batch, which is begun after
  this one is over.  Its copy in the DMS is UNKNOWN again before that.
- It has become all zeros by then: NEW.  The version that was written is not noted: it is to be forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from dmh.errors import StoreError
from dmh.lspt.states import Copy, State
from dmh.lspt.steps import NUMBERS
from dmh.lspt.table import Table, slots_of
from dmh.native import ffi, lib
from dmh.store.base import OpenStore
from dmh.store.retry import Retry

Pages = npt.NDArray[np.uint64]
Slots = npt.NDArray[np.uint32]
Sums = npt.NDArray[np.uint64]
Batch = tuple[Pages, Slots, Sums]

ROOM = 512
"""A victim buffer of so many pages holds two full batches.  In a smaller one two share the room of one: there writing
beside capturing takes longer than one after the other, as soon as a write's duration is mostly waiting.
"""
NO_PAGES: Pages = np.empty(0, np.uint64)


class Writing:
    """Writes settled pages from their slots, and acknowledges them.

    Args:
        on_failure: called when the store did not take a batch.

    Attributes:
        beside: another thread writes.
    """

    def __init__(
        self,
        table: Table,
        context: Any,
        number: int,
        slots: npt.NDArray[np.uint8],
        store: OpenStore,
        retry: Retry,
        on_failure: Callable[[], None],
    ) -> None:
        self._table = table
        self._context = context
        self._number = number
        self._slots = slots
        self._store = store
        self._retry = retry
        self._on_failure = on_failure
        self.beside = store.elsewhere and table.slots >= ROOM
        self._thread = ThreadPoolExecutor(1, "writer") if self.beside else None
        self._gathered: list[Batch] = []
        self._sent: tuple[Batch, Future[None]] | None = None

    @property
    def idle(self) -> bool:
        """Nothing is on its way."""
        return self._sent is None

    @property
    def pages(self) -> int:
        """How many are on their way, or gathered."""
        return (len(self._sent[0][0]) if self._sent else 0) + sum(len(batch[0]) for batch in self._gathered)

    @property
    def over(self) -> bool:
        """The batch that is on its way need not be waited for."""
        return self._sent is not None and self._sent[1].done()

    def begin(self, pages: Pages, slots: Slots, sums: Sums) -> Pages:
        """Write pages that are STAGED and dirty; what the store does not take stays so.

        Returns pages that are known by now not to have been written, of this batch or of one before it.
        """
        if self._thread is None:
            return NO_PAGES if self.write(pages, slots, sums) else pages.copy()
        self._hold(slots, True)
        self._gathered.append((pages.copy(), slots.copy(), sums.copy()))
        return self.go_on() if self.idle or self.over else NO_PAGES

    def go_on(self) -> Pages:
        """Wait for the batch that is on its way, acknowledge it, and send what was gathered meanwhile.

        Returns pages that were not written.
        """
        failed = NO_PAGES
        if self._sent is not None:
            batch, under_way = self._sent
            try:
                under_way.result()
            except StoreError:
                failed = batch[0]
                self._on_failure()
            else:
                self._acknowledge(*batch, keep=False)
            finally:
                self._sent = None
                self._hold(batch[1], False)
        if self._gathered:
            failed = np.concatenate([failed, self._send()])
        return failed

    def finish(self) -> Pages:
        """Wait until nothing is on its way any more.  Returns pages that were not written."""
        failed = []
        while self._sent is not None:
            failed.append(self.go_on())
        return np.concatenate(failed) if failed else NO_PAGES

    def _send(self) -> Pages:
        """What was gathered, less what was taken back; returns it if the store is not to be asked now."""
        pages, slots, sums = (np.concatenate(parts) for parts in zip(*self._gathered, strict=True))
        self._gathered = []
        words = self._table.words[pages]
        there = ((words & np.uint64(15)) == State.STAGED) & (slots_of(words) == slots)
        if self._retry.resting or not there.any():
            self._hold(slots, False)
            left: Pages = pages[there]
            return left
        self._hold(slots[~there], False)
        pages, slots, sums = pages[there], slots[there], sums[there]
        self._table.copies[pages] = Copy.UNKNOWN  # as settling said, before an older batch was acknowledged
        assert self._thread is not None
        self._sent = (pages, slots, sums), self._thread.submit(self._put, pages, slots)
        self._sent[1].add_done_callback(lambda _: lib.dmh_ring_bell(self._table.raw))
        return NO_PAGES

    def write(self, pages: Pages, slots: Slots, sums: Sums, *, keep: bool = False) -> bool:
        """Write pages that are STAGED and dirty, and wait for it; with `keep` they stay so.  No batch is on its way.

        False: the store did not take them; they stay STAGED, which counts against the limit, until a later run can
        write them.
        """
        assert self.idle, "what is settled while a batch is on its way has to wait for it: `begin`"
        if self._retry.resting:
            return False
        try:
            self._put(pages, slots)
        except StoreError:
            self._on_failure()
            return False
        self._acknowledge(pages, slots, sums, keep=keep)
        return True

    def close(self) -> None:
        """Finish, and end the thread."""
        self.finish()
        if self._thread is not None:
            self._thread.shutdown()

    def _put(self, pages: Pages, slots: Slots) -> None:
        self._retry.attempt("writing pages", lambda: self._store.put_many(pages, self._contents(slots)))

    def _contents(self, slots: Slots) -> npt.NDArray[np.uint8]:
        first = int(slots[0])
        if int(slots[-1]) - first == len(slots) - 1 and (np.diff(slots) == 1).all():
            return self._slots[first : first + len(slots)]
        return self._slots[slots]

    def _acknowledge(self, pages: Pages, slots: Slots, sums: Sums, *, keep: bool) -> None:
        self._table.count(self._number, "write_calls")
        lib.dmh_step(self._context, NUMBERS["put"])
        lib.dmh_acknowledge(
            self._context, ffi.from_buffer("uint64_t[]", pages), len(pages), ffi.from_buffer("uint32_t[]", slots),
            ffi.from_buffer("uint64_t[]", sums), keep,
        )  # fmt: skip

    def _hold(self, slots: Slots, on: bool) -> None:
        lib.dmh_hold_slots(self._context, ffi.from_buffer("uint32_t[]", slots), len(slots), on)

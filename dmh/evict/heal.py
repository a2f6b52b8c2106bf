"""Pages that raise SIGBUS because the DMS did not answer in time are made usable again when it does.

Owns the request for them.  Does not own the marks (native, `dmh_poison.c`) nor the moment (`workers/evictor.py`, in
whose main thread this runs: nobody else discards or writes, so a withheld page and its copy in the DMS stay as they
are).
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from dmh.errors import StoreError
from dmh.lspt.table import Table
from dmh.native import ffi, lib
from dmh.store.base import OpenStore
from dmh.store.retry import Retry

log = logging.getLogger("dmh")

BATCH_BYTES = 256 * 1024


class Healer:
    """Fetches and installs withheld pages, a batch at a time."""

    def __init__(self, table: Table, context: Any, store: OpenStore, retry: Retry) -> None:
        self._table = table
        self._context = context
        self._store = store
        self._retry = retry
        batch = max(BATCH_BYTES // table.page_size, 1)
        self._pages = np.empty(batch, np.uint64)
        self._plan: Any = ffi.new("struct dmh_plan *")

    @property
    def due(self) -> bool:
        """There may be withheld pages, and the DMS may be asked for them."""
        return bool(self._table.raw.heal_due) and not self._retry.resting

    @property
    def ready(self) -> bool:
        """It is due, and there is room."""
        return self.due and self._table.resident < int(self._table.raw.resident_max)

    def run(self) -> None:
        """Heal a batch, as far as the DMS answers and there is room; the rest stays due."""
        lib.dmh_want_room(self._context, 0)
        self._table.raw.heal_due = 0  # before the look: a page that is withheld from here on sets it again
        n = lib.dmh_withheld(self._context, ffi.from_buffer("uint64_t[]", self._pages), len(self._pages))
        if not n:
            return
        self._table.raw.heal_due = 1
        pages, out = self._pages[:n], np.empty((n, self._table.page_size), np.uint8)
        try:
            found = self._retry.attempt("fetching withheld pages", lambda: self._store.get_many(pages, out))
        except StoreError:
            return
        healed: list[int] = []
        for i, page in enumerate(pages.tolist()):
            row = ffi.from_buffer("uint8_t[]", out[i])
            result = lib.dmh_heal(self._context, self._plan, page, int(found[i]), row)
            if result > 0:
                healed.append(page)
            elif result < 0:
                log.error("page %d is lost: the store came back without it; access to it raises SIGBUS", page)
        lib.dmh_want_room(self._context, len(healed) < n)
        if healed:
            named = ", ".join(map(str, healed[:10])) + (", ..." if len(healed) > 10 else "")
            log.warning("page %s can be used again: the store is back", named)

"""A resolver's half of a fault: claim, fetch, install.

Owns the plan and the buffer that pages are fetched into.  Does not own the loops over pages (native) nor the store's
retries (`dmh.store.retry`).  Called by `workers/resolver.py`.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from dmh.errors import StoreError
from dmh.lspt.steps import NUMBERS
from dmh.lspt.table import Table
from dmh.native import ffi, lib
from dmh.store.base import Mask, OpenStore
from dmh.store.retry import Retry, Stopped
from dmh.wire import Request

log = logging.getLogger("dmh")

ROOM_WAIT_MS = 100


class Resolver:
    """Resolves one request at a time."""

    def __init__(
        self, table: Table, context: Any, number: int, window: int, store: OpenStore, retry: Retry, region: str
    ) -> None:
        self._table = table
        self._context = context
        self._number = number
        self._store = store
        self._retry = retry
        self._region = region
        self._chunk = max(lib.DMH_CHUNK // table.page_size, 1)
        self._plan: Any = ffi.new("struct dmh_plan *")
        self._buffer = np.empty((window + 1, table.page_size), np.uint8)
        self._buffer_pointer = ffi.from_buffer("uint8_t[]", self._buffer)
        self._stored = np.frombuffer(ffi.buffer(self._plan.stored), np.uint64)
        self._found = np.frombuffer(ffi.buffer(self._plan.found), np.uint8)
        self._most = max(window, 1)  # what is asked for page by page is not read-ahead

    def resolve(self, request: Request | Any, *, demand: bool) -> None:
        """Steps 4 to 6 of a fault, from a frame or from the lane (a native request has the same fields); with
        `demand` false only the window is wanted, and nobody waits for it.
        """
        plan = self._plan
        plan.view, plan.thread, plan.ns = request.view, request.thread, request.ns
        page, window, waits = request.page, min(request.window, self._most), 0
        while demand or window:
            claimed = lib.dmh_claim(self._context, plan, page, demand, request.stride, window)
            if plan.room_wanted:
                # The hard limit: LPET has been rung.  Nothing is claimed, so nothing is held up meanwhile.
                if demand:
                    self._table.count(self._number, "room_waits", not waits)
                    waits += 1
                    lib.dmh_wait_room(self._context, False, ROOM_WAIT_MS)
                elif request.thread and waits < lib.DMH_AHEAD_WAITS:  # without a thread it is a program's wish
                    waits += 1
                    lib.dmh_wait_room(self._context, True, lib.DMH_AHEAD_MS)
                else:
                    return
                if self._retry.stopping.is_set():
                    return
                continue
            if claimed > 0:
                if plan.stored_n and not self._fetch():
                    lib.dmh_give_back(self._context, plan, 0)
                    return
                lib.dmh_install(self._context, plan, self._buffer_pointer, self._chunk)
            if plan.lost_n:
                self._report_lost()
            if claimed < 0:  # there is no such page: not the monitor has sent this
                self._table.count(self._number, "refused")
                return
            if demand:
                return
            # What found no room is asked for again: somebody will fault there if it does not come.
            page += request.stride * plan.looked
            window -= plan.looked

    def _fetch(self) -> bool:
        """RequestPageFromDMS for every claimed page that is stored: one batched call.  False: given up, the service
        ends.
        """
        plan = self._plan

        def request() -> Mask:
            return self._store.get_many(self._stored[: plan.stored_n], self._buffer[: plan.stored_n])

        try:
            found = self._retry.call("fetching pages", request, self._let_go_of_the_window)
        except Stopped:
            return False
        except StoreError as error:
            if plan.stored_n:
                log.error("page %d of region %s cannot be had: %s", int(self._stored[0]), self._region, error)
            found = np.full(plan.stored_n, lib.DMH_LOST_AWAY, np.uint8)
        self._found[: len(found)] = found
        self._table.count(self._number, "fetch_calls")
        lib.dmh_step(self._context, NUMBERS["fetched"])
        return True

    def _let_go_of_the_window(self) -> bool:
        """Give back what nobody waits for: others may touch it meanwhile, and a store that fails must not cost more
        than one page.  False: nothing is left to fetch.
        """
        lib.dmh_give_back(self._context, self._plan, self._plan.demand)
        return bool(self._plan.stored_n)

    def _report_lost(self) -> None:
        why = {
            lib.DMH_LOST_MISSING: "is lost: the store does not have it any more, or its memory was removed",
            lib.DMH_LOST_ALTERED: "is lost: its bytes are not the ones that were stored",
            lib.DMH_LOST_AWAY: "cannot be used until the store is back",
        }
        for page, reason in zip(self._plan.lost[0 : self._plan.lost_n], self._plan.lost_why, strict=False):
            log.error("page %d of region %s %s; access to it raises SIGBUS", page, self._region, why[reason])

"""What a worker does before anything else when it takes the place of one that died.

Owns the order: views first (the launcher has sent them), then the table (`dmh_recover`, native), then the pages that
are partly installed and whose rest only the DMS has.  Does not own the decision to restart (`dmh.service.pool`).
"""

from __future__ import annotations

import numpy as np

from dmh.errors import StoreError
from dmh.native import ffi, lib
from dmh.service.worker import Worker
from dmh.store.base import OpenStore
from dmh.store.retry import Stopped

MOST = 4096
"""Pages that one worker can have in hand; a plan holds 1024."""


def recover(worker: Worker, store: OpenStore | None) -> None:
    """Set right what this worker's predecessor left; nothing to do for the first of its number."""
    if not worker.setup.restarted:
        return
    if worker.role == "evictor":
        restore_pins(worker)
    pipe = (worker.pipe_out, worker.pipe_in) if worker.role == "evictor" else (-1, -1)
    partial = np.empty(MOST, np.uint64)
    n = lib.dmh_recover(worker.context, *pipe, ffi.from_buffer("uint64_t[]", partial), MOST)
    for page in partial[:n].tolist():
        try:
            _finish(worker, store, page)
        except Stopped:
            return
    worker.log.warning("took the place of a worker that died")


def restore_pins(worker: Worker) -> None:
    """Pin what the launcher has said is pinned, and nothing else: the evictor may have died half-way through."""
    pins = np.zeros(worker.table.pages, np.uint8)
    for first, count in worker.pins_in_force:
        pins[first : first + count] += 1
    worker.pins_in_force.clear()
    worker.table.pins[:] = pins
    worker.table.raw.pinned = int(np.count_nonzero(pins))


def _finish(worker: Worker, store: OpenStore | None, page: int) -> None:
    """A page of which some is in the region and the rest in the DMS."""
    out = np.zeros((1, worker.table.page_size), np.uint8)
    if store is not None:
        pages = np.array([page], np.uint64)
        try:
            worker.retry().call("fetching pages", lambda: store.get_many(pages, out))
        except StoreError as error:
            worker.log.error("page %d is given up: %s", page, error)
    if lib.dmh_install_rest(worker.context, page, ffi.from_buffer("uint8_t[]", out)):
        worker.log.error("page %d is lost: the rest of it is not in the store any more; access raises SIGBUS", page)

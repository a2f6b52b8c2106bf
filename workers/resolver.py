"""A resolver: brings pages in.

    take a request: a page, and a window after it   from the lane while awake; asleep, over ZeroMQ
    claim what is not local: FETCHING               native; at the memory limit, ring LPET and wait for room
    request what is stored from the DMS             one batched call: native where that can be, else with retries
    check it, install it, publish, wake             native; new pages are zeros, staged ones come from their slot

If it dies, its successor puts its claims back before anything else, and everybody is woken.
"""

from __future__ import annotations

from dmh import wire
from dmh.errors import ProtocolError
from dmh.fault.dispatch import Inbox
from dmh.fault.resolve import Resolver
from dmh.native import ffi, lib
from dmh.service.placement import schedule
from dmh.service.recovery import recover
from dmh.service.worker import Worker
from dmh.store.paged_file import PagedFile

DOZE_MS = 10
"""Awake this long after the last request: then it costs nothing until a frame comes."""


def main() -> None:
    """Run until told to stop."""
    worker = Worker("resolver")
    schedule("resolver")
    setup, table = worker.setup, worker.table
    store = worker.open_store()
    resolver = Resolver(table, worker.context, setup.number, setup.window, store, worker.retry(), setup.name)
    recover(worker, store)
    inbox = Inbox(setup.directory, setup.number)
    # What comes by the lane is resolved before it reaches Python, if it cannot block or the store has a native reader.
    lib.dmh_ctx_inline(worker.context, *(store.local() if isinstance(store, PagedFile) else (-1, ffi.NULL)))
    lib.dmh_ctx_remote(worker.context, store.remote() or ffi.NULL)
    worker.start(on_stop=inbox.interrupt)
    completed, request = table.raw.completed, ffi.new("struct dmh_request *")
    while not worker.stopping.is_set():
        if lib.dmh_next_request(worker.context, request, DOZE_MS):
            resolver.resolve(request, demand=bool(request.demand))
            completed[setup.number] += 1
            continue
        frame = inbox.receive()
        if frame is None:
            continue
        try:
            kind, requests = wire.unpack(frame)
        except ProtocolError as error:
            worker.log.warning("a fault message was refused: %s", error)
            table.count(setup.number, "refused")
            continue
        for message in requests:
            resolver.resolve(message, demand=kind is wire.Kind.FAULT)
            completed[setup.number] += 1
    inbox.close()
    store.close()


if __name__ == "__main__":
    main()

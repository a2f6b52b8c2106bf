"""A resolver: brings pages in.

    receive a request over ZeroMQ: a page, and a window after it
    claim what is not local: FETCHING           native; at the memory limit, ring LPET and wait for room
    request what is stored from the DMS         one batched call, with retries
    check it, install it, publish, wake         native; new pages are zero-filled, staged ones come from the victim buffer

If it dies, the launcher puts its claims back and wakes everybody.
"""

from __future__ import annotations

from dmh import wire
from dmh.errors import ProtocolError
from dmh.fault.dispatch import Inbox
from dmh.fault.resolve import Resolver
from dmh.service.worker import Worker


def main() -> None:
    """Run until told to stop."""
    worker = Worker("resolver")
    setup, table = worker.setup, worker.table
    store = worker.open_store()
    resolver = Resolver(table, worker.context, setup.number, setup.window, store, worker.retry(), setup.name)
    inbox = Inbox(setup.directory, setup.number)
    worker.start(on_stop=inbox.interrupt)
    completed = table.raw.completed
    while not worker.stopping.is_set():
        try:
            kind, requests = wire.unpack(inbox.receive())
        except ProtocolError as error:
            worker.log.warning("a fault message was refused: %s", error)
            table.count(setup.number, "refused")
            continue
        if kind is wire.Kind.STOP:
            continue
        for request in requests:
            resolver.resolve(request, demand=kind is wire.Kind.FAULT)
            completed[setup.number] += 1
    inbox.close()
    store.close()


if __name__ == "__main__":
    main()

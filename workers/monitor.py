"""The monitor: reads every application's userfaultfd and hands each fault to a resolver.

    wait for messages                                         native, without the interpreter lock
    one message for a page that is resident: wake             native
    for one that is being fetched or evicted: drop            native: whoever ends that wakes
    for one that was handed on already: drop                  native
    anything else: choose a window ahead, choose a resolver, send

It claims nothing and remembers nothing that matters: if it dies, waking every thread makes the kernel say again what is still wanted.
"""

from __future__ import annotations

from dmh.fault.dispatch import Dispatcher
from dmh.native import check, ffi, lib
from dmh.prefetch.streams import Streams
from dmh.service.channel import Message
from dmh.service.worker import Worker

BATCH = 64
TIMEOUT_MS = 1000


def main() -> None:
    """Run until told to stop."""
    worker = Worker("monitor")
    setup, table, context = worker.setup, worker.table, worker.context
    check(lib.dmh_ctx_watch(context), "watching userfaultfds")
    dispatcher = Dispatcher(table, setup.directory, setup.resolvers, Streams(setup.window))
    wanted: list[Message] = []

    def prefetch(message: Message) -> Message:
        wanted.append(message)
        lib.dmh_interrupt(context)
        return {}

    worker.handle("prefetch", prefetch)
    worker.start(on_stop=lambda: lib.dmh_interrupt(context))
    faults = ffi.new("struct dmh_fault[]", BATCH)
    while not worker.stopping.is_set():
        n = check(lib.dmh_receive(context, faults, BATCH, TIMEOUT_MS, setup.spin_us), "receiving faults")
        for i in range(n):
            fault = faults[i]
            dispatcher.fault(fault.page, fault.view, fault.thread, fault.ns)
        while wanted:
            message = wanted.pop(0)
            dispatcher.prefetch(message["first"], message["count"], message["view"])
    dispatcher.close()


if __name__ == "__main__":
    main()

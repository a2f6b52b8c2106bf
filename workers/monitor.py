"""The monitor: reads every application's userfaultfd and hands each fault to a resolver.

    wait for messages                                         native, without the interpreter lock
    a program has forked: tell the launcher of the child      dmh.fault.births
    a page that is resident: wake                             native
    one that is being fetched or evicted: drop                native: whoever ends that wakes
    one that was handed on already: drop                      native
    one that goes on with a scan: ask for a window ahead      native, by the rules of dmh.prefetch
    one that needs no waiting: resolve it here                native (workers.inline)
    windows, and any other: to the resolver least at work     its lane if it is awake, ZeroMQ if it sleeps

Between two messages it holds no page and remembers nothing that matters: if it dies, waking every thread makes the
kernel say again what is still wanted.
"""

from __future__ import annotations

import time
from typing import Any

from dmh.fault.births import Births
from dmh.fault.dispatch import Dispatcher
from dmh.native import check, ffi, lib
from dmh.prefetch.streams import Streams
from dmh.service.channel import Message
from dmh.service.paths import ServiceDirectory
from dmh.service.placement import schedule
from dmh.service.recovery import recover
from dmh.service.worker import Worker
from dmh.store.base import OpenStore
from dmh.store.paged_file import PagedFile
from dmh.store.registry import encrypted, spec_from_wire, store_class

BATCH = 192
TIMEOUT_MS = 1000


def main() -> None:
    """Run until told to stop."""
    worker = Worker("monitor")
    schedule("monitor")
    setup, context = worker.setup, worker.context
    # A quarter is left to pages that a program has passed: nothing tells the policy at once.
    streams = Streams(setup.window, lib.dmh_ahead_cap(setup.low) * 3 // 4)
    check(lib.dmh_ctx_watch(context, setup.follow, setup.keep, streams.pointer), "watching userfaultfds")
    store: OpenStore | None = None
    if setup.inline:
        # What cannot block is resolved where it is seen, stored pages too where they lie in a local file as they are.
        spec = spec_from_wire(setup.store)
        local = issubclass(store_class(spec.url), PagedFile) and not encrypted(spec)
        store = worker.open_store() if local else None
        lib.dmh_ctx_inline(context, *(store.local() if isinstance(store, PagedFile) else (-1, ffi.NULL)))
    dispatcher = Dispatcher(setup.directory, setup.resolvers)
    wanted: list[Message] = []
    step = max(setup.window, 1)

    def prefetch(message: Message) -> Message:
        wanted.append(message)
        lib.dmh_interrupt(context)
        return {}

    def forget_dispatched(message: Message) -> Message:
        lib.dmh_forget_dispatched(context)
        return {}

    births = Births(worker)
    worker.handle("prefetch", prefetch)
    worker.handle("forget-dispatched", forget_dispatched)
    worker.handle("births", births.answer)
    recover(worker, store)
    worker.start(on_stop=lambda: lib.dmh_interrupt(context))
    requests = ffi.new("struct dmh_request[]", BATCH)
    while not worker.stopping.is_set():
        n = check(lib.dmh_receive(context, requests, BATCH, TIMEOUT_MS, setup.spin_us), "receiving faults")
        births.tell()
        for i in range(n):
            dispatcher.deliver(requests[i])
        while wanted:
            message = wanted.pop(0)
            _hand_over_windows(context, dispatcher, message, step)
    dispatcher.close()
    worker.after_launcher(lambda: ServiceDirectory(setup.name).remove())


def _hand_over_windows(context: Any, dispatcher: Dispatcher, message: Message, step: int) -> None:
    """A program's wish for a range of pages, in windows of `step`, spread over the resolvers."""
    end = message["first"] + message["count"]
    wish = ffi.new("struct dmh_request *")
    wish.stride, wish.view = 1, message["view"]
    for first in range(message["first"], end, step):
        wish.page, wish.window, wish.ns = first, min(step, end - first), time.monotonic_ns()
        wish.resolver = lib.dmh_hand_over(context, wish)
        if wish.resolver:
            dispatcher.deliver(wish)


if __name__ == "__main__":
    main()

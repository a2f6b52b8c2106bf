"""The evictor: runs LPET.

    wait until the bell rings
    learn what arrived
    above the high threshold: mark and evict until the low one      dmh.evict.lpet, with the policy and the idle source
    mark what the policy will want to know of, within the budget
    answer requests: discard, evict, flush, pin, unpin
    acknowledge what was written meanwhile                          dmh.evict.writing
    bring back what programs could not get during an outage         dmh.evict.heal
    record what came in, where a recording is wanted               dmh.observe.trace

It is the only process that takes pages out of the region and the only one that writes to the DMS, one batch at a time:
so no page has two writers and no old version overtakes a new one.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import time

import numpy as np
import numpy.typing as npt

from dmh.evict.budget import MarkBudget
from dmh.evict.heal import Healer
from dmh.evict.idle import open_source
from dmh.evict.leave import Leaver
from dmh.evict.lpet import Lpet, local_in_use
from dmh.evict.policies import policy_class
from dmh.evict.reserve import Reserve
from dmh.lspt.states import State
from dmh.native import lib
from dmh.observe.trace import Kind, TraceWriter
from dmh.service.channel import Message
from dmh.service.recovery import recover, restore_pins
from dmh.service.worker import Worker
from dmh.store import registry
from dmh.store.retry import Stopped

IDLE_MS = 1000
BUSY_MS = 2
"""How long to wait before looking again when everything is pinned or being fetched."""
AWAY_MS = 50
"""The same while the store does not answer; a request that comes meanwhile is answered at once."""
SWITCH_SECONDS = 0.0005
"""So long may the thread that writes keep the interpreter from this one, which has room to make."""


class Evictor:
    """The evictor's main thread and the requests it answers between two runs."""

    def __init__(self, worker: Worker) -> None:
        setup = worker.setup
        self.worker, self.table = worker, worker.table
        self.store = worker.open_store()
        recover(worker, self.store)
        pipe, retry = (worker.pipe_out, worker.pipe_in), worker.retry()
        self.leaver = Leaver(
            self.table, worker.context, setup.number, worker.slots, pipe, self.store, retry
        )  # fmt: skip
        if self.leaver.writing.beside:
            sys.setswitchinterval(SWITCH_SECONDS)
        self.healer = Healer(self.table, worker.context, self.store, retry)
        if setup.restarted:
            self.leaver.distrust()  # the store may have been restarted as well, and who would have noticed is dead
        self.recording = TraceWriter(**setup.record, resume=setup.restarted) if setup.record else None
        source = open_source(setup.idle, worker.context, self.table, self.leaver)
        limit = local_in_use(setup.high, setup.low, adaptive=setup.adaptive)
        self.lpet = Lpet(
            self.table,
            policy_class(setup.policy)(self.table.pages, limit, accessed=source.accessed, seed=setup.number),
            source,
            self.leaver,
            high=setup.high,
            low=setup.low,
            budget=MarkBudget(setup.mark_budget),
            reserve=Reserve.of(int(self.table.raw.resident_max), setup.low) if setup.adaptive else None,
            batch=setup.batch,
            number=setup.number,
            recording=self.recording,
        )
        self.requests: queue.SimpleQueue[Message] = queue.SimpleQueue()
        for operation in ("discard", "evict", "flush", "pin", "unpin", "pins-in-force", "store-stats"):
            worker.handle(operation, self._enqueue)

    def _enqueue(self, message: Message) -> None:
        # Control thread: the main thread answers.
        self.requests.put(message)
        lib.dmh_ring_bell(self.table.raw)

    def run(self) -> None:
        """Until told to stop."""
        with contextlib.suppress(Stopped):
            self._run()

    def _run(self) -> None:
        raw, stopping = self.table.raw, self.worker.stopping
        while not stopping.is_set():
            seen = raw.bell
            self._answer_requests()
            if self.leaver.writing.over:
                self.leaver.writing.go_on()
            self.lpet.learn()
            short = self.lpet.run(lambda: not stopping.is_set())
            if self.healer.due:
                self.leaver.finish()
                self.healer.run()
            self.lpet.mark_ahead()
            if short:
                lib.dmh_wait_bell(raw, raw.bell, max(BUSY_MS, min(self.leaver.rest_ms, AWAY_MS)))
            elif self.requests.empty() and not self.lpet.due() and not self.healer.ready:
                pause = min(self.leaver.rest_ms, IDLE_MS) or IDLE_MS
                if not lib.dmh_wait_bell(raw, seen, pause):
                    self.leaver.tidy()

    def _answer_requests(self) -> None:
        for _ in range(self.requests.qsize()):
            message = self.requests.get()
            try:
                answer = getattr(self, "_" + message["op"].replace("-", "_"))(message)
            except Stopped:
                return
            except Exception as error:
                self.worker.log.exception("request %s failed", message.get("op"))
                answer = {"error": f"{message.get('op')}: {error}"}
            if answer is not None:
                self.worker.reply(message, **answer)

    def _discard(self, message: Message) -> Message | None:
        first, count = message["first"], message["count"]
        self.lpet.forget(np.arange(first, first + count, dtype=np.uint64))
        left = message.get("left")
        if left is None and self.recording:
            self.recording.append(np.array([first]), Kind.DISCARD, thread=count)
        runs = [(first, count)] if left is None else left
        busy = [self.leaver.discard(a, n) for a, n in runs]
        pages = np.concatenate(busy)
        if not len(pages):
            return {}
        # Resolvers have these in hand: answer when they are done with them.
        self.requests.put(message | {"left": [(int(page), 1) for page in pages]})
        lib.dmh_wait_bell(self.table.raw, self.table.raw.bell, 1)
        return None

    def _again(self, message: Message, todo: npt.NDArray[np.uint64]) -> Message | None:
        """Put a request off that has pages left: they are on their way in, or the store does not take them.

        While the store is away other requests have their turn; this one waits for it as a page fault would.
        """
        began = message.get("began") or time.monotonic()
        if self.leaver.has_failed_since(began):
            return {"error": f"the store did not take every page: {self.leaver.reason}"}
        self.requests.put(message | {"todo": todo, "began": began})
        lib.dmh_wait_bell(self.table.raw, self.table.raw.bell, min(self.leaver.rest_ms, AWAY_MS) or 1)
        return None

    def _evict(self, message: Message) -> Message | None:
        todo = self._todo(message)
        states = self.table.words[todo] & np.uint64(15)
        # A program runs on as soon as its page is there, a moment before the table says RESIDENT, and may ask then.
        arriving = todo[states == State.FETCHING]
        left = self.lpet.evict(todo[(states == State.RESIDENT) | (states == State.STAGED)])
        left = np.concatenate([arriving, left])
        return self._again(message, left) if len(left) else {}

    def _flush(self, message: Message) -> Message | None:
        left = self.leaver.flush(self._todo(message))
        if len(left) or not self.leaver.make_durable():
            return self._again(message, left)
        return {}

    def _todo(self, message: Message) -> npt.NDArray[np.uint64]:
        first, todo = message["first"], message.get("todo")
        return self.leaver.local(first, first + message["count"]) if todo is None else todo

    def _pin(self, message: Message) -> Message:
        problem = self.lpet.pin(message["first"], message["count"])
        return {"error": problem} if problem else {}

    def _pins_in_force(self, message: Message) -> Message:
        # A launcher has taken over, and its word counts: the dead one may not have known of the last pin.
        self.worker.pins_in_force += message["runs"]
        if message["last"]:
            restore_pins(self.worker)
        return {}

    def _unpin(self, message: Message) -> Message:
        self.lpet.unpin(message["first"], message["count"])
        return {}

    def _store_stats(self, message: Message) -> Message:
        self.leaver.finish()
        # One that does not answer is not asked again for this.
        figures = {} if self.leaver.away else self.store.stats()
        return {"store": {"state": self._state_of_store(str(figures.get("unavailable", "")))} | figures}

    def _state_of_store(self, said: str) -> str:
        """What is wrong with the store, to the evictor or to a resolver; `said`: by itself, just now."""
        now = time.monotonic()
        outages = [int(ns) / 1e9 for ns in self.table.raw.store_away if ns]
        reason = self.leaver.reason or said
        if not outages and not reason:
            return "available"
        return f"unavailable since {now - min([now, *outages]):.0f} s: {reason or 'see the log'}"


def main() -> None:
    """Run until told to stop."""
    worker = Worker("evictor")
    evictor = Evictor(worker)
    worker.start(on_stop=lambda: None)
    spec = registry.spec_from_wire(worker.setup.store)
    try:
        evictor.run()
    finally:
        if evictor.recording:
            evictor.lpet.learn()
            evictor.recording.close()
        evictor.leaver.writing.close()
        evictor.store.close()
        worker.after_launcher(lambda: registry.remove(spec))


if __name__ == "__main__":
    main()

"""Which processors the workers run on, and who of them goes first.

Owns the probe and the choice; the processes apply it to themselves.  On small virtual machines waking a thread on a
sleeping processor costs some 25 µs, several times what resolving a fault takes.  A fault through the pool has four
such wake-ups on its way (the monitor, two ZeroMQ I/O threads, the resolver): on one processor they are ordinary
context switches of 1-2 µs.  So where they are dear the fault path follows the thread that faults, which sleeps
meanwhile; everything else (windows, eviction) stays beside it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from dmh.machine.limits import cpu_time_is_rationed
from dmh.native import lib

DEAR_US = 10.0
"""A cross-processor wake-up above this makes `auto` put the fault path on one processor."""
ROUNDS = 40
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
"""For a service's processes.  NumPy's linear algebra starts a thread for every processor when it is imported: that is a
sixth of the time that a service takes to start, and nothing there uses it.
"""
MONITOR_SLICE_US, RESOLVER_SLICE_US = 100, 300
"""See `schedule`."""


def cross_cpu_wake_us(cpus: Sequence[int]) -> float:
    """Median µs to wake a sleeping thread on another processor and be woken by it, halved; measured between two of
    `cpus`.
    """
    here, there = cpus[0], cpus[-1]
    before = os.sched_getaffinity(0)
    ping_read, ping_write = os.pipe()
    pong_read, pong_write = os.pipe()

    def echo() -> None:
        os.sched_setaffinity(0, {there})
        while os.read(ping_read, 1) == b"x":
            os.write(pong_write, b"x")

    thread = threading.Thread(target=echo)
    thread.start()
    times = []
    try:
        os.sched_setaffinity(0, {here})
        for _ in range(ROUNDS):
            time.sleep(0.0003)  # long enough for the other processor to fall asleep, which is what is measured
            began = time.perf_counter()
            os.write(ping_write, b"x")
            os.read(pong_read, 1)
            times.append((time.perf_counter() - began) * 1e6 / 2)
    finally:
        os.write(ping_write, b"q")
        thread.join()
        os.sched_setaffinity(0, before)
        for fd in (ping_read, ping_write, pong_read, pong_write):
            os.close(fd)
    return sorted(times)[ROUNDS // 2]


def schedule(role: str) -> None:
    """Set how the calling thread, and those it will start, take turns with others on one processor.

    Three switches are the least for a fault through the pool: thread, monitor, resolver, thread. So the monitor,
    which asks for the shortest slice, runs first; a resolver, woken, does not take the processor from the monitor
    that is about to give it up; and the thread, woken, takes it from the resolver. The resolver is then still on
    its feet when the next fault comes, and neither it nor the monitor pays for a sleep and a wake-up: a quarter of
    the fault's time here. (To yield instead has the same effect, until somebody else wants the processor: then
    every fault waits for a whole slice of his.)
    """
    # Kernels before 6.12 take no slice, and those that refuse this are merely slower.
    lib.dmh_schedule(role == "resolver", RESOLVER_SLICE_US if role == "resolver" else MONITOR_SLICE_US)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the fault path (monitor and first resolver) runs.

    Attributes:
        cpus: processors it is bound to; none: any.
        follow: it moves to the processor of the thread that faults.
        keep: meanwhile the other processor, of two, may be kept from being idle, so that the scheduler does not move
            the thread there (dmh_follow.c).  Not where processor time is rationed.
    """

    cpus: list[int]
    follow: bool
    keep: bool = False

    @classmethod
    def of(cls, setting: str | Sequence[int]) -> Placement:
        """What `workers.cpus` ("auto", "any", or a list of processors) means on this machine."""
        allowed = sorted(os.sched_getaffinity(0))
        if isinstance(setting, str):
            follow = setting == "auto" and len(allowed) > 1 and cross_cpu_wake_us(allowed) > DEAR_US
            return cls([], follow, follow and len(allowed) == os.cpu_count() == 2 and not cpu_time_is_rationed())
        return cls(list(setting), False)

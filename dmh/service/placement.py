"""Which processors the workers run on.

Owns the probe and the choice; the processes apply it to themselves.  On small virtual machines waking a thread on a sleeping processor costs some
25 µs, several times what resolving a fault takes.  A fault through the pool has four such wake-ups on its way (the monitor, two ZeroMQ
I/O threads, the resolver): on one processor they are ordinary context switches of 1-2 µs.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

DEAR_US = 10.0
"""A cross-processor wake-up above this makes `auto` put the fault path on one processor."""
ROUNDS = 40


def cross_cpu_wake_us(cpus: Sequence[int]) -> float:
    """Median µs to wake a sleeping thread on another processor and be woken by it, halved; measured between two of `cpus`."""
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


def fault_path_cpus(setting: str | Sequence[int]) -> list[int]:
    """Processors for the monitor and the first resolver, empty for any.

    Args:
        setting: `workers.cpus`: "auto", "any", or a list of processors.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if setting == "any" or len(allowed) < 2:
        return []
    if setting == "auto":
        # The last one: what nobody places tends to start on the first.
        return [allowed[-1]] if cross_cpu_wake_us(allowed) > DEAR_US else []
    return [cpu for cpu in setting if isinstance(cpu, int)]

"""Who of a fault's processes goes first, and where they run: what the kernel has been told of it."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from regions import inside, page_of, wait_until

import dmh
from dmh.lspt.states import State

OpenRegion = Callable[..., dmh.Region]


def test_a_resolver_takes_the_processor_from_nobody(open_region: OpenRegion) -> None:
    region = open_region()
    with inside(region) as look:
        policies = {role: {os.sched_getscheduler(pid) for pid in pids} for role, pids in look.workers.items()}
    assert policies["resolver"] == {os.SCHED_BATCH}
    assert policies["monitor"] == policies["evictor"] == {os.SCHED_OTHER}


def test_workers_share_the_programs_session_but_not_its_group(open_region: OpenRegion) -> None:
    """Another session would be another autogroup of the scheduler's; the same group would get the terminal's Ctrl-C."""
    region = open_region()
    with inside(region) as look:
        assert {os.getsid(pid) for pid in look.processes} == {os.getsid(0)}
        assert os.getpgid(0) not in {os.getpgid(pid) for pid in look.processes}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_the_fault_path_follows_the_thread(open_region: OpenRegion) -> None:
    """`auto` follows only where wake-ups across processors are dear, which the machine decides: then, and only then,
    the monitor is bound to the processor of the one thread that faults.
    """
    region = open_region("workers.cpus=auto", "prefetch.enabled=false")
    array = region.empty((64, 4096), "u1")
    allowed = os.sched_getaffinity(0)
    with inside(region) as look:
        (monitor,) = look.workers["monitor"]
        try:
            os.sched_setaffinity(0, {min(allowed)})
            for page in range(64):
                array[page] = 1
            last = page_of(region, array) + 63
            wait_until(lambda: look.table.state(last) is State.RESIDENT, "the last page is resident")
            follows = region.stats().counters["moves"] > 0
            assert os.sched_getaffinity(monitor) == ({min(allowed)} if follows else allowed)
        finally:
            os.sched_setaffinity(0, allowed)

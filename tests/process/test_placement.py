"""Who of a fault's processes goes first, and where they run: what the kernel has been told of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from regions import inside, page_of, wait_until

import dmh
from dmh.bench import work
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
    region = open_region("memory.limit=1MiB", "workers.cpus=auto", "prefetch.enabled=false")  # nothing is evicted
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


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_who_reads_ahead_keeps_the_processors_that_it_was_given(open_region: OpenRegion) -> None:
    """It leaves LPET's processor for another only if it may run there, and may run where it could before afterwards."""
    region = open_region("region.size=16MiB", "memory.limit=2MiB", "workers.cpus=any")
    array = region.empty((3500, 4096), "u1")
    allowed = os.sched_getaffinity(0)
    with inside(region) as look:
        pids = [*look.workers["evictor"], *look.workers["resolver"]]
        for given in ({min(allowed)}, allowed):
            for pid in pids:
                os.sched_setaffinity(pid, given)
            for _ in range(4):
                array[:, 0] += 1
            assert [os.sched_getaffinity(pid) for pid in pids] == [given] * len(pids)
    assert (array[:, 0] == 8).all()


def threads_at_the_lowest_priority(process: int) -> list[Path]:
    tasks = Path(f"/proc/{process}/task").iterdir()
    return [task for task in tasks if (task / "stat").read_text().rpartition(")")[2].split()[16] == "19"]


def state_and_ticks(task: Path) -> tuple[str, int]:
    fields = (task / "stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[11]) + int(fields[12])


def touch_at_random(region: dmh.Region, until: Callable[[], bool]) -> bool:
    """First touches in no order, which the fault path follows, until something is the case or 20,000 are done."""
    array = region.empty((20_000, 4096), "u1")
    order = np.random.default_rng(1).permutation(len(array)).astype(np.uint64) * np.uint64(4096)
    for at in range(0, len(order), 500):
        work.touch_at(work.address(array), order[at : at + 500], write=True)
        if until():
            return True
    return False


@pytest.mark.skipif(os.cpu_count() != 2, reason="needs exactly two processors")
@pytest.mark.parametrize("spin_us", ["auto", "0"])
def test_the_other_processor_is_kept_awake_no_longer_than_faults_come(open_region: OpenRegion, spin_us: str) -> None:
    """A scheduler that gives a woken thread the idle processor would move it, and us behind it, at every fault."""
    region = open_region(
        "region.size=96MiB", "memory.limit=88MiB", "prefetch.enabled=false", f"workers.spin_us={spin_us}"
    )
    with inside(region) as look:
        (monitor,) = look.workers["monitor"]
        kept = touch_at_random(region, lambda: look.table.counters()["kept"] > 0)
        if spin_us == "0":
            assert not kept
            return
        if not kept:
            pytest.skip("this machine's scheduler leaves the thread where it is")
        (keeper,) = threads_at_the_lowest_priority(monitor)
        wait_until(lambda: state_and_ticks(keeper)[0] == "S", "it sleeps, because no faults come")
        before = state_and_ticks(keeper)[1]
        time.sleep(0.3)  # time in which it could do what it must not
        assert state_and_ticks(keeper) == ("S", before)

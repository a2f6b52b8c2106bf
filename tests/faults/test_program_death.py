"""Programs are killed: what they held is given back, and others on the region notice nothing."""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from regions import inside, start_python, unique_name, wait_until

import dmh
from dmh.lspt.states import State

OpenRegion = Callable[..., dmh.Region]

HAMMER = """
import os, random, sys
import numpy as np, dmh
region = dmh.attach(sys.argv[1])
shared = region.ndarray((100, 512), "u8", int(sys.argv[2]))
column = int(sys.argv[3])
own = region.empty((60, 512), "u8")

def work(seed):
    rng = random.Random(seed)
    count = 0
    with region.pin(own[:2]):
        while True:
            count += 1
            page = rng.randrange(60)
            own[page] = count
            shared[rng.randrange(100), column] += 1
            if count % 50 == 0:
                array = region.empty(4096 * rng.randrange(1, 5), "u1")
                region.discard(own[page])

if len(sys.argv) > 4:
    for _ in sys.stdin:  # a child for every line
        if not (child := os.fork()):
            work(os.getpid())
        print(child, flush=True)
else:
    print("ready", flush=True)
    work(column)
"""


@contextmanager
def survivor(region: dmh.Region) -> Iterator[np.ndarray]:
    """A thread of this process that works on the region, and in the end has lost nothing."""
    array = region.empty((80, 512), "u8")
    array[:] = 0
    stop, rounds, wrong = threading.Event(), [0], []

    def work() -> None:
        while not stop.is_set():
            for page in range(80):
                if array[page, 5] != rounds[0]:
                    wrong.append((page, rounds[0], int(array[page, 5])))
                array[page, 5] += 1
            rounds[0] += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield array
        before = rounds[0]
        wait_until(lambda: rounds[0] > before + 1 or bool(wrong), "it goes on")
    finally:
        stop.set()
        thread.join()
    assert wrong == []


def settled(region: dmh.Region, pages: int) -> None:
    """Nothing of the dead is left."""

    def given_back() -> bool:
        stats = region.stats()
        return (stats.programs, stats.pinned, stats.allocated) == (1, 0, pages)

    wait_until(given_back, "what the dead held is given back")
    with inside(region) as look:
        look.validate()


def test_programs_that_are_killed_at_random_moments(open_region: OpenRegion) -> None:
    region = open_region("memory.limit=256KiB")
    shared = region.empty((100, 512), "u8")
    shared[:] = 0
    rng = random.Random(7)
    with survivor(region) as _kept:  # its pages are among those that are still allocated at the end
        programs = [start_python(HAMMER, region.name, region.offset_of(shared), column) for column in range(4)]
        for program in programs:
            assert program.stdout is not None
            assert program.stdout.readline() == "ready\n"
        time.sleep(0.3)
        for program in programs:
            time.sleep(rng.random() * 0.1)
            program.kill()
            program.communicate()
        sums = shared.sum(axis=0)
        assert (sums[:4] > 0).all()
        assert not sums[4:].any()
    settled(region, 180)


def test_forked_children_that_are_killed_at_random_moments(open_region: OpenRegion) -> None:
    """Also before they are known by name, and while they wait to be."""
    region = open_region("memory.limit=256KiB")
    shared = region.empty((100, 512), "u8")
    shared[:] = 0
    rng = random.Random(8)
    with survivor(region) as _kept, start_python(HAMMER, region.name, region.offset_of(shared), 9, "forks") as mother:
        assert mother.stdin is not None
        assert mother.stdout is not None
        children = []
        for _ in range(40):
            mother.stdin.write("\n")
            mother.stdin.flush()
            children.append(int(mother.stdout.readline()))
            time.sleep(rng.choice((0.0, 0.0, 0.001, 0.02)))
            if rng.random() < 0.8:
                os.kill(children.pop(rng.randrange(len(children))), signal.SIGKILL)
        mother.kill()
        for child in children:
            os.kill(child, signal.SIGKILL)
    settled(region, 180)


@pytest.mark.parametrize("forked", [False, True])
def test_a_program_that_is_killed_while_it_waits_for_a_page(open_region: OpenRegion, forked: bool) -> None:
    """The page is on its way for somebody who is gone; who wants it next has it."""
    region = open_region("prefetch.enabled=false", "workers.inline=false")
    array = region.empty((20, 4096), "u1")
    array[:] = 6
    region.evict(array)
    code = """
        import os, sys
        import dmh
        region = dmh.attach(sys.argv[1])
        array = region.ndarray((20, 4096), "u1", int(sys.argv[2]))
        child = os.fork() if len(sys.argv) > 3 else 0
        print(child or os.getpid(), flush=True)
        if child:
            os.wait()
        else:
            sys.stdin.readline()
            print(array[7, 7], flush=True)
        """
    with inside(region) as look:
        with start_python(code, region.name, region.offset_of(array), *["forked"] * forked) as program:
            assert program.stdin is not None
            assert program.stdout is not None
            victim = int(program.stdout.readline())
            if forked:
                assert int(program.stdout.readline()) == victim, "the child has come up"
            region.evict(array)
            for pid in look.workers["resolver"]:
                os.kill(pid, signal.SIGSTOP)
            program.stdin.write("\n")
            program.stdin.flush()
            try:
                wait_until(lambda: "userfault" in Path(f"/proc/{victim}/wchan").read_text(), "it waits in the fault")
            finally:
                os.kill(victim, signal.SIGKILL)
                for pid in look.workers["resolver"]:
                    os.kill(pid, signal.SIGCONT)
                program.wait(20)
        wait_until(lambda: region.stats().programs == 1, "it is forgotten")
        assert (array == 6).all()
        look.validate()


def test_children_are_born_while_the_monitor_is_killed_again_and_again(open_region: OpenRegion) -> None:
    """A birth that dies with the monitor leaves a child that must not touch the region (SIGSEGV); none reads zeros."""
    region = open_region()
    array = region.empty((100, 4096), "u1")
    array[:] = 200
    stop = threading.Event()

    def kill() -> None:
        rng = random.Random(3)
        with inside(region) as look:
            while not stop.wait(rng.random() * 0.4):
                if monitor := int(look.table.raw.pids[0]):
                    os.kill(monitor, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    endings = set()
    try:
        for _ in range(25):
            child = os.fork()
            if not child:
                signal.alarm(30)
                faulthandler.disable()
                os._exit(0 if (array[::7] == 200).all() else 1)
            endings.add(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    finally:
        stop.set()
        killer.join()
    assert 0 in endings
    assert endings <= {0, -signal.SIGSEGV}
    assert (array == 200).all()
    settled(region, 100)


def test_a_run_ends_with_the_last_program_however_it_ends(tmp_path: Path) -> None:
    """The program that dmh started has gone before; one that it left behind is killed."""
    code = """
import os, sys, dmh
region = dmh.attach()
array = region.zeros(100_000)
if os.fork():
    os._exit(7)
array[:] = 1
print(os.getpid(), flush=True)
while True:
    array += 1
"""
    (tmp_path / "run.yaml").write_text(
        f"region: {{name: {unique_name()}, size: 4MiB}}\nmemory: {{limit: 256KiB}}\nstore: {{url: 'file://{tmp_path}/pages'}}\n"
    )
    command = [sys.executable, "-m", "dmh.cli.main", "run", "-c", str(tmp_path / "run.yaml"), "--", sys.executable]
    with subprocess.Popen([*command, "-c", code], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        left = int(run.stdout.readline())
        with pytest.raises(subprocess.TimeoutExpired):
            run.wait(0.5)
        os.kill(left, signal.SIGKILL)
        assert run.wait(20) == 7
    assert not (tmp_path / "pages").exists()


def test_claims_of_the_dead_are_dropped(open_region: OpenRegion) -> None:
    """However many die while they wait, no page stays claimed."""
    region = open_region("prefetch.enabled=false", "workers.inline=false")
    array = region.empty((40, 4096), "u1")
    array[:] = 6
    region.evict(array)
    for page in range(0, 40, 4):
        child = os.fork()
        if not child:
            array[page : page + 4].sum()
            os._exit(0)
        time.sleep(0.002 * (page % 12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (array == 6).all()
    settled(region, 40)
    with inside(region) as look:
        assert State.FETCHING not in look.states(0, 40)

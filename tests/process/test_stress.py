"""`dmh stress`: what it does, and that it finds what it is for: wrong words, hangs, deaths; nothing is left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from regions import unique_name, wait_until

from dmh.region.connection import service_stats
from dmh.service.paths import control_socket, service_directory
from dmh.stress.plan import Plan
from dmh.stress.verdict import wrong_word

DMH = [sys.executable, "-m", "dmh.cli.main", "stress"]


SCRIBBLE = """
import sys, time
import numpy as np, dmh
region = dmh.attach(sys.argv[1])
array = region.ndarray((512,), np.uint64, 3 * 4096)
while True:
    array[:] = 12345
    time.sleep(0.005)
"""


class Stress:
    """A run of `dmh stress` whose region has a name of its own."""

    def __init__(self, *words: str) -> None:
        self.name = unique_name()
        self.process = subprocess.Popen(
            [*DMH, "--json", "--seed", "7", "--set", f"region.name={self.name}", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def verdict(self) -> tuple[int, dict[str, Any]]:
        out, err = self.process.communicate(timeout=50)
        assert out, err
        return self.process.returncode, json.loads(out)

    def at_work(self) -> None:
        """Return as soon as the programs are."""
        wait_until(lambda: control_socket(service_directory(self.name)).exists(), "the service is up")
        wait_until(lambda: service_stats(self.name)["counters"]["evicted"] > 100, "the programs are at work")

    def children(self, command: str) -> list[int]:
        """Processes of the run, by a word of their command line."""
        found, waiting = [], [self.process.pid]
        while waiting:
            pid = waiting.pop()
            try:
                waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
                if command.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    found.append(pid)
            except OSError:
                continue
        return found

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)


@pytest.fixture
def stress(request: pytest.FixtureRequest) -> Iterator[Any]:
    runs: list[Stress] = []

    def start(*words: str) -> Stress:
        runs.append(Stress(*words))
        return runs[-1]

    yield start
    for run in runs:
        run.end()
        assert not service_directory(run.name).exists()
    assert not list(Path("/var/tmp").glob(f"dmh-stress-{os.getpid()}-*"))


def test_a_run_in_which_all_is_well(stress: Any) -> None:
    status, verdict = stress("--duration", "3s", "--size", "16MiB", "--limit", "1MiB").verdict()
    assert (status, verdict["ok"]) == (0, True), verdict
    assert verdict["operations"] > 1000
    assert verdict["words"] == 16 << 20 >> 3
    assert {"evict", "flush", "prefetch", "pin", "discard", "scan"} <= {kind.split()[0] for kind in verdict["asked"]}
    assert verdict["counters"]["evicted"] > 1000
    assert 0 < verdict["highest"] <= verdict["limit"] == 1 << 20
    assert verdict["kills"] == {}


def test_a_word_that_somebody_else_writes_is_found(stress: Any) -> None:
    """What a lost write, a stale page or a mixed-up one would look like."""
    run = stress("--duration", "20s", "--size", "4MiB", "--limit", "1MiB")
    run.at_work()
    # Not in this process: whoever has the region mapped is ended with the service.
    writer = subprocess.Popen([sys.executable, "-c", SCRIBBLE, run.name])
    status, verdict = run.verdict()
    assert (status, verdict["ok"]) == (1, False)
    assert verdict["wrong"][0].startswith("wrong: word "), verdict
    assert " of page 3 (" in verdict["wrong"][0]
    assert "got 0x0000000000003039" in verdict["wrong"][0]
    writer.kill()
    writer.wait()
    assert verdict["hangs"] == []


def test_a_service_that_stands_still_is_a_hang(stress: Any) -> None:
    run = stress("--duration", "30s", "--hang", "2s", "--size", "8MiB", "--limit", "1MiB")
    run.at_work()
    stopped = run.children("workers.evictor")
    os.kill(stopped[0], signal.SIGSTOP)
    wait_until(lambda: not run.children("dmh.stress.program"), "the programs are ended", 30)
    os.kill(stopped[0], signal.SIGCONT)
    status, verdict = run.verdict()
    assert status == 1
    assert "of program" in verdict["hangs"][0]
    assert "page" in verdict["hangs"][0]


def test_a_program_that_dies_is_told(stress: Any) -> None:
    run = stress("--duration", "30s", "--size", "8MiB", "--limit", "1MiB")
    run.at_work()
    os.kill(run.children("dmh.stress.program")[0], signal.SIGKILL)
    status, verdict = run.verdict()
    assert status == 1
    assert verdict["ended"] == ["ended: program 0, by SIGKILL"] or verdict["ended"] == ["ended: program 1, by SIGKILL"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_leaves_nothing(stress: Any, number: signal.Signals) -> None:
    run = stress("--duration", "30s", "--size", "8MiB", "--limit", "1MiB")
    run.at_work()
    processes = [
        *run.children("dmh.stress.program"),
        *run.children("workers.evictor"),
        *run.children("workers.monitor"),
    ]
    run.process.send_signal(number)
    assert run.process.wait(30) == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes), "every process has ended")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--kill-store"], "--store redis"),
        (["--threads", "0"], "1 to 64"),
        (["--kill-rate", "-1"], "0 to 100"),
        (["--size", "64KiB", "--limit", "32KiB", "--processes", "8"], "make --size larger"),
        (["--limit", "1GiB"], "at most region.size"),
    ],
)
def test_options_that_cannot_be_are_told(words: list[str], says: str) -> None:
    done = subprocess.run([*DMH, *words], capture_output=True, text=True, timeout=30)
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_every_page_belongs_to_somebody() -> None:
    for pages, processes, threads in ((1000, 3, 2), (16, 2, 4), (4096, 1, 1), (17, 8, 1)):
        plan = Plan(1.0, processes, threads, 0.0, False, 1, 60.0, 4096, pages, 0, True)
        assert plan.shared >= 1
        assert plan.shared + plan.own * plan.lanes == pages
        assert Plan.from_wire(plan.to_wire()) == plan


def test_a_wrong_word_says_what_it_is() -> None:
    found = {"page": 7, "word": 3, "version": 9, "expected": 1, "got": 2, "again": 2, "older": 0}
    assert "never written" in wrong_word(0, found)
    assert "4 writes old: a lost write" in wrong_word(0, found | {"older": 4})
    assert "zeros in the place of data" in wrong_word(0, found | {"got": 0, "again": 0})
    assert "read again 0x0000000000000001" in wrong_word(0, found | {"again": 1})

"""The launcher is killed: workers go on serving, and another launcher takes over from them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from regions import Inside, left_by, start_python, unique_name, wait_until

from dmh.cli.stats import service_stats
from dmh.errors import ServiceError
from dmh.service.ledger import Ledger, State

DMH = [sys.executable, "-m", "dmh.cli.main"]

PROGRAM = """
import sys, numpy as np, dmh
region = dmh.attach(sys.argv[1])
a = region.zeros((128, 512), "u8")
b = region.zeros((64, 512), "u8")
shadow = np.zeros((128, 512), "u8")
rng = np.random.default_rng(5)
print("ready", flush=True)
for line in sys.stdin:
    what = line.strip()
    if what == "work":
        for page in rng.integers(0, 128, 600):
            assert (a[page] == shadow[page]).all(), page
            a[page] += 1
            shadow[page] += 1
    elif what == "ask":
        region.flush(a)
        c = region.zeros((8, 512), "u8")
        assert not c.any()
        c[:] = 9
        del c
    elif what == "free":
        b[:] = 5
        region.evict(b)
        del b
    elif what == "end":
        break
    assert np.array_equal(a, shadow)
    print(what, flush=True)
print("ended", flush=True)
"""


class Served:
    """A `dmh serve` and programs on it, whose launcher can be killed and replaced."""

    def __init__(self, directory: Path) -> None:
        self.name = unique_name()
        self.file = directory / "service.yaml"
        self.file.write_text(
            f"region: {{name: {self.name}, size: 2MiB}}\n"
            "memory: {limit: 256KiB, high: 40 pages, low: 24 pages}\n"
            "evictor: {buffer: 16 pages}\n"
            f"store: {{url: 'file:{directory}/pages'}}\n"
            "service: {grace: 3s}\n"
        )
        self.launchers: list[subprocess.Popen[bytes]] = []
        self.programs: list[subprocess.Popen[str]] = []
        self.pids: list[int] = []
        self._start("-c", str(self.file))

    def _start(self, *arguments: str) -> None:
        # Into a file: workers have it open as well, and live longer.
        log = self.file.with_suffix(f".log{len(self.launchers)}")
        with log.open("w") as file:
            launcher = subprocess.Popen([*DMH, "serve", *arguments], stdout=file, stderr=file)
        self.launchers.append(launcher)
        wait_until(lambda: "programs join" in log.read_text() or launcher.poll() is not None, "the launcher is up")
        assert launcher.poll() is None, log.read_text()

    def look(self) -> Inside:
        """At the service, by way of the launcher that lives."""
        inside = Inside(self.launchers[-1].pid)
        self.pids += [pid for pid in inside.table.raw.pids if pid]
        return inside

    def kill_launcher(self) -> None:
        self.look().close()
        self.launchers[-1].kill()
        self.launchers[-1].wait()

    def adopt(self) -> None:
        self._start("--adopt", self.name)

    def program(self) -> subprocess.Popen[str]:
        program = start_python(PROGRAM, self.name, stderr=subprocess.PIPE)
        self.programs.append(program)
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        return program

    def stop(self) -> None:
        for program in self.programs:
            program.kill()
            program.communicate()
        for launcher in self.launchers:
            if launcher.poll() is None:
                launcher.terminate()
            launcher.wait(20)
        wait_until(lambda: not left_by(self.name, self.pids), f"nothing is left: {left_by(self.name, self.pids)}")


def tell(program: subprocess.Popen[str], what: str) -> None:
    assert program.stdin is not None
    assert program.stdout is not None
    program.stdin.write(what + "\n")
    program.stdin.flush()
    answer = program.stdout.readline().strip()
    if answer != what and not (what == "end" and answer == "ended"):
        assert program.stderr is not None
        program.kill()
        raise AssertionError(f"{what}: {answer} {program.stderr.read()}")


@contextmanager
def served(directory: Path) -> Iterator[Served]:
    service = Served(directory)
    try:
        yield service
    finally:
        service.stop()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path) as service:
        yield service


def test_workers_go_on_and_another_launcher_takes_over(service: Served) -> None:
    one, two = service.program(), service.program()
    tell(one, "work")
    tell(one, "free")
    service.kill_launcher()
    tell(one, "work")
    tell(two, "work")
    with pytest.raises(ServiceError):
        service_stats(service.name)
    service.adopt()
    for program in (one, two):
        tell(program, "ask")
        tell(program, "work")
    three = service.program()
    tell(three, "work")
    stats = service_stats(service.name)
    assert stats["programs"] == 3
    assert stats["allocated"] == 128 * 3 + 64 * 2
    for program in (one, two, three):
        tell(program, "end")
        program.wait(10)
    wait_until(lambda: service_stats(service.name)["allocated"] == 0, "everything is given back")


def test_a_launcher_can_be_lost_again_and_again(service: Served) -> None:
    program = service.program()
    for _ in range(3):
        service.kill_launcher()
        tell(program, "work")
        service.adopt()
        tell(program, "ask")
    assert service_stats(service.name)["programs"] == 1


def test_what_is_asked_while_there_is_no_launcher_is_answered_by_the_next(service: Served) -> None:
    program = service.program()
    tell(program, "work")
    service.kill_launcher()
    assert program.stdin is not None
    assert program.stdout is not None
    program.stdin.write("ask\n")
    program.stdin.flush()
    service.adopt()
    assert program.stdout.readline() == "ask\n"


@pytest.mark.parametrize("dead", [(0,), (1, 3), (0, 1, 2)])
def test_workers_that_died_meanwhile_are_replaced(service: Served, dead: tuple[int, ...]) -> None:
    program = service.program()
    tell(program, "work")
    look = service.look()
    pids = list(look.table.raw.pids)
    look.close()
    service.kill_launcher()
    for number in dead:
        os.kill(pids[number], signal.SIGKILL)
    assert program.stdin is not None
    assert program.stdout is not None
    program.stdin.write("work\n")  # may stand still until the successors are there
    program.stdin.flush()
    service.adopt()
    assert program.stdout.readline() == "work\n"
    tell(program, "ask")
    look = service.look()
    wait_until(lambda: all(look.table.raw.pids[0:4]), "every worker is there")
    look.validate()
    look.close()
    os.kill(service.pids[-1], signal.SIGKILL)  # an adopted worker's death is noticed as well
    tell(program, "work")
    tell(program, "ask")


def test_a_program_that_ended_meanwhile_holds_nothing_any_more(service: Served) -> None:
    one, two = service.program(), service.program()
    tell(one, "work")
    service.kill_launcher()
    one.kill()
    one.wait()
    service.adopt()
    wait_until(lambda: service_stats(service.name)["programs"] == 1, "the dead program is forgotten")
    wait_until(lambda: service_stats(service.name)["allocated"] == 192, "its arrays are given back")
    tell(two, "work")


def test_with_its_last_program_gone_a_service_without_launcher_ends(service: Served) -> None:
    program = service.program()
    service.kill_launcher()
    tell(program, "work")
    tell(program, "end")
    program.wait(10)
    wait_until(lambda: not left_by(service.name, service.pids), "nothing is left")


def test_what_cannot_be_taken_over_is_told(service: Served) -> None:
    def refused(name: str) -> str:
        done = subprocess.run([*DMH, "serve", "--adopt", name], capture_output=True, text=True, timeout=30)
        assert done.returncode == 1
        return done.stderr

    assert "has a launcher that lives" in refused(service.name)
    assert "there is no service named 'nobody'" in refused("nobody")


FORKS = """
import os, signal, sys, dmh
region = dmh.attach(sys.argv[1])
if not region._mapping.follows:
    print("not followed", flush=True)
    sys.exit()
array = region.empty((128, 4096), "u1")
for page in range(128):
    array[page] = page
print("ready", flush=True)
children = []
for line in sys.stdin:
    children.append(os.fork())
    if not children[-1]:
        signal.alarm(30)
        right = all((array[page] == page).all() for page in range(128))
        own = region.empty(4096, "u1")
        print(line.strip(), right and not own.any(), flush=True)
        signal.pause()
    print("forked", flush=True)
for child in children:
    os.kill(child, signal.SIGKILL)
"""


def test_children_forked_before_without_and_after_a_launcher(service: Served) -> None:
    """A child that is born without one waits, before it touches anything, for the one that takes over."""
    with start_python(FORKS, service.name) as program:
        assert program.stdout is not None
        if program.stdout.readline() == "not followed\n":
            pytest.skip("needs CAP_SYS_PTRACE: UFFD_FEATURE_EVENT_FORK")

        def fork(when: str, lines: int) -> set[str]:
            assert program.stdin is not None
            assert program.stdout is not None
            program.stdin.write(f"{when}\n")
            program.stdin.flush()
            return {program.stdout.readline() for _ in range(lines)}

        assert fork("before", 2) == {"forked\n", "before True\n"}
        service.kill_launcher()
        assert fork("without", 1) == {"forked\n"}
        service.adopt()
        assert program.stdout.readline() == "without True\n"
        assert fork("after", 2) == {"forked\n", "after True\n"}
        assert service_stats(service.name)["programs"] == 4
        assert service_stats(service.name)["allocated"] == 131


def test_a_ledger_says_what_was_noted_and_stays_short(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = Ledger(path, fresh=True)
    ledger.note("register", view=1, pid=7, started=8, base=4096, owner=False, follows=True, parent=0)
    ledger.note("take", first=900, count=2)
    for view, writes in ((3, False), (4, True), (5, True)):
        ledger.note(
            "register", view=view, pid=9, started=view, base=8192, owner=False, follows=False, parent=0, writes=writes
        )
    for view in (4, 5):
        ledger.note("lingers", view=view, base=8192)
        ledger.note("detach", view=view)
    ledger.note("gone", view=4)
    ledger.note("untold")
    for n in range(30_000):
        ledger.note("allocate", view=1, first=n % 50, count=1)
        if n >= 10:
            ledger.note("freeing", view=1, first=(n - 10) % 50, count=1)
            ledger.note("freed", first=(n - 10) % 50, count=1)
    ledger.note("pin", view=1, first=3, count=4)
    ledger.note("register", view=2, pid=0, started=0, base=4096, owner=False, follows=True, parent=1)
    ledger.note("process", view=2, pid=17, started=9)
    ledger.note("let-go", view=2, first=29_999 % 50)
    ledger.close()
    assert path.stat().st_size < 2_000_000
    with path.open("ab") as file:
        file.write(b'{"op":"allocate","view":1,"fir')  # killed in the middle of a line
    again = Ledger(path, fresh=False)
    assert again.state == ledger.state
    assert again.state.programs[1].pins == [(3, 4)]
    assert set(again.state.programs[1].blocks) == {n % 50 for n in range(29_990, 30_000)}
    assert [program.writes for program in again.state.programs.values()] == [True, False, True]
    child = again.state.programs[2]
    assert (child.pid, child.started, child.pins) == (17, 9, [])
    assert set(child.blocks) == set(again.state.programs[1].blocks) - {29_999 % 50}
    again.note("detach", view=1)
    again.note("detach", view=2)
    again.note("detach", view=3)
    again.close()
    last = Ledger(path, fresh=False)
    assert last.state == State(taken=[(900, 2)], lingering={5: (8192, 9, 5)}, untold=True, views=5)
    last.close()

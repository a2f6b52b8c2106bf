"""Deaths while pages leave unseen: the evictor's, also while a program joins that can write, and the launcher's."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from readonly import CAN_SEAL, SMALL, Program, Service, service, stored_in
from regions import wait_until
from test_launcher_death import Served, served
from test_worker_death import Killer

from dmh.lspt.states import Copy, State
from dmh.lspt.steps import NUMBERS
from dmh.native import lib
from dmh.service.ledger import Ledger
from dmh.service.paths import ledger_file, service_directory

pytestmark = pytest.mark.skipif(not CAN_SEAL, reason="needs mseal")
STEPS = ("dropping", "let_go")
LARGE = ("region.size=8MiB", "region.page_size=64KiB", "memory.limit=1MiB", "evictor.buffer=4 pages")


@pytest.fixture(params=[SMALL, LARGE], ids=["4KiB", "64KiB"])
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    with service(*request.param, stored_in(tmp_path)) as running:
        yield running


def filled(running: Service) -> tuple[Program, dict[int, int]]:
    """A reader, and what is stored of each kernel page; the last quarter of the pages is new."""
    pages = running.pages * running.look.table.page_size // 4096
    versions = dict.fromkeys(range(pages * 3 // 4), 1)
    writer = running.program("r+")
    writer.ask("write", versions)
    writer.leave()
    reader = running.program("r")
    running.evict(reader)
    return reader, versions


def restarted(running: Service) -> bool:
    return running.counters()["restarts"] > 0


@pytest.mark.parametrize("step", STEPS)
def test_of_the_evictor(running: Service, step: str) -> None:
    reader, versions = filled(running)
    for new in (False, True):
        before = running.counters()["restarts"]
        killer = Killer(running.look, step)
        while killer.at_work():
            assert reader.ask("int(array[len(array) * 3 // 4 :].sum())" if new else "check", *[versions][new:]) in (
                0,
                [],
            )
        killer.join()
        wait_until(lambda before=before: running.counters()["restarts"] > before, "a successor is at work")  # type: ignore[misc]
        assert reader.ask("check", versions) == []
        assert reader.ask("int(array[len(array) * 3 // 4 :].sum())") == 0
        running.evict(reader)
        assert reader.ask("check", versions) == []
        running.look.validate()


@pytest.mark.parametrize("step", STEPS)
def test_of_the_evictor_while_a_writer_waits_for_it(running: Service, step: str) -> None:
    """The writer is let in before the dead one's pages are looked at, and writes at once: what is still there stays."""
    reader, versions = filled(running)
    raw, table = running.look.table.raw, running.look.table
    few = dict.fromkeys(range(16), 1)
    assert reader.ask("check", few) == []
    assert int(reader.ask("int(array[-32:].sum())")) == 0
    raw.parked = 0
    raw.park = NUMBERS[step] + 1
    reader.tell("region.evict()")
    wait_until(lambda: raw.parked != 0, "the evictor is in the middle of it")
    caught = table.in_state(State.EVICTING).tolist()
    assert caught
    writer = running.start("r+")
    wait_until(lambda: int(raw.quiet) == 0, "the writer is about to join")
    assert not writer.says_something(0.3)
    # The successor is stopped before it has begun, so that the writer comes first.
    os.kill(int(raw.pids[raw.parked - 1]), signal.SIGKILL)
    writer.ready()
    versions |= dict.fromkeys(range(16), 2) | dict.fromkeys(range(len(versions), len(versions) * 4 // 3), 2)
    writer.ask("write", versions)
    reader.answer()
    wait_until(lambda: restarted(running), "a successor is at work")
    assert reader.ask("check", versions) == []
    running.evict(reader)
    assert reader.ask("check", versions) == []
    running.look.validate()


def test_part_of_a_page_was_still_there(tmp_path: Path) -> None:
    """Not what the kernel does when it punches, but what recovery must be able to set right all the same."""
    with service(*LARGE, stored_in(tmp_path)) as running:
        reader, versions = filled(running)
        raw, table = running.look.table.raw, running.look.table
        assert reader.ask("check", dict.fromkeys(range(16), 1)) == []
        assert table.copies[0] == Copy.VALID
        raw.parked = 0
        raw.park = NUMBERS["dropping"] + 1
        reader.tell("region.evict()")
        wait_until(lambda: raw.parked != 0, "the evictor is in the middle of it")
        assert table.state(0) is State.EVICTING
        assert lib.dmh_punch_file(running.look.region_fd, 4096, 3 * 4096) == 0
        os.kill(int(raw.pids[raw.parked - 1]), signal.SIGKILL)
        raw.parked = 0
        assert reader.answer() is None
        wait_until(lambda: restarted(running), "a successor is at work")
        assert reader.ask("check", versions) == []
        running.evict(reader)
        running.look.validate()


class TestOfTheLauncher:
    @pytest.fixture
    def service(self, tmp_path: Path) -> Iterator[Served]:
        with served(tmp_path) as service:
            yield service

    def program(self, service: Served, mode: str) -> Program:
        program = Program(service.name, mode)
        service.programs.append(program.process)
        return program.ready()

    def test_its_successor_knows_who_can_write(self, service: Served) -> None:
        versions = dict.fromkeys(range(512), 1)
        writer = self.program(service, "r+")
        writer.ask("write", versions)
        reader, late = self.program(service, "r"), self.program(service, "r+")
        writer.leave()
        ledger = Ledger(ledger_file(service_directory(service.name)), fresh=False)
        assert [program.writes for program in ledger.state.programs.values()] == [False, True]
        ledger.close()
        service.kill_launcher()
        late.kill()  # nobody hears of it
        service.adopt()
        assert reader.ask("check", versions) == []
        versions |= dict.fromkeys(range(9), 2)
        third = self.program(service, "r+")
        third.ask("write", versions)
        third.leave()
        assert reader.ask("check", versions) == []

    def test_readers_alone_are_still_alone(self, service: Served) -> None:
        versions = dict.fromkeys(range(512), 1)
        writer = self.program(service, "r+")
        writer.ask("write", versions)
        writer.leave()
        readers = [self.program(service, "r") for _ in range(2)]
        readers[0].ask("region.evict()")
        service.kill_launcher()
        service.adopt()
        look = service.look()
        try:
            wait_until(lambda: int(look.table.raw.quiet) > 0, "it is quiet")
            before = look.table.counters()
            for reader in readers:
                assert reader.ask("check", versions) == []
            after = look.table.counters()
            assert after["dropped_clean"] - before["dropped_clean"] > 500
            assert after["written"] == before["written"]
        finally:
            look.close()

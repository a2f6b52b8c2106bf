"""`dmh demo`: what it computes, what it finds when memory is wrong, how it ends, and that it leaves nothing behind."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from regions import wait_until

import dmh
from dmh.cli import demo
from dmh.demo import program as demo_program
from dmh.demo.expected import Expected, SortedContent
from dmh.demo.program import Mismatch, Program
from dmh.demo.progress import PHASES, Progress
from dmh.errors import RegionError, StoreError
from dmh.service.paths import service_directory

COMMAND = [sys.executable, "-m", "dmh.cli.main", "demo"]
COUNT = 100_000

# ---- the numbers


def test_any_part_of_the_stream_is_the_same_part() -> None:
    expected = Expected(7, COUNT, 500)
    whole = expected.filled(0, COUNT)
    assert len(np.unique(whole)) == COUNT
    for low, high in ((0, 1), (1, 2), (3, 8), (4096, 9999), (COUNT - 5, COUNT), (17, 17)):
        np.testing.assert_array_equal(expected.filled(low, high), whole[low:high])
    assert not np.array_equal(whole, Expected(8, COUNT, 500).filled(0, COUNT))


def test_updates_are_distinct_and_found_again_in_any_part() -> None:
    expected = Expected(7, COUNT, 5000)
    positions, added = expected.updates
    assert len(np.unique(positions)) == len(positions) > 4800
    array = expected.filled(0, COUNT)
    array[positions] += added
    for low, high in ((0, COUNT), (0, 1), (5, 50_000), (99_990, COUNT)):
        np.testing.assert_array_equal(expected.updated(low, high), array[low:high])


@pytest.mark.parametrize("count", [1, 2, 1000, 1 << 14, 100_003])
def test_content_accepts_the_sorted_elements_in_whatever_parts_they_came(count: int) -> None:
    values = np.random.Philox(3).random_raw(count)
    content = SortedContent(count)
    for low in range(0, count, 777):
        content.add(values[low : low + 777])
    ordered, bounds = np.sort(values), content.bounds()
    assert bounds[-1] == count
    for number, (low, high) in enumerate(itertools.pairwise(bounds)):
        assert content.accepts(number, ordered[low:high])
        if high - low > 1:
            assert not content.accepts(number, ordered[low:high][::-1])


# ---- the program, on an ordinary array


def _run_until(program: Program, last: str) -> None:
    for name, phase in program.phases.items():
        for _ in phase():
            pass
        if name == last:
            return


def test_every_phase_passes_on_a_sound_array() -> None:
    program = Program(np.zeros(COUNT, np.uint64), Expected(1, COUNT, 500))
    assert tuple(program.phases) == PHASES
    for phase in program.phases.values():
        fractions = list(phase())
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0
    assert bool((program.array[1:] >= program.array[:-1]).all())


def _flip_a_bit(array: Any) -> None:
    array[70_001] ^= np.uint64(1)


def _exchange_two(array: Any) -> None:
    array[[70_001, 80_002]] = array[[80_002, 70_001]]


def _repeat_a_page(array: Any) -> None:
    array[70_144:70_656] = array[69_632:70_144]


def _lose_a_page(array: Any) -> None:
    array[70_144:70_656] = 0


def _lose_the_end(array: Any) -> None:
    array[-1] = 0


@pytest.mark.parametrize("part", [1 << 10, 1 << 16])
@pytest.mark.parametrize("damage", [_flip_a_bit, _exchange_two, _repeat_a_page, _lose_a_page, _lose_the_end])
@pytest.mark.parametrize("after", ["fill", "random updates", "sort"])
def test_damage_is_found_and_its_first_element_named(
    after: str, damage: Callable[[Any], None], part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_program, "PART", part)
    program = Program(np.zeros(COUNT, np.uint64), Expected(1, COUNT, 500))
    _run_until(program, after)
    sound = program.array.copy()
    damage(program.array)
    first = int(np.flatnonzero(program.array != sound)[0])
    # All that follows: damage that a sum does not see (two elements exchanged) is seen by the next phase that compares.
    rest = list(program.phases)[list(program.phases).index(after) + 1 :]
    with pytest.raises(Mismatch) as found:
        list(itertools.chain.from_iterable(program.phases[name]() for name in rest))
    assert found.value.index == first
    if after != "fill":  # updates may come in between
        assert (found.value.expected, found.value.got) == (int(sound[first]), int(program.array[first]))


def test_a_sum_of_bytes_that_read_right_a_moment_later_is_a_mismatch() -> None:
    class Fickle(np.ndarray):  # type: ignore[type-arg]
        def sum(self, *args: Any, **kwargs: Any) -> Any:
            return np.uint64(5)

    expected = Expected(1, COUNT, 500)
    with pytest.raises(Mismatch) as found:
        list(Program(expected.filled(0, COUNT).view(Fickle), expected).checksum())
    assert (found.value.index, found.value.got) == (0, 5)


# ---- settings


def _arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_parser(parser.add_subparsers())
    return parser.parse_args(["demo", *words])


@pytest.mark.parametrize(
    ("words", "array", "limit", "region"),
    [
        ("", 1_024_000_000, 256_000_000, 1_024_000_000),
        ("--size 32MiB", 32 << 20, 8 << 20, 32 << 20),
        ("--size 33554443", 33554440, 33554443 // 4, (32 << 20) + 4096),
        ("--set memory.limit=2MiB", 8 << 20, 2 << 20, 8 << 20),
        ("--size 32MiB --set memory.limit=2MiB", 32 << 20, 2 << 20, 32 << 20),
        ("--size 1MiB --set region.size=2MiB", 1 << 20, 1 << 18, 2 << 20),
        ("--size 99MB --set region.page_size=2MiB", 99_000_000, 24_750_000, 48 << 21),
        ("-c configs/quickstart.yaml", 4 << 30, 1 << 30, 4 << 30),
        ("-c configs/quickstart.yaml --set memory.limit=64MiB", 256 << 20, 64 << 20, 4 << 30),
    ],
)
def test_the_array_is_four_times_the_limit_unless_told_otherwise(
    words: str, array: int, limit: int, region: int
) -> None:
    config, size, page_file = demo.settings(_arguments(*words.split()))
    assert (size, config.memory.limit, config.region.size) == (array, limit, region)
    if "-c" in words:
        assert (page_file, config.region.name) == (None, "quickstart")
    else:
        assert config.store.url == f"file://{page_file}"
        assert config.region.name == f"demo-{os.getpid()}"


def test_an_array_that_does_not_fit_the_region_is_refused() -> None:
    with pytest.raises(RegionError, match=r"4 x memory\.limit \(2GiB\) is 8GiB, and region\.size only 4GiB"):
        demo.settings(_arguments("-c", "configs/quickstart.yaml", "--set", "memory.limit=2GiB"))
    with pytest.raises(RegionError, match=r"--size is 5GiB, and region\.size only 4GiB.*or --size smaller"):
        demo.settings(_arguments("-c", "configs/quickstart.yaml", "--size", "5GiB"))


def test_the_page_file_goes_to_a_disk_with_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(other)
    assert demo.page_file_directory(1) == tmp_path
    free = {tmp_path: 10, other: 100}
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free.get(path, 10)))
    assert demo.page_file_directory(50) == other
    # In memory only where there is nothing else: then it is no use, but the demo runs.
    monkeypatch.setattr(demo, "filesystem_of", lambda path: "tmpfs" if path == tmp_path else "ext4")
    assert demo.page_file_directory(5) != tmp_path
    monkeypatch.setattr(demo, "filesystem_of", lambda path: "tmpfs")
    assert demo.page_file_directory(5) == tmp_path
    with pytest.raises(StoreError, match=rf"{tmp_path} has only 0 MB free.*{other} has only 0 MB free.*Set TMPDIR"):
        demo.page_file_directory(500)


def test_the_kernel_says_what_is_in_memory() -> None:
    assert demo.filesystem_of(Path("/dev/shm")) == "tmpfs"
    assert demo.filesystem_of(Path("/proc")) == "proc"


# ---- what is collected


def test_rates_are_those_of_the_last_second() -> None:
    progress = Progress()
    assert progress.rates().faults == 0
    for tick in range(30):
        progress.counted(
            {"faults": tick * 10, "fetched_bytes": max(0, tick - 20) * 1000, "written_bytes": 0}, tick * 0.2
        )
    rates = progress.rates()
    assert (round(rates.faults), round(rates.fetched), rates.written) == (50, 5000, 0)


def test_it_is_not_verified_before_every_phase_is_done() -> None:
    progress = Progress()
    progress.told(b'{"began": "fill"}', 0.0)
    progress.told(b'{"verified": true}', 1.0)
    assert not progress.verified


def test_the_total_is_that_of_the_phases_that_are_done() -> None:
    progress = Progress()
    for name in ("fill", "checksum"):
        progress.told(b'{"began": "%b"}' % name.encode(), 0.0)
        progress.told(b'{"ended": "%b", "seconds": 1.5, "counters": {"faults": 7}}' % name.encode(), 1.5)
    progress.told(b'{"began": "random updates"}', 3.0)
    total = progress.total()
    assert (total.seconds, total.counters) == (3.0, {"faults": 14})


# ---- the command


class Demo:
    """The command, running.

    Attributes:
        process: of the command.
        name: of its service.
        output: the lines read so far.
    """

    def __init__(self, directory: Path, *words: str, **options: Any) -> None:
        self.directory = directory
        environment = os.environ | {"TMPDIR": str(directory), "COLUMNS": "100"}
        self.process = subprocess.Popen(
            [*COMMAND, *words],
            env=environment,
            **({"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | options),
        )
        self.name = f"demo-{self.process.pid}"
        self.output = ""

    def read_until(self, beginning: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if line.startswith(beginning):
                return
        raise AssertionError(f"no line began with {beginning!r} in:\n{self.output}")

    def finish(self) -> int:
        assert self.process.stdout is not None
        self.output += self.process.stdout.read()
        return self.process.wait(30)

    def processes(self) -> list[int]:
        """The command's and everything below it."""
        found, look_at = [], [self.process.pid]
        while look_at:
            pid = look_at.pop()
            found.append(pid)
            with contextlib.suppress(FileNotFoundError):
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                look_at += map(int, children)
        return found

    def check_nothing_left(self, processes: list[int]) -> None:
        left = [pid for pid in processes if Path(f"/proc/{pid}").exists()]
        assert not left, f"processes {left} are still there"
        assert list(self.directory.iterdir()) == []
        assert not service_directory(self.name).exists()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    started: list[Demo] = []

    def begin(*words: str, **options: Any) -> Demo:
        started.append(Demo(tmp_path, *words, **options))
        return started[-1]

    yield begin
    for run in started:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()
        if run.process.stdout is not None:
            run.process.stdout.close()


def test_a_small_run_is_verified_and_leaves_nothing(start: Callable[..., Demo], tmp_path: Path) -> None:
    run = start("--size", "32MiB", "--set", "memory.limit=4MiB", "--seed", "5")
    run.read_until("fill ")
    assert len(list(tmp_path.iterdir())) == 1  # the page file, where the output says
    processes = run.processes()
    assert len(processes) >= 6  # the command, the program, the launcher and its workers
    assert run.finish() == 0, run.output
    assert f"{tmp_path}/dmh-{run.name}" in run.output
    assert "A NumPy array of 33.6 MB in 4.2 MB of memory." in run.output
    assert "yes, all 33,554,432 bytes" in run.output
    table = run.output[run.output.index(" phase ") :]
    for phase in (*PHASES, "total"):
        assert f"\n {phase}" in table
    assert "highest resident" in table
    last = run.output.rstrip().splitlines()[-1]
    assert last.startswith("NumPy filled, summed, updated and sorted 33.6 MB in 4.2 MB of memory")
    assert "\x1b" not in run.output
    run.check_nothing_left(processes)


def test_the_configuration_decides(start: Callable[..., Demo], tmp_path: Path) -> None:
    file = tmp_path.parent / f"{tmp_path.name}.yaml"
    name = f"demo-config-{os.getpid()}"
    file.write_text(
        f'region: {{name: {name}, size: 8MiB, page_size: 64KiB}}\nmemory: {{limit: 2MiB}}\nstore: {{url: "memory:"}}\n'
    )
    run = start("-c", str(file))
    assert run.finish() == 0, run.output
    assert "A NumPy array of 8.4 MB in 2.1 MB of memory.  The rest of it goes to\nmemory:" in run.output
    run = start("-c", str(file), "--set", "memory.limit=4MiB")
    assert run.finish() != 0
    assert "region.size" in run.output
    assert "Traceback" not in run.output


def test_a_byte_changed_by_somebody_else_is_found(start: Callable[..., Demo]) -> None:
    run = start("--size", "128MiB")
    run.read_until("fill ")
    processes = run.processes()
    with dmh.attach(run.name) as region:
        region.buf[8000] ^= 1
    assert run.finish() == 1, run.output
    expected = int(Expected(1, (128 << 20) // 8, 0).filled(1000, 1001)[0])
    assert "element 1,000 (byte 8,000, page 1 of the array)" in run.output
    assert f"expected {expected:#018x}, got {expected ^ 1:#018x}" in run.output
    assert "verified  NO: " in run.output
    assert "every byte was right" not in run.output
    run.check_nothing_left(processes)


@pytest.mark.parametrize("phase", ["fill", "verify updates"])  # during the checksum, and during the sort
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_everything(start: Callable[..., Demo], phase: str, number: signal.Signals, status: int) -> None:
    run = start("--size", "256MiB", start_new_session=True)
    run.read_until(phase)
    processes = run.processes()
    began = time.monotonic()
    os.killpg(run.process.pid, number)  # as a terminal does: the program gets it as well
    assert run.finish() == status, run.output
    assert time.monotonic() - began < 10
    assert "Traceback" not in run.output
    run.check_nothing_left(processes)


def test_nothing_outlives_a_killed_command(start: Callable[..., Demo]) -> None:
    run = start("--size", "256MiB")
    run.read_until("checksum")
    processes = run.processes()
    run.process.kill()
    run.process.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes), "all its processes have ended")
    run.check_nothing_left(processes)


def test_a_program_that_dies_is_told(start: Callable[..., Demo]) -> None:
    run = start("--size", "256MiB")
    run.read_until("checksum")
    processes = run.processes()
    (program,) = (pid for pid in processes if b"dmh.demo.program" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(program, signal.SIGKILL)
    assert run.finish() == 1
    assert "the NumPy program ended by SIGKILL" in run.output
    assert "did not come to its end" in run.output
    run.check_nothing_left(processes)


def test_a_terminal_shows_it_live(start: Callable[..., Demo]) -> None:
    ours, theirs = pty.openpty()
    run = start("--size", "64MiB", stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    deadline = time.monotonic() + 40
    with contextlib.suppress(OSError):  # EIO: the last one to have the terminal open has closed it
        while time.monotonic() < deadline and select.select([ours], [], [], 1.0) and (more := os.read(ours, 65536)):
            shown += more
    os.close(ours)
    assert run.process.wait(10) == 0
    text = shown.decode()
    for word in ("resident/limit", "faults/s", "fetched", "written", "MB/s", *PHASES):
        assert word in text
    assert text.count("faults/s") > 3  # redrawn
    assert "yes, all 67,108,864 bytes" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back


@pytest.mark.parametrize(
    "words",
    ["--size 3m", "--size -4", "--seed x", "--seed -1", "--size 16KiB", "--set memory.limit=3", "-c /nowhere.yaml"],
)
def test_bad_words_are_refused_with_status_2(start: Callable[..., Demo], words: str) -> None:
    run = start(*words.split())
    assert run.finish() == 2
    assert "Traceback" not in run.output

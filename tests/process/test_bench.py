"""`dmh bench`: every benchmark runs, the floor pager and the mapped file keep their content, and what is wrong is seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from regions import run_python, wait_until
from store_servers import require_program

from dmh.bench import apps, random_access, stream, work
from dmh.bench.cgroup import NoGroupError, memory_group
from dmh.bench.floor import FloorPager
from dmh.bench.mapped import MappedFile, Swapped
from dmh.bench.rows import Row, not_measured
from dmh.bench.subject import MismatchError, Options
from dmh.bench.words import MASK, Script, total, uniform, value, zipf

DMH = [sys.executable, "-m", "dmh.cli.main"]
KEYS = {
    "benchmark",
    "case",
    "subject",
    "metric",
    "unit",
    "median",
    "p99",
    "runs",
    "ratio",
    "baseline",
    "spread",
    "note",
}
CASES = {
    "latency": {"zero", "soft", "stored"},
    "stream": {"read", "update", "triad", "numpy sum", "numpy update"},
    "random": {"read"},
    "zipf": {"read", "write"},
    "apps": {"sort", "gemm", "pagerank", "groupby", "resident sum", "resident sort", "resident gather"},
    "idle": {"idle", "memory"},
    "remote": {"random fault", "sequential read"},
    "threads": {"1 thread", "2 threads", "4 threads", "8 threads", "16 threads"},
}
PAGE = 4096


@pytest.mark.parametrize("name", CASES)
def test_a_benchmark_runs_and_prints_rows(name: str) -> None:
    if name == "remote":
        require_program("redis-server")
    done = subprocess.run([*DMH, "bench", name, "--quick", "--json"], capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert all(row.keys() == KEYS for row in rows)
    assert {row["case"] for row in rows} == CASES[name]
    measured = [row for row in rows if row["runs"]]
    assert all((row["note"] is None) == (row["median"] is not None) == (row["runs"] > 0) for row in rows)
    assert ({"dmh"} if name in ("apps", "idle") else {"dmh", "dmh-pool"}) <= {row["subject"] for row in measured}
    assert all(row["median"] > 0 or row["metric"] in ("processor", "waits") for row in measured)
    assert all((row["ratio"] is None) == (row["baseline"] is None) for row in measured)
    for case in CASES[name] if name != "idle" else ():
        assert any(row["ratio"] for row in measured if row["case"] == case), f"{case} is held against nothing"


def test_a_word_that_was_not_written_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_but_one(memory: work.Memory) -> None:
        work.fill(memory.words)
        memory.words[12_345] ^= np.uint64(1 << 40)

    monkeypatch.setattr("dmh.bench.subject.fill_all", fill_but_one)
    monkeypatch.setattr(stream, "SUBJECTS", ("dmh",))
    with pytest.raises(MismatchError, match="dmh"):
        stream.run(Options(runs=1, quick=True), lambda text: None)


def test_a_write_that_is_lost_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    access = work.access
    monkeypatch.setattr(work, "access", lambda memory, numbers, write: access(memory, numbers, False))
    monkeypatch.setattr(random_access, "SUBJECTS", ("floor-pager",))
    with pytest.raises(MismatchError, match="floor-pager"):
        random_access.run_zipf(Options(runs=1, quick=True), lambda text: None)


def test_a_program_that_computes_something_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_wrong(memory: work.Memory) -> None:
        apps.run_sort(memory)
        if not memory.words.flags.owndata:  # the region's array, not the ordinary one
            memory.words[[7, 8]] = memory.words[[8, 7]]

    monkeypatch.setattr(apps, "PROGRAMS", {})
    monkeypatch.setattr(apps, "RESIDENT_PROGRAMS", {"resident sort": apps.Program(apps.prepare_mixed, run_wrong)})
    with pytest.raises(MismatchError):
        apps.run(Options(runs=1, quick=True), lambda text: None)


def test_a_report_has_a_page_a_table_and_a_plot_each(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        Row("zipf", "read", "floor-pager", "time an access", "µs", 2.5, 2.75, 3, None, None, 0.1).to_wire(),
        Row("zipf", "read", "dmh", "time an access", "µs", 2.0, 2.25, 3, 0.8, "floor-pager", 0.1).to_wire(),
        not_measured("zipf", "read", "swap", "time an access", "µs", "this machine has no swap").to_wire(),
    ]
    for name in ("default", "pinned"):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    command = [*DMH, "bench", "report", "out", "--from", "default.json", "pinned.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "out/benchmarks.md\n"), done.stderr
    page = (tmp_path / "out" / "benchmarks.md").read_text()
    assert page.count("| read | dmh | time an access, µs | 2 | 2.25 | 10% | 3 | 0.80 x floor-pager |") == 2
    assert "- Not measured: swap: this machine has no swap (zipf read)" in page
    assert "![zipf](zipf.png)" in page
    assert (tmp_path / "out" / "zipf.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('[{"a": 1}]')
    command = [*DMH, "bench", "report", "--from", "other.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=tmp_path)
    assert done.returncode == 1
    assert "other.json is not what `dmh bench --json` prints" in done.stderr


class TestFloorPager:
    @pytest.fixture
    def pager(self) -> Iterator[FloorPager]:
        with FloorPager(512 * PAGE, PAGE, 64 * PAGE) as pager:
            yield pager

    def test_it_keeps_every_write_beyond_its_limit(self, pager: FloorPager, rng: np.random.Generator) -> None:
        script = Script(512 * 512)
        for write in (True, False, True):
            for numbers in (zipf(rng, 512, 512, 4000, 0.99), uniform(rng, 512 * 512, 2000)):
                run = script.run(numbers, write=write)
                assert pager.call(work.access, run.numbers, run.write)[1] == run.expected
        assert pager.call(work.read)[1] == script.total()
        assert pager.call(work.update)[1] == script.total()
        pager.empty()
        assert pager.call(work.read)[1] == script.total() + 512 * 512 & MASK

    def test_it_holds_its_limit(self, pager: FloorPager) -> None:
        pager.call(work.read)
        assert 0 < os.fstat(pager._fd).st_blocks * 512 <= 64 * PAGE
        pager.empty()
        assert os.fstat(pager._fd).st_blocks == 0

    def test_threads_that_write_while_it_evicts_lose_nothing(self, pager: FloorPager) -> None:
        # Each thread adds one to every word of its own column, so that all of them write to every page.
        words = pager.memory.words.reshape(512, 512)

        def add(column: int) -> None:
            for row in range(512):
                words[row, column::4] += np.uint64(1)

        threads = [threading.Thread(target=add, args=(column,)) for column in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert pager.call(work.read)[1] == total(0, 512 * 512) + 512 * 512 & MASK

    def test_reads_by_many_threads(self, pager: FloorPager, rng: np.random.Generator) -> None:
        numbers = uniform(rng, 512 * 512, 5000)
        for threads in (1, 7, 16):
            seconds, found = pager.call(work.access_by_threads, numbers, threads)
            assert found == int(value(numbers).sum())
            assert seconds > 0


class TestGroup:
    def test_a_mapped_file_keeps_within_its_group_and_the_group_goes(self) -> None:
        size, limit = 128 << 20, 16 << 20
        try:
            with memory_group(limit) as procs:
                group = procs.parent
                assert group.is_dir()
        except NoGroupError as error:
            pytest.skip(str(error))
        assert not group.exists()
        with MappedFile(size, limit) as mapped:
            assert mapped.call(work.read)[1] == total(0, size // 8)
            (group,) = group.parent.glob(f"dmh-bench-{os.getpid()}-*")
            usage = [path for name in ("memory.max_usage_in_bytes", "memory.peak") if (path := group / name).exists()]
            assert all(int(path.read_text()) <= limit + (17 << 20) for path in usage)
        assert not group.exists()

    def test_memory_that_may_swap_is_held_to_a_group_too(self) -> None:
        size = 8 << 20
        try:
            swapped = Swapped(size, 2 * size)
        except NoGroupError as error:
            pytest.skip(str(error))
        with swapped:
            swapped.call(work.fill_all)
            assert swapped.call(work.read)[1] == total(0, size // 8)

    def test_an_error_in_the_process_is_raised_here(self) -> None:
        with MappedFile(16 * PAGE, None) as mapped, pytest.raises(TypeError):
            mapped.call(work.access, "no numbers")


def test_a_killed_measurement_leaves_no_process() -> None:
    """Whoever measures is killed: the floor's process sees the end of its control socket."""
    done = run_python(
        """
        import os, signal
        from dmh.bench.floor import FloorPager
        pager = FloorPager(64 * 4096, 4096, 16 * 4096)
        print(pager._process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    pid = int(done.stdout)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the floor pager has ended")

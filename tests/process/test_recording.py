"""`--record` of a live region: every page that came in, by whom, and how."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from regions import page_of, run_python, settings

import dmh
from dmh.errors import TraceError
from dmh.observe.trace import CAME_IN, Kind, read_trace
from dmh.simulate.traces import load_trace

OpenRegion = Callable[..., dmh.Region]


def test_every_fault_is_in_the_recording_with_its_class_and_thread(open_region: OpenRegion, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    region = open_region(f"record.file={path}", "prefetch.enabled=false", "memory.limit=256KiB")
    array = region.empty((40, 4096), "u1")
    first = page_of(region, array)
    order = np.random.default_rng(3).permutation(40).tolist()
    threads = []

    def touch() -> None:
        threads.append(threading.get_native_id())
        for page in order:
            array[page, 5] += 1

    for work in (touch, lambda: region.evict(array), touch):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    region.discard(array[8:16])
    region.close()
    trace = read_trace(path)
    assert (trace.header["page_size"], trace.header["limit"], trace.header["policy"]) == (4096, 64, "auto")
    records = trace.records
    came_in = records[np.isin(records["kind"], CAME_IN)]
    assert (came_in["page"] - first).tolist() == order + order
    assert came_in["kind"].tolist() == [Kind.NEW] * 40 + [Kind.HARD] * 40
    assert came_in["thread"].tolist() == [threads[0]] * 40 + [threads[1]] * 40
    assert (np.diff(came_in["ns"].astype(np.int64)) > 0).all()
    discards = records[records["kind"] == Kind.DISCARD]
    assert [(int(d["page"]) - first, int(d["thread"])) for d in discards][:1] == [(8, 8)]


def test_read_ahead_is_told_from_faults(open_region: OpenRegion, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    region = open_region(f"record.file={path}", "memory.limit=1MiB")
    array = region.empty((200, 4096), "u1")
    first = page_of(region, array)
    array[:] = 1
    counters = region.stats().counters
    region.close()
    records = read_trace(path).records
    kinds = {kind: int((records["kind"] == kind).sum()) for kind in Kind}
    # Counted by the workers, which may not be done with the last window when the program is.
    assert kinds[Kind.PREFETCH] >= counters["prefetched"] > 0
    assert 100 > kinds[Kind.NEW] >= counters["faults"]
    assert set(read_trace(path).accesses() - first) >= set(range(200))


def test_dmh_run_records(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("region: {size: 4MiB}\nmemory: {limit: 256KiB}\nstore: {url: 'memory:'}\n")
    program = "import dmh; a = dmh.attach().empty((30, 4096), 'u1'); a[::7] = 1"
    result = run_python(
        "import sys; from dmh.cli.main import main; sys.exit(main(sys.argv[1:]))",
        "run", "-c", config, "--set", f"region.name={settings().region.name}", "--set", "prefetch.enabled=false", "--record", tmp_path / "t", "--",
        sys.executable, "-c", program,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    pages = read_trace(tmp_path / "t").accesses()
    assert (pages - pages[0]).tolist() == [0, 7, 14, 21, 28]
    assert load_trace(tmp_path / "t").tolist() == pages.tolist(), "dmh simulate reads something else"


def test_a_recording_that_cannot_be_made_stops_the_start(open_region: OpenRegion, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="record.file"):
        open_region(f"record.file={tmp_path}/none/t")

"""Recordings: what is written is read back, cut-off files give what is whole, damage is told, growth is bounded."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmh.errors import TraceError
from dmh.observe import trace
from dmh.observe.trace import Kind, TraceWriter, read_trace

HEADER = {
    "region": "r",
    "page_size": 4096,
    "pages": 1 << 34,
    "limit": 100,
    "slots": 4,
    "policy": "fifo",
    "idle": "none",
}


def write(path: Path, *batches: tuple, max_size: int = 1 << 30) -> None:
    writer = TraceWriter(path, HEADER, max_size)
    for pages, kind, ns, thread in batches:
        writer.append(np.asarray(pages), kind, ns, thread)
    writer.close()


_pages = st.lists(st.integers(0, (1 << 34) - 1), min_size=1, max_size=50)


@settings(deadline=None, max_examples=25)
@given(
    batches=st.lists(
        st.tuples(_pages, st.sampled_from([kind for kind in Kind if kind != Kind.LOST]), st.integers(0, 2**32 - 1)),
        max_size=5,
    )
)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, batches: list) -> None:
    path = tmp_path_factory.mktemp("trace") / "t"
    at = time.monotonic_ns() + 10**9
    told = []
    for pages, kind, thread in batches:
        told.append((pages, kind, np.arange(at, at + len(pages), dtype=np.uint64), thread))
        at += len(pages)
    write(path, *told)
    found = read_trace(path)
    assert {key: found.header[key] for key in HEADER} == HEADER
    assert found.records["page"].tolist() == [page for pages, _, _ in batches for page in pages]
    assert found.records["kind"].tolist() == [kind for pages, kind, _ in batches for _ in pages]
    assert found.records["thread"].tolist() == [thread for pages, _, thread in batches for _ in pages]
    assert found.records["ns"].tolist() == sorted(found.records["ns"].tolist())
    assert set(np.diff(found.records["ns"].astype(np.int64))) <= {1}
    assert found.lost == 0


def test_accesses_are_the_pages_that_came_in(tmp_path: Path) -> None:
    write(tmp_path / "t", ([5, 6], Kind.NEW, None, 1), ([6], Kind.IDLE, None, 0), ([7], Kind.PREFETCH, None, 1),
          ([5], Kind.DISCARD, None, 1), ([8], Kind.HARD, None, 1), ([9], Kind.SOFT, None, 1))  # fmt: skip
    assert read_trace(tmp_path / "t").accesses().tolist() == [5, 6, 7, 8, 9]


def test_a_file_that_was_cut_off_gives_its_whole_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "CHUNK_RECORDS", 10)
    path = tmp_path / "t"
    write(path, (np.arange(95), Kind.HARD, None, 0))
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    assert read_trace(path).records["page"].tolist() == list(range(90))


def test_a_recording_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "CHUNK_RECORDS", 10)
    path = tmp_path / "t"
    write(path, (np.arange(95), Kind.HARD, None, 0))
    path.write_bytes(path.read_bytes()[:-3])
    writer = TraceWriter(path, {}, 1 << 30, resume=True)
    writer.append(np.array([7, 8]), Kind.SOFT)
    writer.close()
    found = read_trace(path)
    assert found.accesses().tolist() == [*range(90), 7, 8]
    assert found.header["policy"] == "fifo"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda b: b[:-5] + bytes([b[-5] ^ 1]) + b[-4:], "damaged in the chunk"),
        (lambda b: b"PNG" + b[3:], "not a recording"),
        (lambda b: b"", "not a recording"),
        (lambda b: b[:8] + b"\x02" + b[9:], "format 2"),
        (lambda b: b[:16] + b"x" + b[17:], "header"),
    ],
    ids=["a flipped bit", "another file", "empty", "another version", "header"],
)
def test_damage_is_told(tmp_path: Path, damage, says: str) -> None:
    path = tmp_path / "t"
    write(path, (np.arange(100), Kind.HARD, None, 0))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TraceError, match=says):
        read_trace(path)


def test_the_file_stays_about_its_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "t"
    noise = np.random.default_rng(1).integers(0, 1 << 34, 65536)
    write(path, *[(noise, Kind.HARD, None, 0)] * 20, max_size=1 << 20)
    assert (1 << 20) <= path.stat().st_size < (1 << 21)
    assert "record.max_size" in caplog.text
    assert len(read_trace(path).records) % 65536 == 0


def test_what_the_disk_is_too_slow_for_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "QUEUED_RECORDS", 1000)
    monkeypatch.setattr(trace, "CHUNK_RECORDS", 1)
    stuck, packing, pack = threading.Event(), threading.Event(), trace._pack

    def slow(records: np.ndarray) -> bytes:
        packing.set()
        stuck.wait(10)
        return pack(records)

    monkeypatch.setattr(trace, "_pack", slow)
    writer = TraceWriter(tmp_path / "t", HEADER, 1 << 30)
    writer.append(np.array([1]), Kind.HARD)
    assert packing.wait(10)
    writer.append(np.arange(900), Kind.HARD)
    writer.append(np.arange(101), Kind.HARD)  # does not fit
    writer.append(np.array([7]), Kind.HARD)
    stuck.set()
    writer.close()
    found = read_trace(tmp_path / "t")
    assert found.lost == 101
    assert found.accesses().tolist() == [1, *range(900), 7]


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="record.file"):
        TraceWriter(tmp_path / "none" / "t", HEADER, 1)
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "none")

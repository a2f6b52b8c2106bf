"""Recordings of what came in: the format of the file, its writer and its reader.

Owns the format.  Does not own what is recorded (the evictor, from the arrival rings and its marks) nor what is made of
it (`dmh simulate`, by `read_trace`).

The file, every number little-endian:

    8 bytes    b"dmhtrace"
    u32, u32   version (1), bytes of the header
    header     JSON: "region", "page_size", "pages", "limit" and "slots" (pages), "policy", "idle", "started" (Unix
               seconds at time 0), "origin" (CLOCK_MONOTONIC then, ns), "columns" (name and type of each, as below)
    chunks     u32 b"CHNK", u32 records, u32 bytes, u32 CRC-32 of them; then that many bytes, a zlib stream

A chunk unpacks to its columns one after another: `ns` u64 (since time 0; each less the one before it, the first of a
chunk as it is), `page` i64 (likewise), `thread` u32, `kind` u8.  A file that was cut off ends with its last whole
chunk.

`ns` is when the fault was received.  Records are written as the workers tell of them, and a thread may fault again
before the worker that served it has told of the page: `read_trace` puts them in the order of their times.
"""

from __future__ import annotations

import enum
import errno
import json
import logging
import os
import queue
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmh.errors import TraceError

log = logging.getLogger("dmh")

MAGIC, VERSION, CHUNK = b"dmhtrace", 1, b"CHNK"
_HEAD, _CHUNK_HEAD = struct.Struct("<8sII"), struct.Struct("<4sIII")
RECORD = np.dtype([("ns", "<u8"), ("page", "<i8"), ("thread", "<u4"), ("kind", "u1")])
CHUNK_RECORDS = 65536
"""A chunk is written when it is this large, or FLUSH_SECONDS old."""
FLUSH_SECONDS = 2.0
QUEUED_RECORDS = 1 << 20
"""Records waiting for the disk; what comes beyond is dropped, and counted in a LOST record."""

Records = npt.NDArray[Any]


class Kind(enum.IntEnum):
    """What a record says of its page.  Where a policy is told the same, the number is that of its `Event`."""

    HARD = 0
    """Touched, and fetched from the store."""
    SOFT = 1
    """Touched, and taken back from the victim buffer."""
    PREFETCH = 2
    """Brought in ahead of use."""
    DISCARD = 3
    """Its content was given up; `thread` is the number of pages from this one on."""
    USED = 5
    """Used since it was marked, says the idle source."""
    IDLE = 6
    """Not used since it was marked."""
    NEW = 7
    """Touched for the first time (or all zeros since)."""
    LOST = 8
    """`page` records before this one were not kept."""


CAME_IN = (Kind.HARD, Kind.SOFT, Kind.PREFETCH, Kind.NEW)


@dataclass(frozen=True, slots=True)
class Trace:
    """A recording.

    Attributes:
        header: as in the file.
        records: of dtype RECORD, in the order of their times.
    """

    header: dict[str, Any]
    records: Records

    @property
    def lost(self) -> int:
        """Records that were not kept."""
        return int(self.records["page"][self.records["kind"] == Kind.LOST].sum())

    def accesses(self) -> npt.NDArray[np.int64]:
        """The pages in the order of their use, as far as faults show it.

        A page that was brought in ahead counts where it came in: it would have been asked for a moment later.  Uses of
        pages that were local are not in a recording; the less memory there was, the fewer are missing.
        """
        pages: npt.NDArray[np.int64] = self.records["page"][np.isin(self.records["kind"], CAME_IN)]
        return pages


def record_override(path: Path | None) -> list[str]:
    """``--record FILE`` as the setting that it stands for."""
    return [] if path is None else [f"record.file={json.dumps(str(path))}"]


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse, before anything is started, a place where no recording can be made.

    Raises:
        TraceError: it says why.
    """
    try:
        with open(path, "wb"):
            pass
    except OSError as error:
        raise TraceError(f"{os.fspath(path)} cannot be written: {error.strerror}; choose another record.file") from None


class TraceWriter:
    """Writes a recording from a thread of its own, so that whoever records only appends to a queue."""

    def __init__(
        self, path: str | os.PathLike[str], header: dict[str, Any], max_size: int, *, resume: bool = False
    ) -> None:
        """A new recording, or one to go on with.

        Args:
            path: the file.
            header: what is to be known of the region.
            max_size: bytes; a recording that has grown so large ends, with a warning.
            resume: go on where the process that recorded before this one was killed.
        """
        self._path = os.fspath(path)
        self._max_size = max_size
        if resume:
            self._origin, end = _resumable(self._path)
            self._file = open(self._path, "r+b", buffering=0)  # noqa: SIM115 - the thread closes it
            self._file.seek(end)
            self._file.truncate()
        else:
            self._origin = time.monotonic_ns()
            columns = [[name, RECORD[name].str] for name in RECORD.names or ()]
            text = json.dumps(header | {"origin": self._origin, "started": time.time(), "columns": columns}).encode()
            check_writable(path)
            self._file = open(self._path, "wb", buffering=0)  # noqa: SIM115 - the thread closes it
            self._file.write(_HEAD.pack(MAGIC, VERSION, len(text)) + text)
        self._queue: queue.SimpleQueue[Records | None] = queue.SimpleQueue()
        self._queued = 0
        self._lost = 0
        self._full = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def append(self, pages: npt.NDArray[Any], kind: Any, ns: Any = None, thread: Any = 0) -> None:
        """Record that these pages came in, or what was found of them; scalars stand for every page.

        Args:
            pages: page numbers.
            kind: `Kind`, one or an array.
            ns: CLOCK_MONOTONIC; now, where left out.
            thread: who touched them.
        """
        if self._full or not len(pages):
            return
        records = np.empty(len(pages), RECORD)
        records["page"], records["kind"], records["thread"] = pages, kind, thread
        records["ns"] = (time.monotonic_ns() if ns is None else ns) - np.uint64(self._origin)
        with self._lock:
            if self._queued + len(records) > QUEUED_RECORDS:
                self._lost += len(records)
                return
            if self._lost:
                lost = np.array([(records["ns"][0], self._lost, 0, Kind.LOST)], RECORD)
                records, self._lost = np.concatenate([lost, records]), 0
            self._queued += len(records)
        self._queue.put(records)

    def close(self) -> None:
        """Write what is still queued, and close the file."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        with self._file:
            pending: list[Records] = []
            size, due = 0, 0.0
            while True:
                try:
                    records = self._queue.get(timeout=max(due - time.monotonic(), 0.01) if pending else None)
                except queue.Empty:
                    records = np.empty(0, RECORD)
                if records is not None and len(records):
                    due = due if pending else time.monotonic() + FLUSH_SECONDS
                    pending.append(records)
                    size += len(records)
                if pending and (records is None or size >= CHUNK_RECORDS or time.monotonic() >= due):
                    self._write(np.concatenate(pending))
                    pending, size = [], 0
                if records is None:
                    return

    def _write(self, records: Records) -> None:
        with self._lock:
            self._queued -= len(records)
        for first in range(0, len(records), CHUNK_RECORDS):
            if self._full:
                return
            try:
                chunk = _pack(records[first : first + CHUNK_RECORDS])
                if self._file.write(chunk) < len(chunk):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                log.error("the recording %s ends here: %s", self._path, error.strerror)
                self._full = True
            if self._file.tell() >= self._max_size:
                log.warning("the recording %s has reached record.max_size and ends here", self._path)
                self._full = True


def _pack(records: Records) -> bytes:
    columns = [
        np.diff(records["ns"], prepend=np.uint64(0)).astype("<u8"),
        np.diff(records["page"], prepend=np.int64(0)).astype("<i8"),
        records["thread"].astype("<u4"),
        records["kind"].astype("u1"),
    ]
    packed = zlib.compress(b"".join(column.tobytes() for column in columns), 1)
    return _CHUNK_HEAD.pack(CHUNK, len(records), len(packed), zlib.crc32(packed)) + packed


def is_recording(path: str | os.PathLike[str]) -> bool:
    """Does this file begin as a recording does?"""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a recording.

    Raises:
        TraceError: it is no recording, one of another version, or damaged.
    """
    name = os.fspath(path)
    content = _content(name)
    header, at = _header(name, content)
    chunks = [_unpack(zlib.decompress(packed), count) for count, packed, _ in _chunks(name, content, at)]
    records = np.concatenate(chunks) if chunks else np.empty(0, RECORD)
    return Trace(header, records[np.argsort(records["ns"], kind="stable")])


def _content(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise TraceError(f"{name} cannot be read: {error.strerror}") from error


def _header(name: str, content: bytes) -> tuple[dict[str, Any], int]:
    """The header, and where the chunks begin."""
    if len(content) < _HEAD.size or content[:8] != MAGIC:
        raise TraceError(f"{name} is not a recording of dmh's (`dmh run --record FILE` makes one)")
    _, version, length = _HEAD.unpack_from(content)
    if version != VERSION:
        raise TraceError(f"{name} is a recording of format {version}, and this dmh reads format {VERSION}")
    at = _HEAD.size + length
    try:
        header: dict[str, Any] = json.loads(content[_HEAD.size : at])
    except ValueError:
        raise TraceError(f"{name} is damaged: its header cannot be read") from None
    return header, at


def _chunks(name: str, content: bytes, at: int) -> Iterator[tuple[int, bytes, int]]:
    """(records, zlib stream, where it ends) of every whole chunk."""
    while at + _CHUNK_HEAD.size <= len(content):
        magic, count, size, crc = _CHUNK_HEAD.unpack_from(content, at)
        begin, at = at + _CHUNK_HEAD.size, at + _CHUNK_HEAD.size + size
        if at > len(content):
            return  # cut off while it was written
        packed = content[begin:at]
        if magic != CHUNK or zlib.crc32(packed) != crc:
            raise TraceError(f"{name} is damaged in the chunk at byte {begin - _CHUNK_HEAD.size}")
        yield count, packed, at


def _resumable(name: str) -> tuple[int, int]:
    """(time 0, where the whole chunks end) of a recording that was cut off."""
    content = _content(name)
    header, at = _header(name, content)
    for _, _, end in _chunks(name, content, at):
        at = end
    return int(header["origin"]), at


def _unpack(columns: bytes, count: int) -> Records:
    records = np.empty(count, RECORD)
    records["ns"] = np.cumsum(np.frombuffer(columns, "<u8", count), dtype=np.uint64)
    records["page"] = np.cumsum(np.frombuffer(columns, "<i8", count, 8 * count))
    records["thread"] = np.frombuffer(columns, "<u4", count, 16 * count)
    records["kind"] = np.frombuffer(columns, "u1", count, 20 * count)
    return records

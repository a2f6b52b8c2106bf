"""The kernel's own paging as a subject: a mapped file, or swap, in a process that is held to the limit by a cgroup.

    MappedFile   a file, mapped as numpy.memmap maps it; what does not fit is read again from the disk
    Swapped      anonymous memory; what does not fit goes to the machine's swap

The process joins its group when it has loaded what it needs, so that the limit is for what it maps, plus `ALLOWANCE`
for what it allocates itself.  Owns that process and its protocol: (function, arguments) one way, (result, error) the
other.
"""

from __future__ import annotations

import importlib
import io
import mmap
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from dmh.bench.cgroup import memory_group
from dmh.bench.words import CHUNK, value
from dmh.bench.work import Memory
from dmh.errors import DmhError

T = TypeVar("T")

ALLOWANCE = 16 << 20


class _Child:
    """A process with memory of its own kind; `call` runs a function of `dmh.bench.work` in it."""

    def __init__(self, size: int, limit: int | None, path: str | None, advice: int) -> None:
        self._stack = ExitStack()
        with ExitStack() as undo:
            procs = undo.enter_context(memory_group(limit + ALLOWANCE)) if limit else None
            ours, theirs = socket.socketpair()
            words = [theirs.fileno(), size, advice, path or "", procs or ""]
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from dmh.bench import mapped; mapped.main()", *map(str, words)],
                pass_fds=[theirs.fileno()],
            )
            theirs.close()
            self._connection = Connection(ours.detach())
            self._stack = undo.pop_all()

    def call(self, work: Callable[..., T], *args: Any) -> T:
        """``work(memory, *args)`` in the process."""
        try:
            self._connection.send((work, args))
            result, error = self._connection.recv()
        except (EOFError, OSError):
            raise DmhError("the process that has the mapping was ended, by the limit of its cgroup perhaps") from None
        if error is not None:
            raise error
        answer: T = result
        return answer

    def close(self) -> None:
        """End the process; then its group can go."""
        self._connection.close()
        self._process.wait()
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class MappedFile(_Child):
    """A file of `size` bytes under /var/tmp that holds what `words.fill` writes.

    Args:
        limit: bytes of memory for its pages; None: as many as the machine has.
        advice: as for madvise, such as mmap.MADV_RANDOM.
    """

    def __init__(self, size: int, limit: int | None, advice: int = mmap.MADV_NORMAL) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="dmh-bench-", dir="/var/tmp")
        path = Path(self._directory.name) / "mapped"
        with path.open("wb", buffering=0) as file:
            _write(file, size)
        try:
            super().__init__(size, limit, str(path), advice)
        except BaseException:
            self._directory.cleanup()
            raise

        if limit:
            self.cold()  # pages that this process has cached are charged to it, not to the group

    def remap(self) -> None:
        """Map the file anew: nothing is mapped, what is cached stays cached."""
        self.call(_remap)

    def cold(self) -> None:
        """Write back and drop every cached page of the file, and map it anew."""
        self.call(_drop)

    def close(self) -> None:
        super().close()
        self._directory.cleanup()


class Swapped(_Child):
    """Anonymous memory that may hold `limit` bytes; the rest is swap's."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(size, limit, None, mmap.MADV_NORMAL)


def why_no_swap(wanted: int, meminfo: str) -> str | None:
    """What keeps this machine from swapping `wanted` bytes, given /proc/meminfo.  Pure."""
    fields = dict(line.split(":", 1) for line in meminfo.splitlines())
    total, free = (int(fields[name].split()[0]) << 10 for name in ("SwapTotal", "SwapFree"))
    if not total:
        return "this machine has no swap"
    return None if free >= wanted else f"{free >> 20} MiB of swap are free, {wanted >> 20} MiB would be needed"


def _remap(memory: Memory) -> None:
    """Only a name in the protocol, as is `_drop`: `_serve` does it, because the mapping has to go first."""


def _drop(memory: Memory) -> None:
    """See `_remap`."""


def main() -> None:
    """The process that has the mapping: number of the socket, size, advice, file, file of the group to join."""
    number, size, advice, path, procs = (int(word) if word.isdigit() else word for word in sys.argv[1:])
    if procs:
        # What the process loads for itself is not what the limit is for.
        importlib.import_module("dmh.bench.apps").load()
        Path(str(procs)).write_text(str(os.getpid()))
    _serve(Connection(int(number)), str(path), int(size), int(advice))


def _serve(connection: Connection, path: str, size: int, advice: int) -> None:
    memory = _map(path, size, advice)
    while True:
        try:
            work, args = connection.recv()
        except EOFError:
            return
        answer: tuple[Any, Exception | None]
        try:
            if work in (_remap, _drop):
                del memory
                if work is _drop:
                    _drop_cache(path)
                memory = _map(path, size, advice)
                answer = None, None
            else:
                answer = work(memory, *args), None
        except Exception as error:
            answer = None, error
        connection.send(answer)


def _write(file: io.RawIOBase, size: int) -> None:
    """Page by page: so the page cache has single pages, not large runs that one fault maps at once."""
    content = np.empty(CHUNK, np.uint64)
    for first in range(0, size // 8, CHUNK):
        np.copyto(content, value(np.arange(first, first + CHUNK, dtype=np.uint64)))
        part = content.view(np.uint8)[: size - 8 * first].data
        for at in range(0, len(part), mmap.PAGESIZE):
            file.write(part[at : at + mmap.PAGESIZE])


def _drop_cache(path: str) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _map(path: str, size: int, advice: int) -> Memory:
    if not path:
        return Memory(np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint64))
    if advice == mmap.MADV_NORMAL:
        return Memory(np.memmap(path, np.uint64, "r+"))
    with open(path, "r+b") as file:
        mapping = mmap.mmap(file.fileno(), size)
    mapping.madvise(advice)
    return Memory(np.frombuffer(mapping, np.uint64))

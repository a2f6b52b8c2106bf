"""What a service costs that has nothing to do, and what it costs in memory.

    idle     processor time of all its processes while nothing faults, in % of one processor, over a second a run
    memory   of each process what it does not share with the region (its anonymous memory and its share of libraries),
             in MB; and the shared tables, in % of the region

The region has been filled beyond its limit before, so that every part of the service has worked.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from dmh.bench.rows import Progress, Row, Samples, summarize
from dmh.bench.subject import Options, service
from dmh.bench.words import fill

SIZE, QUICK_SIZE = 512 << 20, 16 << 20
SETTLE, QUICK_SETTLE = 1.0, 0.1
WINDOW, QUICK_WINDOW = 1.0, 0.2


def run(options: Options, progress: Progress) -> list[Row]:
    """Rows of processor and memory."""
    size = QUICK_SIZE if options.quick else SIZE
    before = set(_children(os.getpid()))
    progress("idle: filling")
    with service(options, size=size, limit=options.limit_or(size // 4)) as region:
        array = region.empty(size // 8 * 15 // 16, "u8")
        fill(array)
        (launcher,) = set(_children(os.getpid())) - before
        processes = {launcher: "launcher"} | {pid: _role(pid) for pid in _children(launcher)}
        time.sleep(QUICK_SETTLE if options.quick else SETTLE)  # what is still being written is no idle cost
        processor = []
        for number in range(options.runs):
            progress(f"idle: run {number + 1} of {options.runs}")
            processor.append(_busy(list(processes), QUICK_WINDOW if options.quick else WINDOW))
        memory: dict[str, list[Samples]] = {}
        for pid, role in processes.items():
            memory.setdefault(role, []).append(np.array([_private(pid) / 1e6]))
        tables = [np.array([100 * _allocated(launcher, "dmh-lspt") / size])]
        return [
            *summarize("idle", "idle", "processor", "%", {"dmh": processor}, ""),
            *summarize("idle", "memory", "own memory", "MB", memory, ""),
            *summarize("idle", "memory", "of the region", "%", {"tables": tables}, ""),
        ]


def _busy(processes: list[int], window: float) -> Samples:
    """% of one processor that the processes use together."""
    began, before = time.perf_counter(), sum(map(_processor_ns, processes))
    time.sleep(window)
    used = sum(map(_processor_ns, processes)) - before
    return np.array([used / 1e7 / (time.perf_counter() - began)])


def _processor_ns(pid: int) -> int:
    """Time on a processor, of all threads: the first field of schedstat, finer than the ticks of /proc/PID/stat."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))


def _private(pid: int) -> int:
    """Bytes that are the process's own: anonymous, and its share of mapped files; not the region's, which are shmem."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(fields[name].split()[0]) << 10 for name in ("Pss_Anon", "Pss_File"))


def _allocated(pid: int, memfd: str) -> int:
    """Bytes of memory that a memfd of the process has."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if os.readlink(link).startswith(f"/memfd:{memfd} "):
            return link.stat().st_blocks * 512
    raise FileNotFoundError(f"process {pid} has no memfd {memfd}")


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in tasks for child in path.read_text().split()]


def _role(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return next((word[8:].decode() for word in words if word.startswith(b"workers.")), "other")

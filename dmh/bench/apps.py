"""Whole NumPy programs over four times the memory limit, everything out of memory when they begin.

    sort        array.sort() of all words, which are mixed up
    gemm        C = A @ B, square matrices of 8-byte floats, one third of the memory each, stored and multiplied in
                blocks of 256 x 256
    pagerank    three rounds of rank'[v] = 1000 + 85 % of the mean of rank over 60 neighbours of v, in integers; the
                neighbours (4 bytes each, popular vertices in most lists) are scanned, the ranks (1/16 of the memory
                in all) are gathered at random
    groupby     count and sum of values by key, one record a word; the table (1/32 of the memory) is updated at random

Subjects: `dmh`, `memmap` (numpy.memmap in a memory cgroup of the same limit and 16 MiB more for what the program
allocates itself, its file on the disk), `numpy` (ordinary memory and no limit: what the program costs by itself).  The
baseline is memmap, or numpy where no cgroup can be made.  Programs run half as often as other benchmarks' subjects do.

And where everything fits (`resident ...`: sum, sort, gather of random words), the second time over: dmh beside `numpy`,
whose memory the kernel may give it in huge pages, and `numpy-4k`, which has pages of 4 KiB as dmh's region does.

A run's result is verified by a sum over all words, weighted by position, against the same program's on ordinary memory.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import isqrt

import numpy as np
import numpy.typing as npt

from dmh.bench.cgroup import NoGroupError
from dmh.bench.mapped import MappedFile
from dmh.bench.rows import Progress, Row, Samples, interleave, summarize
from dmh.bench.subject import Here, Options, Subject, service, verify
from dmh.bench.words import CHUNK, MASK, Words
from dmh.bench.work import Memory

LIMIT = 16 << 20
RESIDENT, QUICK_RESIDENT = 64 << 20, 4 << 20
METRIC, UNIT = "run time", "s"

BLOCK = 256
NEIGHBOURS = 60
VERTICES_AT_ONCE = 2048
ROUNDS = 3


def mixed(first: int, end: int) -> Words:
    """Words without any order, from their numbers (the finalizer of SplitMix64)."""
    x = np.arange(first, end, dtype=np.uint64)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def load() -> None:
    """Have NumPy load and allocate what it does at a first use, BLAS's buffers above all."""
    block = np.ones((BLOCK, BLOCK))
    block @ block
    np.add.at(np.zeros(1, np.uint64), np.zeros(1, np.intp), np.uint64(1))
    np.sort(mixed(0, 1000)).sum()


def digest(memory: Memory) -> int:
    """The sum of word i times (2i + 1), modulo 2^64: depends on what is where."""
    result = 0
    for first in range(0, len(memory.words), CHUNK):
        part = memory.words[first : first + CHUNK]
        weights = np.arange(2 * first + 1, 2 * (first + len(part)) + 1, 2, dtype=np.uint64)
        result = result + int((part * weights).sum()) & MASK
    return result


# ---- the programs: prepare writes the input, run is timed


def prepare_mixed(memory: Memory) -> None:
    """Every word mixed up."""
    for first in range(0, len(memory.words), CHUNK):
        end = min(first + CHUNK, len(memory.words))
        memory.words[first:end] = mixed(first, end)


def run_sort(memory: Memory) -> None:
    """Ascending, in place."""
    memory.words.sort()


def matrices(words: Words) -> list[npt.NDArray[np.float64]]:
    """A, B and C: [block row, block column, row, column]."""
    n = isqrt(len(words) // 3 // BLOCK**2)
    size = n * n * BLOCK**2
    return [words[i * size : (i + 1) * size].view(np.float64).reshape(n, n, BLOCK, BLOCK) for i in range(3)]


def prepare_gemm(memory: Memory) -> None:
    """Small integers, so that every product and sum is exact whatever the order."""
    a, b, c = matrices(memory.words)
    memory.words[3 * a.size :] = 0
    rows, columns = np.ogrid[:BLOCK, :BLOCK]
    for i in range(len(a)):
        for j in range(len(a)):
            row, column = i * BLOCK + rows, j * BLOCK + columns
            a[i, j] = (7 * row + 3 * column) % 11 - 5
            b[i, j] = (5 * row + 2 * column) % 13 - 6
            c[i, j] = 0


def run_gemm(memory: Memory) -> None:
    """One block of C after the other."""
    a, b, c = matrices(memory.words)
    for i in range(len(a)):
        for j in range(len(a)):
            block = np.zeros((BLOCK, BLOCK))
            for k in range(len(a)):
                block += a[i, k] @ b[k, j]
            c[i, j] = block


def graph(words: Words) -> tuple[Words, Words, npt.NDArray[np.uint32]]:
    """Two arrays of ranks, and the neighbours of every vertex."""
    vertices = len(words) // (2 + NEIGHBOURS // 2)
    neighbours = words[2 * vertices : (2 + NEIGHBOURS // 2) * vertices].view(np.uint32)
    return words[:vertices], words[vertices : 2 * vertices], neighbours.reshape(vertices, NEIGHBOURS)


def prepare_pagerank(memory: Memory) -> None:
    """Vertex number V * u^2 for u uniform in [0, 1): low numbers are in many lists."""
    old, new, neighbours = graph(memory.words)
    memory.words[(2 + NEIGHBOURS // 2) * len(old) :] = 0
    old[:], new[:] = 1_000_000, 0
    for first in range(0, len(old), VERTICES_AT_ONCE):
        part = neighbours[first : first + VERTICES_AT_ONCE]
        u = (mixed(first * NEIGHBOURS, first * NEIGHBOURS + part.size) >> np.uint64(11)) * 2.0**-53
        part[:] = (u * u * len(old)).astype(np.uint32).reshape(part.shape)


def run_pagerank(memory: Memory) -> None:
    """The ranks change places after every round."""
    old, new, neighbours = graph(memory.words)
    for _ in range(ROUNDS):
        for first in range(0, len(old), VERTICES_AT_ONCE):
            gathered = old[neighbours[first : first + VERTICES_AT_ONCE]].sum(axis=1)
            new[first : first + VERTICES_AT_ONCE] = gathered * 85 // (100 * NEIGHBOURS) + 1000
        old, new = new, old


def table_of(words: Words) -> tuple[Words, Words, Words]:
    """Counts, sums and records."""
    groups = len(words) // 64
    return words[:groups], words[groups : 2 * groups], words[2 * groups :]


def prepare_groupby(memory: Memory) -> None:
    """An empty table, mixed-up records."""
    counts, sums, records = table_of(memory.words)
    counts[:], sums[:] = 0, 0
    prepare_mixed(Memory(records))


def run_groupby(memory: Memory) -> None:
    """Key: the upper half of the record modulo the number of groups; value: its lower half."""
    counts, sums, records = table_of(memory.words)
    for first in range(0, len(records), CHUNK):
        part = records[first : first + CHUNK]
        keys = ((part >> np.uint64(32)) % np.uint64(len(counts))).astype(np.intp)
        np.add.at(counts, keys, np.uint64(1))
        np.add.at(sums, keys, part & np.uint64(0xFFFFFFFF))


def run_sum(memory: Memory) -> None:
    """Reads everything; changes nothing."""
    memory.words.sum()


def run_gather(memory: Memory) -> None:
    """As many random words as there are, 128 Ki at a time."""
    generator = np.random.default_rng(4)
    for _ in range(0, len(memory.words), CHUNK):
        memory.words[generator.integers(0, len(memory.words), CHUNK)].sum()


@dataclass(frozen=True, slots=True)
class Program:
    """Attributes: prepare: writes the input; run: what is timed."""

    prepare: Callable[[Memory], None]
    run: Callable[[Memory], None]


PROGRAMS = {
    "sort": Program(prepare_mixed, run_sort),
    "gemm": Program(prepare_gemm, run_gemm),
    "pagerank": Program(prepare_pagerank, run_pagerank),
    "groupby": Program(prepare_groupby, run_groupby),
}
RESIDENT_PROGRAMS = {
    "resident sum": Program(prepare_mixed, run_sum),
    "resident sort": Program(prepare_mixed, run_sort),
    "resident gather": Program(prepare_mixed, run_gather),
}


def timed(memory: Memory, work: Callable[[Memory], None]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work(memory)
    return time.perf_counter() - began


# ---- the measurement


def run(options: Options, progress: Progress) -> list[Row]:
    """Rows of every program."""
    return _paged(options, progress) + _resident(options, progress)


Turns = dict[str, tuple[Subject, Callable[[], None]]]
"""Subject's name -> the subject, and what makes its memory be out before a run."""


def _paged(options: Options, progress: Progress) -> list[Row]:
    limit = options.limit_or(LIMIT)
    size = 4 * limit
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        turns: Turns = {"numpy": (Here(Memory(np.empty(size // 8, np.uint64))), _nothing)}
        region = stack.enter_context(service(options, size=size + (size >> 4), limit=limit))
        array = region.empty(size // 8, "u8")
        turns["dmh"] = Here(Memory(array)), partial(region.evict, array)
        try:
            mapped = MappedFile(size, limit)
            stack.callback(mapped.close)
            turns["memmap"] = mapped, mapped.cold
        except NoGroupError as error:
            missing["memmap"] = str(error)
        baseline = "numpy" if missing else "memmap"
        return _rows(options, PROGRAMS, turns, baseline, missing, progress)


def _resident(options: Options, progress: Progress) -> list[Row]:
    size = QUICK_RESIDENT if options.quick else RESIDENT
    with ExitStack() as stack:
        small = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        small.madvise(mmap.MADV_NOHUGEPAGE)
        turns: Turns = {
            "numpy": (Here(Memory(np.empty(size // 8, np.uint64))), _nothing),
            "numpy-4k": (Here(Memory(np.frombuffer(small, np.uint64))), _nothing),
        }
        region = stack.enter_context(service(options, size=2 * size, limit=2 * size))
        turns["dmh"] = Here(Memory(region.empty(size // 8, "u8"))), _nothing
        return _rows(options, RESIDENT_PROGRAMS, turns, "numpy", {}, progress)


def _rows(
    options: Options,
    programs: dict[str, Program],
    turns: Turns,
    baseline: str,
    missing: dict[str, str],
    progress: Progress,
) -> list[Row]:
    rows: list[Row] = []
    for case, program in programs.items():
        expected: list[int] = []

        def turn(name: str, program: Program = program, expected: list[int] = expected) -> Samples:
            subject, put_out = turns[name]
            subject.call(program.prepare)
            put_out()
            seconds = subject.call(timed, program.run)
            found = subject.call(digest)
            expected.append(found)  # of ordinary memory, which is the first
            verify(name, found, expected[0])
            return np.array([seconds])

        results = interleave(
            {name: partial(turn, name) for name in turns}, (options.runs + 1) // 2, partial(_tell, progress, case)
        )
        rows += summarize("apps", case, METRIC, UNIT, results, baseline, missing=missing)
    return rows


def _nothing() -> None:
    """Ordinary memory has nowhere to go."""


def _tell(progress: Progress, case: str, text: str) -> None:
    progress(f"apps, {case}: {text}")

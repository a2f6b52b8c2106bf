"""What is done to a subject's memory: each function is one measured action, run in the process that has it mapped.

The loops are C (`dmh_bench.c`) or NumPy's own; each returns its seconds and the sum of what it found, which its caller
compares with what must be there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dmh.bench.words import Words, fill
from dmh.native import check, ffi, lib

Found = tuple[float, int]
"""Seconds, and the sum modulo 2^64 of what was found."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What a subject offers: words that are paged, or mapped, or resident."""

    words: Words

    @property
    def pointer(self) -> Any:
        return address(self.words)


def address(array: npt.NDArray[Any]) -> Any:
    """A C pointer to an array's first byte."""
    return ffi.cast("uint8_t *", array.ctypes.data)


def fill_all(memory: Memory) -> None:
    """Write every word (`dmh.bench.words`)."""
    fill(memory.words)


def read(memory: Memory) -> Found:
    """Sum all words, first to last."""
    began = time.perf_counter()
    found = lib.dmh_sum_words(memory.pointer, memory.words.nbytes)
    return time.perf_counter() - began, found


def update(memory: Memory) -> Found:
    """Add one to every word, first to last; finds what they held before."""
    began = time.perf_counter()
    found = lib.dmh_increment_words(memory.pointer, memory.words.nbytes)
    return time.perf_counter() - began, found


def triad(memory: Memory, factor: int) -> Found:
    """a = b + factor * c over the thirds of the memory; finds what it wrote."""
    n = third_of(len(memory.words))
    a, b, c = (memory.words[i * n : (i + 1) * n] for i in range(3))
    began = time.perf_counter()
    found = lib.dmh_triad_words(address(a), address(b), address(c), factor, a.nbytes)
    return time.perf_counter() - began, found


def third_of(words: int) -> int:
    """The length of each of the triad's arrays: whole 2 MiB where there are some, so that no two share a page."""
    return words // 3 & ~((1 << 18) - 1) or words // 3 & ~511


def numpy_sum(memory: Memory) -> Found:
    """`array.sum()`."""
    began = time.perf_counter()
    found = int(memory.words.sum())
    return time.perf_counter() - began, found


def numpy_update(memory: Memory) -> Found:
    """`array += 1`; finds nothing (0), so its result is read afterwards."""
    began = time.perf_counter()
    np.add(memory.words, np.uint64(1), out=memory.words)
    return time.perf_counter() - began, 0


def access(memory: Memory, numbers: Words, write: bool) -> Found:
    """Read single words; with `write`, every second access also adds one to its word."""
    began = time.perf_counter()
    found = lib.dmh_access_words(memory.pointer, ffi.from_buffer("uint64_t[]", numbers), len(numbers), write)
    return time.perf_counter() - began, found


def access_by_threads(memory: Memory, numbers: Words, threads: int) -> Found:
    """Read single words, each thread its own run of `numbers`, all at once."""
    found = ffi.new("uint64_t *")
    ns = lib.dmh_access_by_threads(memory.pointer, ffi.from_buffer("uint64_t[]", numbers), len(numbers), threads, found)
    return check(ns, "starting threads") / 1e9, int(found[0])


def touch(memory: Memory, numbers: Words, write: bool = False) -> npt.NDArray[np.float64]:
    """Touch one byte of each of these words; returns µs for each."""
    return touch_at(memory.pointer, numbers * np.uint64(8), write=write)


def touch_at(base: Any, offsets: npt.NDArray[np.uint64], *, write: bool = False) -> npt.NDArray[np.float64]:
    """Touch one byte at each offset from `base`; returns µs for each."""
    times = np.empty(len(offsets), np.uint64)
    lib.dmh_time_touch(
        base, ffi.from_buffer("uint64_t[]", offsets), len(offsets), write, ffi.from_buffer("uint64_t[]", times)
    )
    return times / 1000.0

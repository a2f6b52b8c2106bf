"""dmh as a subject: a service of the benchmark's own, its array, and what is done to it between runs.

Owns the configuration that a benchmark measures.  Used by every benchmark in this package.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmh.config import loads
from dmh.errors import DmhError
from dmh.native import ffi, lib
from dmh.region.region import Region, open_region

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says.

    Attributes:
        runs: how often each subject runs.
        page_size: bytes a page of dmh's.
        limit: bytes of local memory (0: the benchmark's own choice).
        store: URL, or "file" for a temporary page file, or "memory".
        quick: a small version that only shows that it works.
    """

    runs: int = 5
    page_size: int = 4096
    limit: int = 0
    store: str = "file"
    quick: bool = False


@contextmanager
def service(options: Options, *, size: int, limit: int, inline: bool, prefetch: bool = True) -> Iterator[Region]:
    """A region of `size` bytes with `limit` bytes local."""
    with tempfile.TemporaryDirectory(prefix="dmh-bench-", dir="/var/tmp") as directory:
        url = {"file": f"file://{Path(directory) / 'pages'}", "memory": "memory:"}.get(options.store, options.store)
        config = loads(
            f"region: {{name: bench-{os.getpid()}-{next(_numbers)}, size: {size}, page_size: {options.page_size}}}\n"
            f"memory: {{limit: {limit}}}\n"
            f"workers: {{inline: {str(inline).lower()}}}\n"
            f"prefetch: {{enabled: {str(prefetch).lower()}}}\n"
            f"store: {{url: '{url}'}}\n",
            name="benchmark",
        )
        with open_region(config) as region:
            yield region


class MismatchError(DmhError):
    """A benchmark read bytes that it had not written; its figures mean nothing."""


def stamp(array: npt.NDArray[np.uint64], page_size: int) -> None:
    """Write into every page something that only this page has: its number, at the page's first word, over a mixed
    filling.
    """
    words = page_size // 8
    step = 1024
    pages = len(array) // words
    for first in range(0, pages, step):
        n = min(step, pages - first)
        part = array[first * words : (first + n) * words].reshape(n, words)
        part[:] = (np.arange(first, first + n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))[:, None] + np.arange(
            words, dtype=np.uint64
        )
        part[:, 0] = np.arange(first, first + n)


def stamped_sum(pages: int, page_size: int) -> int:
    """The sum, modulo 2^64, of everything that `stamp` writes."""
    words = page_size // 8
    total = 0
    mask = (1 << 64) - 1
    for first in range(0, pages, 4096):
        numbers = np.arange(first, min(first + 4096, pages), dtype=np.uint64)
        mixed = numbers * np.uint64(0x9E3779B97F4A7C15)
        total += (
            int(numbers.sum()) + int((mixed * np.uint64(words - 1)).sum()) + len(numbers) * (words * (words - 1) // 2)
        )
        total &= mask
    return total


def touch(base: Any, offsets: npt.NDArray[np.uint64], *, write: bool = False) -> npt.NDArray[np.float64]:
    """Touch one byte at each offset from `base`; returns µs for each."""
    times = np.empty(len(offsets), np.uint64)
    lib.dmh_time_touch(
        base, ffi.from_buffer("uint64_t[]", offsets), len(offsets), write, ffi.from_buffer("uint64_t[]", times)
    )
    return times / 1000.0


def address(array: npt.NDArray[Any]) -> Any:
    """A C pointer to an array's first byte."""
    return ffi.cast("uint8_t *", array.ctypes.data)

"""What the benchmarks' memory holds, which words they access, and what they must find there.  Pure.

The memory is an array of 64-bit words; word i holds i times `FACTOR`, modulo 2^64, so that every word differs from
every other and the sum of any range has a closed form.  Whoever changes words does it by adding ones, so the sum that
an access pattern must find is known before it runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

FACTOR = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
CHUNK = 1 << 17
"""Words handled at a time: 1 MiB, little beside any memory limit."""


def fill(words: Words) -> None:
    """Write every word."""
    for first in range(0, len(words), CHUNK):
        end = min(first + CHUNK, len(words))
        np.multiply(np.arange(first, end, dtype=np.uint64), np.uint64(FACTOR), out=words[first:end])


def value(numbers: Words) -> Words:
    """What the words with these numbers hold after `fill`."""
    return numbers * np.uint64(FACTOR)


def total(first: int, end: int) -> int:
    """The sum, modulo 2^64, of the words from `first` to before `end` after `fill`."""
    return FACTOR * ((first + end - 1) * (end - first) // 2) & MASK


def uniform(generator: np.random.Generator, words: int, count: int) -> Words:
    """Word numbers, each as likely as any other."""
    return generator.integers(0, words, count, np.uint64)


def zipf(generator: np.random.Generator, pages: int, words_per_page: int, count: int, skew: float) -> Words:
    """Word numbers whose pages follow Zipf's law: the k-th most popular page is accessed in proportion to 1 / k^skew,
    popular pages lie anywhere (one fixed permutation), and the word within the page is uniform.
    """
    reached = np.cumsum(1.0 / np.arange(1, pages + 1, dtype=float) ** skew)
    ranks = np.minimum(np.searchsorted(reached, generator.random(count) * reached[-1]), pages - 1)
    page_of_rank = np.random.default_rng(pages).permutation(pages).astype(np.uint64)
    inside = generator.integers(0, words_per_page, count, np.uint64)
    result: Words = page_of_rank[ranks] * np.uint64(words_per_page) + inside
    return result


@dataclass(frozen=True, slots=True)
class Accesses:
    """One run of single-word accesses.

    Attributes:
        numbers: of the words, in order.
        write: every second access (the 2nd, the 4th, ...) also adds one to its word.
        expected: the sum, modulo 2^64, of what all accesses find.
    """

    numbers: Words
    write: bool
    expected: int


class Script:
    """The runs of one case, the same for every subject, with what each run must find given the runs before it."""

    def __init__(self, words: int) -> None:
        self._added = np.zeros(words, np.uint16)  # how often each word has been added to; untouched parts cost nothing

    def run(self, numbers: Words, *, write: bool) -> Accesses:
        """The next run."""
        found = int(value(numbers).sum()) + int(self._added[numbers].sum())
        if write:
            found += self._earlier_writes(numbers)
            np.add.at(self._added, numbers[1::2], 1)
        return Accesses(numbers, write, found & MASK)

    def total(self) -> int:
        """The sum of all words after the runs so far."""
        return (total(0, len(self._added)) + int(self._added.sum(dtype=np.uint64))) & MASK

    @staticmethod
    def _earlier_writes(numbers: Words) -> int:
        """Summed over the accesses: how many writes of the same run have gone to the same word before."""
        order = np.argsort(numbers, kind="stable")
        writes = (order & 1).astype(np.int64)  # odd positions write
        before = np.cumsum(writes) - writes
        starts = np.concatenate(([True], np.diff(numbers[order]) != 0))
        group = np.cumsum(starts) - 1
        return int((before - before[starts][group]).sum())

"""What the demo's array must hold, computed from the seed alone and never from the array.

Pure.  Owns the numbers: a counter-based generator (Philox), so that any part of the array can be computed anew at any
time, in any order, with next to no memory.  `dmh.demo.program` writes these numbers and compares with them.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.intp]

_WORDS_A_STEP = 4  # what Philox yields for one step of its counter
_FILL, _UPDATES = 0, 1  # the counter's highest word: streams that cannot meet
_RANGE_WORDS = 1 << 14  # elements of one range of values, about: 128 KiB


class Expected:
    """Elements before and after the random updates.

    Attributes:
        seed: any integer from 0.
        count: elements of the array.
    """

    def __init__(self, seed: int, count: int, updates: int) -> None:
        self.seed = seed
        self.count = count
        self._wanted = updates

    def filled(self, low: int, high: int) -> Words:
        """Elements low .. high - 1 as they are written first."""
        skip = low % _WORDS_A_STEP
        generator = np.random.Philox(key=self.seed, counter=[low // _WORDS_A_STEP, 0, 0, _FILL])
        return generator.random_raw(skip + high - low)[skip:]

    @cached_property
    def updates(self) -> tuple[Indices, Words]:
        """(positions, what is added there), in the order of the updates.  No position occurs twice."""
        generator = np.random.Philox(key=self.seed, counter=[0, 0, 0, _UPDATES])
        drawn = np.random.Generator(generator).integers(0, self.count, self._wanted, dtype=np.intp)
        _, first = np.unique(drawn, return_index=True)
        positions = drawn[np.sort(first)]
        return positions, generator.random_raw(len(positions))

    @cached_property
    def _updates_by_position(self) -> tuple[Indices, Words]:
        positions, added = self.updates
        order = np.argsort(positions)
        return positions[order], added[order]

    def updated(self, low: int, high: int) -> Words:
        """Elements low .. high - 1 after the updates."""
        values = self.filled(low, high)
        positions, added = self._updates_by_position
        first, end = np.searchsorted(positions, (low, high))
        values[positions[first:end] - low] += added[first:end]
        return values


class SortedContent:
    """What a sorted array must hold, from its elements in any order.

    The values are divided into ranges by their highest bits.  How many fall into each range says at which positions it
    must stand once sorted, and the sum of a hash over them says what must stand there; the order inside is checked by
    looking at it.

    Attributes:
        shift: value >> shift is the number of its range.
    """

    def __init__(self, count: int) -> None:
        bits = max(1, (count // _RANGE_WORDS).bit_length())
        self.shift = 64 - bits
        self._counts: Indices = np.zeros(1 << bits, np.intp)
        self._hashes: Words = np.zeros(1 << bits, np.uint64)

    def add(self, values: Words) -> None:
        """Take in some elements."""
        ranges = (values >> np.uint64(self.shift)).view(np.intp)
        self._counts += np.bincount(ranges, minlength=len(self._counts))
        # Sums of a part's 32-bit hashes are exact in float64, which is what bincount adds in.
        sums = np.bincount(ranges, weights=_hash(values).astype(np.float64), minlength=len(self._hashes))
        self._hashes += sums.astype(np.uint64)

    def bounds(self) -> Indices:
        """Range r of the values stands at positions bounds[r] .. bounds[r + 1] - 1."""
        return np.concatenate(([0], np.cumsum(self._counts)))

    def accepts(self, number: int, part: Words) -> bool:
        """Whether `part`, found where the range `number` must stand, is that range, sorted."""
        # Equal sums mean the same elements, so also elements of this range: parts in order make an array in order.
        return bool((part[1:] >= part[:-1]).all()) and int(_hash(part).sum()) == int(self._hashes[number])


def _hash(values: Words) -> Words:
    """32 bits of each value that depend on all 64 of it."""
    mixed = values ^ (values >> np.uint64(32))
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    mixed >>= np.uint64(32)
    return mixed

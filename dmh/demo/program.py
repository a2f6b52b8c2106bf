"""The demo's NumPy program, ``python -m dmh.demo.program``: joins the service that DMH_SOCKET names.

Owns the phases (fill, checksum, random updates, sort, and a verification after each change).  They are ordinary NumPy
on an ordinary array: nothing in `Program` knows of dmh.  Tells what it does as JSON lines on standard output, for
`dmh.demo.progress`.  Started by `dmh.cli.demo`, in a process of its own because a thread inside one NumPy call cannot
be interrupted and a process can.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import dmh
from dmh.demo.expected import Expected, SortedContent, Words
from dmh.native import lib

PART = 1 << 16
"""Elements handled at a time: 512 KiB, about all the memory that the program has of its own."""
BATCH = 64
REPORT_SECONDS = 0.05

Steps = Iterator[float]
"""What a phase yields: the fraction that is done."""


class Mismatch(Exception):  # noqa: N818 - a finding, not an error of the program
    """An element that is not what it must be."""

    def __init__(self, index: int, expected: int, got: int) -> None:
        super().__init__(f"element {index}: expected {expected:#018x}, got {got:#018x}")
        self.index = index
        self.expected = expected
        self.got = got


class Program:
    """The phases, each a generator that yields the fraction that is done; a wrong element raises `Mismatch`."""

    def __init__(self, array: Words, expected: Expected) -> None:
        self.array = array
        self.expected = expected
        self.content = SortedContent(len(array))
        self.phases: dict[str, Callable[[], Steps]] = {
            "fill": self.fill,
            "checksum": self.checksum,
            "random updates": self.update,
            "verify updates": self.verify_updates,
            "sort": self.sort,
            "verify sort": self.verify_sort,
        }

    def _parts(self) -> Iterator[tuple[int, int]]:
        count = len(self.array)
        for low in range(0, count, PART):
            yield low, min(low + PART, count)

    def fill(self) -> Steps:
        """Random numbers, from the first element to the last."""
        for low, high in self._parts():
            self.array[low:high] = self.expected.filled(low, high)
            yield high / len(self.array)

    def checksum(self) -> Steps:
        """The sum of all elements, part by part, against the sum of what was written."""
        for low, high in self._parts():
            wanted, got = self.expected.filled(low, high), self.array[low:high].sum()
            if got != wanted.sum():
                _compare(self.array[low:high], wanted, low)
                raise Mismatch(
                    low, int(wanted.sum()), int(got)
                )  # it reads right now: the sum itself was of other bytes
            yield high / len(self.array)

    def update(self) -> Steps:
        """Add to elements at random: each reads a page from anywhere, and writes to it."""
        positions, added = self.expected.updates
        for first in range(0, len(positions), BATCH):
            here = slice(first, first + BATCH)
            self.array[positions[here]] += added[here]
            yield min(1.0, (first + BATCH) / len(positions))

    def verify_updates(self) -> Steps:
        """Every element, also the ones that no update touched; and take stock of them for `verify_sort`."""
        for low, high in self._parts():
            wanted = self.expected.updated(low, high)
            _compare(self.array[low:high], wanted, low)
            self.content.add(wanted)
            yield high / len(self.array)

    def sort(self) -> Steps:
        """In place, by one call."""
        self.array.sort()
        yield 1.0

    def verify_sort(self) -> Steps:
        """Every element: in order, and the same elements as before."""
        bounds = self.content.bounds()
        for number, (low, high) in enumerate(itertools.pairwise(bounds.tolist())):
            part = self.array[low:high]
            if not self.content.accepts(number, part):
                _compare(part, self._range(number), low)
                raise Mismatch(
                    low, int(self._range(number)[0]), int(part[0])
                )  # it reads right now: it did not a moment ago
            yield high / len(self.array)

    def _range(self, number: int) -> Words:
        """All elements of one range of values, sorted.  For saying which one is wrong: it takes all of the stream."""
        shift = np.uint64(self.content.shift)
        found = []
        for low, high in self._parts():
            values = self.expected.updated(low, high)
            found.append(values[values >> shift == number])
        return np.sort(np.concatenate(found))


def _compare(part: Words, wanted: Words, low: int) -> None:
    """Raise the first mismatch between two equally long arrays, of which the first element is number `low`."""
    if not np.array_equal(part, wanted):
        wrong = np.flatnonzero(part != wanted)
        if len(wrong):  # none, where a second look finds the right bytes: `array_equal` saw others
            at = int(wrong[0])
            raise Mismatch(low + at, int(wanted[at]), int(part[at]))
        raise Mismatch(low, int(wanted[0]), int(part[0]))


def tell(**facts: Any) -> None:
    """One line for the process that shows them."""
    print(json.dumps(facts), flush=True)


def run(program: Program, counters: Callable[[], dict[str, int]]) -> bool:
    """All phases in order; whether every byte was right.

    Args:
        program: what to run.
        counters: gives the service's counters of the moment.
    """
    before = counters()
    for name, phase in program.phases.items():
        tell(began=name)
        start = reported = time.monotonic()
        try:
            for fraction in phase():
                now = time.monotonic()
                if now - reported >= REPORT_SECONDS:
                    reported = now
                    tell(fraction=round(fraction, 4))
        except Mismatch as wrong:
            tell(mismatch=wrong.index, expected=wrong.expected, got=wrong.got)
            return False
        seconds = time.monotonic() - start
        after = counters()
        tell(ended=name, seconds=seconds, counters={key: after[key] - before.get(key, 0) for key in after})
        before = after
    tell(verified=True)
    return True


def main() -> int:
    """0 if every byte was right."""
    parser = argparse.ArgumentParser(prog="dmh.demo.program")
    parser.add_argument("--elements", type=int, required=True)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one, which ends it
    lib.dmh_die_with_parent()
    with dmh.attach() as region:
        array = region.empty(arguments.elements, np.uint64)
        expected = Expected(arguments.seed, arguments.elements, arguments.updates)
        return 0 if run(Program(array, expected), lambda: region.stats().counters) else 1


if __name__ == "__main__":
    sys.exit(main())

"""One fault at a time, in random order, nothing evicted: what a thread waits for a page.

    zero     a page that is touched for the first time
    soft     a page that is still in the victim buffer             (dmh only: nobody else has one)
    stored   a page that the store has; its file is warm in the page cache

The baseline of the first two is the floor handler, which only copies; that of `stored` is the floor pager, which reads
the page from its file first.  `mmap` is a mapped file in the page cache, mapped anew before each run, under no limit:
the kernel's own fault on the same machine; its pages lie 64 KiB apart, because one fault maps the neighbours too.  dmh
reads nothing ahead here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import numpy as np
import numpy.typing as npt

from dmh.bench import work
from dmh.bench.floor import FILLING, Floor, FloorPager
from dmh.bench.mapped import MappedFile
from dmh.bench.rows import Progress, Row, Samples, interleave, not_measured, summarize
from dmh.bench.subject import Here, MismatchError, Options, Subject, service, verify
from dmh.bench.words import MASK, Words, fill, value
from dmh.errors import KernelError
from dmh.region.region import Region

PAGES, QUICK_PAGES = 1500, 60
APART = 16
"""Pages of a mapped file that one fault maps, on kernels as they are set (fault_around_bytes: 64 KiB)."""
METRIC, UNIT = "one fault", "µs"

Turn = Callable[[], Samples]


def run(options: Options, progress: Progress) -> list[Row]:
    """Rows of every case."""
    with ExitStack() as stack:
        bench = _Latency(options, progress, stack)
        return bench.zero() + bench.soft() + bench.stored()


class _Latency:
    """The cases, and what they share: the floor, two services, an order of pages, a look at what was touched."""

    def __init__(self, options: Options, progress: Progress, stack: ExitStack) -> None:
        self.options, self._progress = options, progress
        self.pages = QUICK_PAGES if options.quick else PAGES
        self.words = options.page_size // 8
        self.size = self.pages * options.page_size
        self._generator = np.random.default_rng(1)
        self._stack = stack
        self._floor_handler = stack.enter_context(Floor(self.pages, options.page_size))
        # Room for everything, twice: nothing is evicted, and the zero case gets new pages while the old ones are being
        # given back.
        room = 8 * self.size
        self._regions = {
            name: stack.enter_context(service(options, size=room, limit=room // 2, inline=inline, prefetch=False))
            for name, inline in (("dmh", True), ("dmh-pool", False))
        }

    def order(self) -> Words:
        """The first word of every page, in an order of its own."""
        return self._generator.permutation(self.pages).astype(np.uint64) * np.uint64(self.words)

    def _rows(self, case: str, subjects: dict[str, Turn], baseline: str) -> list[Row]:
        results = interleave(subjects, self.options.runs, lambda text: self._progress(f"latency {case}: {text}"))
        return summarize("latency", case, METRIC, UNIT, results, baseline)

    # ---- zero

    def zero(self) -> list[Row]:
        """A new page."""
        subjects: dict[str, Turn] = {"floor": self._floor}
        subjects |= {name: partial(self._new, name, region) for name, region in self._regions.items()}
        return self._rows("zero", subjects, "floor")

    def _floor(self) -> Samples:
        floor = self._floor_handler
        floor.empty()
        times = floor.call(work.touch, self.order())
        verify("floor", int(floor.memory.words[:: self.words].sum()), int.from_bytes([FILLING] * 8) * self.pages & MASK)
        return times

    def _new(self, name: str, region: Region) -> Samples:
        array = region.empty(self.size // 8, "u8")
        times = work.touch(work.Memory(array), self.order())
        if array.any():
            raise MismatchError(f"{name}: a new page does not read as zeros")
        return times

    # ---- soft

    def soft(self) -> list[Row]:
        """A page in the victim buffer: the policy that marks pages by moving them there is made to mark."""
        slots = self.pages + self.pages // 8 + 8
        more = [
            "evictor.policy=idle-walk",
            "evictor.idle=buffer",
            f"evictor.buffer={slots} pages",
            f"memory.high={2 * slots} pages",
            f"memory.low={2 * slots - 4} pages",
        ]
        limit = 4 * slots * self.options.page_size
        with service(self.options, size=2 * limit, limit=limit, prefetch=False, more=more) as region:
            subjects: dict[str, Turn] = {"floor": self._floor, "dmh": partial(self._soft, region, slots)}
            try:
                return self._rows("soft", subjects, "floor")
            except _NotSoftError as error:
                return [not_measured("latency", "soft", "dmh", METRIC, UNIT, str(error))]

    def _soft(self, region: Region, slots: int) -> Samples:
        # Two pages more than the high threshold: LPET marks from the oldest page on until the buffer is full, and then
        # evicts the few it has to, oldest first.
        array = region.empty((2 * slots + 2) * self.words, "u8")
        fill(array)
        deadline = time.monotonic() + 5
        while region.stats().staged < self.pages:
            if time.monotonic() > deadline:
                raise _NotSoftError(f"{region.stats().staged} of {self.pages} pages came to the victim buffer")
            time.sleep(0.005)  # the evictor tells nobody when it is done
        before = region.stats().counters["soft"]
        numbers = self.order() + np.uint64((slots - self.pages) * self.words)
        times = work.touch(work.Memory(array), numbers)
        soft = region.stats().counters["soft"] - before
        if soft < 0.98 * self.pages:
            raise _NotSoftError(f"of {self.pages} pages that were touched {soft} were in the victim buffer")
        verify("dmh", int(array[numbers].sum()), int(value(numbers).sum()))
        region.discard(array)
        return times

    # ---- stored

    def stored(self) -> list[Row]:
        """A page that the store has."""
        rows: list[Row] = []
        subjects: dict[str, Turn] = {}
        try:
            pager = self._stack.enter_context(FloorPager(self.size, self.options.page_size, self.size))
            subjects["floor-pager"] = partial(self._again, "floor-pager", pager, pager.empty)
        except KernelError as error:
            rows.append(not_measured("latency", "stored", "floor-pager", METRIC, UNIT, str(error)))
        for name, region in self._regions.items():
            array = region.empty(self.size // 8, "u8")
            fill(array)
            subjects[name] = partial(self._evicted, name, region, array)
        mapped = self._stack.enter_context(MappedFile(self.size * APART, None))
        subjects["mmap"] = partial(self._again, "mmap", mapped, mapped.remap, APART)
        return self._rows("stored", subjects, "floor-pager") + rows

    def _evicted(self, name: str, region: Region, array: npt.NDArray[np.uint64]) -> Samples:
        return self._again(name, Here(work.Memory(array)), lambda: region.evict(array))

    def _again(self, name: str, subject: Subject, empty: Callable[[], None], apart: int = 1) -> Samples:
        """Touch the pages, `apart` from each other, after all have gone."""
        empty()
        order = self.order() * np.uint64(apart)
        times = subject.call(work.touch, order)
        _, found = subject.call(work.access, order, False)
        verify(name, found, int(value(order).sum()))
        return times


class _NotSoftError(Exception):
    pass

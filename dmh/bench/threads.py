"""Several threads that fault at once: how many faults are resolved a second.

Stored pages (the file warm in the page cache), nothing evicted, every page touched once, in random order; thread t of
T takes the t-th part of the order.  C threads, started together; the time is from the start to the last one's end.
Subjects: the floor pager, dmh, dmh through the pool.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import numpy as np

from dmh.bench import work
from dmh.bench.floor import FloorPager
from dmh.bench.rows import Progress, Row, Samples, interleave, summarize
from dmh.bench.subject import Here, Options, Subject, service, verify
from dmh.bench.words import fill, value
from dmh.errors import KernelError

PAGES, QUICK_PAGES = 8_000, 200
THREADS = (1, 2, 4, 8, 16)


def run(options: Options, progress: Progress) -> list[Row]:
    """Rows of every number of threads."""
    pages = QUICK_PAGES if options.quick else PAGES
    size = pages * options.page_size
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        subjects: dict[str, tuple[Subject, Callable[[], None]]] = {}
        try:
            pager = stack.enter_context(FloorPager(size, options.page_size, size))
            subjects["floor-pager"] = pager, pager.empty
        except KernelError as error:
            missing["floor-pager"] = str(error)
        for name, inline in (("dmh", True), ("dmh-pool", False)):
            region = stack.enter_context(service(options, size=2 * size, limit=2 * size, inline=inline, prefetch=False))
            array = region.empty(size // 8, "u8")
            fill(array)
            subjects[name] = Here(work.Memory(array)), partial(region.evict, array)
        rows: list[Row] = []
        generator = np.random.default_rng(3)

        def turn(name: str, threads: int) -> Samples:
            subject, empty = subjects[name]
            empty()
            order = generator.permutation(pages).astype(np.uint64) * np.uint64(options.page_size // 8)
            seconds, found = subject.call(work.access_by_threads, order, threads)
            verify(name, found, int(value(order).sum()))
            return np.array([pages / seconds])

        for threads in THREADS:
            case = f"{threads} thread" + ("s" if threads > 1 else "")
            turns = {name: partial(turn, name, threads) for name in subjects}
            results = interleave(turns, options.runs, partial(_tell, progress, case))
            rows += summarize("threads", case, "faults", "1/s", results, "floor-pager", rate=True, missing=missing)
    return rows


def _tell(progress: Progress, case: str, text: str) -> None:
    progress(f"threads, {case}: {text}")

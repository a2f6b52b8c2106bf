"""One fault at a time, nothing evicted: what a thread waits for a page.

    zero   a page that is touched for the first time
    soft   a page that is still in the victim buffer             (dmh only: nobody else has one)
    store  a page that the store has, in random order

The floor is the minimal C handler in another process (`dmh.bench.floor`), on a memfd, as dmh's region is.  `memmap`
is numpy.memmap of a file in the page cache: the kernel's own fault on the same machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dmh.bench.floor import Floor
from dmh.bench.rows import Row, Samples, interleave, summarize
from dmh.bench.subject import MismatchError, Options, address, service, stamp, touch
from dmh.region.region import Region

PAGES, QUICK_PAGES = 1500, 60

Offsets = npt.NDArray[np.uint64]


def run(options: Options, progress: Callable[[str], None]) -> list[Row]:
    """Rows of every case."""
    pages = QUICK_PAGES if options.quick else PAGES
    size = options.page_size
    rows: list[Row] = []
    generator = np.random.default_rng(1)
    with ExitStack() as stack:
        floor = stack.enter_context(Floor(pages, size))
        regions = {
            "dmh": stack.enter_context(_region(options, pages, inline=True)),
            "dmh-pool": stack.enter_context(_region(options, pages, inline=False)),
        }

        def order() -> Offsets:
            return generator.permutation(pages).astype(np.uint64) * np.uint64(size)

        def on_floor() -> Samples:
            floor.empty()
            return touch(floor.pointer, order())

        def on_new(region: Region) -> Samples:
            array = region.empty(pages * size, "u1")
            times = touch(address(array), order())
            if array.any():
                raise MismatchError("a new page does not read as zeros")
            return times

        subjects: dict[str, Callable[[], Samples]] = {"floor": on_floor}
        subjects |= {name: (lambda region=region: on_new(region)) for name, region in regions.items()}  # type: ignore[misc]
        results = interleave(subjects, options.runs, lambda text: progress(f"latency zero: {text}"))
        rows += summarize("latency", "zero", "one fault", "µs", results, "floor")

        arrays = {name: region.empty(pages * size // 8, "u8") for name, region in regions.items()}
        for array in arrays.values():
            stamp(array, size)

        def on_stored(name: str) -> Samples:
            regions[name].evict(arrays[name])
            times = touch(address(arrays[name]), order())
            if not np.array_equal(arrays[name][:: size // 8], np.arange(pages)):
                raise MismatchError("a page came back from the store with other bytes than were written")
            return times

        subjects = {"floor": on_floor}
        subjects |= {name: (lambda name=name: on_stored(name)) for name in regions}  # type: ignore[misc]
        mapped = stack.enter_context(_MappedFile(pages, size))
        subjects["memmap"] = lambda: mapped.touch(order())
        results = interleave(subjects, options.runs, lambda text: progress(f"latency store: {text}"))
        rows += summarize("latency", "store", "one fault", "µs", results, "floor")
    return rows


def _region(options: Options, pages: int, *, inline: bool):  # type: ignore[no-untyped-def]
    # Room for everything, twice: nothing is evicted, and the zero case gets new pages while the old ones are being
    # given back.
    size = 8 * pages * options.page_size
    return service(options, size=size, limit=size // 2, inline=inline)


class _MappedFile:
    """numpy.memmap of a warm file; every run maps it anew, so that every touch is a fault."""

    def __init__(self, pages: int, page_size: int) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="dmh-bench-", dir="/var/tmp")
        self._path = Path(self._directory.name) / "mapped"
        self._pages = pages
        content = np.zeros(pages * page_size // 8, np.uint64)
        stamp(content, page_size)
        content.tofile(self._path)

    def touch(self, offsets: Offsets) -> Samples:
        mapped = np.memmap(self._path, np.uint8, "r")
        return touch(address(mapped), offsets)

    def __enter__(self) -> _MappedFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._directory.cleanup()

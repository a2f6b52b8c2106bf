"""Sequential access to four times the memory limit.

    read    sum of all words, first to last
    update  add one to every word

The read is a C loop over 8-byte words, so that Python is not what is measured; the sum is checked.  `memmap` is
numpy.memmap of a file that is warm in the page cache and under no limit: what the kernel gives where memory does not
run out.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dmh.bench.rows import Row, Samples, interleave, summarize
from dmh.bench.subject import MismatchError, Options, address, service, stamp, stamped_sum
from dmh.native import lib

SIZE, QUICK_SIZE = 512 << 20, 16 << 20


def run(options: Options, progress: Callable[[str], None]) -> list[Row]:
    """Rows of every case."""
    limit = options.limit or (QUICK_SIZE if options.quick else SIZE) // 4
    size = 4 * limit
    pages = size // options.page_size
    rows: list[Row] = []
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="dmh-bench-", dir="/var/tmp"))
        path = Path(directory) / "mapped"
        content = np.memmap(path, np.uint64, "w+", shape=(size // 8,))
        arrays: dict[str, npt.NDArray[np.uint64]] = {"memmap": content}
        for name, inline in (("dmh", True), ("dmh-pool", False)):
            region = stack.enter_context(service(options, size=size + (size >> 4), limit=limit, inline=inline))
            arrays[name] = region.empty(size // 8, "u8")
        for name, array in arrays.items():
            progress(f"stream: filling {name}")
            stamp(array, options.page_size)
        expected = dict.fromkeys(arrays, stamped_sum(pages, options.page_size))
        mask = (1 << 64) - 1

        def read(name: str) -> Samples:
            began = time.perf_counter()
            total = lib.dmh_sum_words(address(arrays[name]), size)
            seconds = time.perf_counter() - began
            if total != expected[name]:
                raise MismatchError(f"{name}: the sum of what was read is not the sum of what was written")
            return np.array([size / seconds / 1e6])

        def update(name: str) -> Samples:
            began = time.perf_counter()
            step = (1 << 20) // 8
            for first in range(0, size // 8, step):
                arrays[name][first : first + step] += 1
            seconds = time.perf_counter() - began
            expected[name] = (expected[name] + size // 8) & mask
            return np.array([size / seconds / 1e6])

        for case, action in (("read", read), ("update", update)):
            subjects: dict[str, Callable[[], Samples]] = {
                name: (lambda name=name, action=action: action(name))  # type: ignore[misc]
                for name in arrays
            }
            results = interleave(subjects, options.runs, lambda text, case=case: progress(f"stream {case}: {text}"))  # type: ignore[misc]
            rows += summarize("stream", case, "throughput", "MB/s", results, "memmap", rate=True)
            per_page = {name: [options.page_size / samples for samples in runs] for name, runs in results.items()}
            rows += summarize("stream", case, "time a page", "µs", per_page, "memmap")
    return rows

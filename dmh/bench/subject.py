"""The subjects of a benchmark that pages: dmh twice, the floor pager, the kernel's mapping of a file, swap.

All have the same words and the same limit of local memory:

    floor-pager    a minimal pager in C (`dmh.bench.floor`); its page file is warm in the page cache
    dmh            faults that cannot block are resolved by the monitor where it stands
    dmh-pool       every fault goes through the pool of resolvers (`workers.inline: false`)
    mmap, memmap   a file mapped by a process in a memory cgroup of the limit and 16 MiB for the process itself: `mmap`
                   read by the C loops, `memmap` (numpy.memmap, the same mapping) by NumPy's; what does not fit comes
                   from the disk
    mmap-random    the same with MADV_RANDOM: the kernel reads no neighbours
    swap           anonymous memory in such a cgroup, on a machine that has swap

dmh's store and the floor pager's file are outside the limit, in the page cache of the machine or in another process.
Owns the configuration that a benchmark measures and the life of the subjects.  Used by every benchmark here.
"""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dmh.bench.cgroup import NoGroupError
from dmh.bench.floor import FloorPager
from dmh.bench.mapped import MappedFile, Swapped, why_no_swap
from dmh.bench.rows import Progress, Row, waits
from dmh.bench.work import Memory, fill_all
from dmh.config import Config, loads
from dmh.errors import DmhError, KernelError
from dmh.region.region import Region, open_region

T = TypeVar("T")

_numbers = itertools.count()


class MismatchError(DmhError):
    """A benchmark read bytes that it had not written; its figures mean nothing."""


def verify(subject: str, found: int, expected: int) -> None:
    """Raise MismatchError where the sum that a subject's run found is not the one that it must find."""
    if found != expected:
        raise MismatchError(
            f"{subject}: the words that were read sum to {found:#x}, those that were written to {expected:#x}"
        )


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says.

    Attributes:
        runs: how often each subject runs.
        page_size: bytes a page of dmh's and of the floor's.
        limit: bytes of local memory (0: the benchmark's own choice).
        store: URL, or "file" for a temporary page file, or "memory".
        quick: a small version that only shows that it works.
    """

    runs: int = 5
    page_size: int = 4096
    limit: int = 0
    store: str = "file"
    quick: bool = False

    def limit_or(self, usual: int) -> int:
        """The limit to measure with; `usual` where the command line names none."""
        return self.limit or (max(4 << 20, 64 * self.page_size) if self.quick else usual)


@contextmanager
def service(
    options: Options, *, size: int, limit: int, inline: bool = True, prefetch: bool = True, more: Sequence[str] = ()
) -> Iterator[Region]:
    """A region of `size` bytes with `limit` bytes local; `more` are settings as for ``--set``."""
    with tempfile.TemporaryDirectory(prefix="dmh-bench-", dir="/var/tmp") as directory:
        config = settings(
            options, Path(directory), size=size, limit=limit, inline=inline, prefetch=prefetch, more=more
        )  # fmt: skip
        with open_region(config) as region:
            yield region


def settings(
    options: Options,
    directory: Path,
    *,
    size: int,
    limit: int,
    inline: bool = True,
    prefetch: bool = True,
    more: Sequence[str] = (),
) -> Config:
    """The configuration of such a service; a page file is in `directory`."""
    url = {"file": f"file://{directory / 'pages'}", "memory": "memory:"}.get(options.store, options.store)
    return loads(
        f"region: {{name: bench-{os.getpid()}-{next(_numbers)}, size: {size}, page_size: {options.page_size}}}\n"
        f"memory: {{limit: {limit}}}\n"
        f"workers: {{inline: {str(inline).lower()}}}\n"
        f"prefetch: {{enabled: {str(prefetch).lower()}}}\n"
        f"store: {{url: '{url}'}}\n",
        more,
        name="benchmark",
    )


class Subject(Protocol):
    """Something that is measured: `call` runs a function of `dmh.bench.work` on its memory, where that is mapped."""

    def call(self, work: Callable[..., T], *args: Any) -> T: ...


class Here:
    """Memory that this process has mapped: a region's array, or an ordinary one."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def call(self, work: Callable[..., T], *args: Any) -> T:
        """``work(memory, *args)``."""
        return work(self.memory, *args)


@dataclass(slots=True)
class Contest:
    """Subjects of equal size and limit, filled; and those that this machine does not have, with the reason."""

    subjects: dict[str, Subject] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    regions: dict[str, Region] = field(default_factory=dict)

    def faults(self) -> dict[str, tuple[int, int]]:
        """Of every service so far: faults that had to wait for room, and all."""
        counters = {name: region.stats().counters for name, region in self.regions.items()}
        return {name: (count["room_waits"], count["faults"]) for name, count in counters.items()}

    def waits_since(self, before: dict[str, tuple[int, int]], benchmark: str, case: str, runs: int) -> list[Row]:
        """A row for every service: what `faults` has counted in addition."""
        return [
            waits(benchmark, case, name, waited - before[name][0], faults - before[name][1], runs)
            for name, (waited, faults) in self.faults().items()
        ]


@contextmanager
def contest(
    options: Options, size: int, limit: int, names: Sequence[str], progress: Progress, *, prefetch: bool = True
) -> Iterator[Contest]:
    """The subjects with these names."""
    entered = Contest()
    with ExitStack() as stack:
        for name in names:
            progress(f"filling {name}")
            try:
                entered.subjects[name] = _enter(stack, entered, options, name, size, limit, prefetch)
            except (NoGroupError, KernelError, _NoSwapError) as error:
                entered.missing[name] = str(error)
        try:
            yield entered
        finally:
            entered.subjects.clear()


def _enter(
    stack: ExitStack, entered: Contest, options: Options, name: str, size: int, limit: int, prefetch: bool
) -> Subject:
    if name == "floor-pager":
        return stack.enter_context(FloorPager(size, options.page_size, limit))
    if name in ("dmh", "dmh-pool"):
        # A little more than the data: an array begins at a whole page, and what is being given back is not free yet.
        room = size + (size >> 4)
        room -= room % options.page_size
        region = stack.enter_context(service(options, size=room, limit=limit, inline=name == "dmh", prefetch=prefetch))
        entered.regions[name] = region
        here = Here(Memory(region.empty(size // 8, "u8")))
        here.call(fill_all)
        return here
    if name == "swap":
        why = why_no_swap(size, Path("/proc/meminfo").read_text())
        if why:
            raise _NoSwapError(why)
        swapped = Swapped(size, limit)
        stack.callback(swapped.close)
        swapped.call(fill_all)
        return swapped
    mapped = MappedFile(size, limit, mmap.MADV_RANDOM if name == "mmap-random" else mmap.MADV_NORMAL)
    stack.callback(mapped.close)
    return mapped


class _NoSwapError(Exception):
    pass

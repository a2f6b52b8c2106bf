"""What eviction policies cost on the live system, beside what the simulator says of the same accesses.

    zipf       pages by Zipf's law, exponent 0.99
    hot-scan   every other page from a hot tenth, the others scan the rest in a loop
    loop       one loop over everything
    sort       array.sort() of all words, mixed up
    pagerank   rounds of rank'[v] = the mean of rank over 16 neighbours of v, popular vertices in most lists

The first three are lists of pages that a C loop touches.  Sort and PageRank are NumPy programs; what they touch is
recorded first (`record.file`), with so little local memory that nearly every change of page is a fault.  Each runs with
25 and 50 % of its pages local, read-ahead off, everything in the store at the start, under FIFO and under the default
policy.  `simulated` is the simulator's run of a service with the same configuration over the list or recording
(`dmh.simulate.live`), where faults come as fast as they did live; `ideal` its plain replay, in which the policy has all
of memory.limit, page by page, and marks are made at once.

Figures are hard faults a thousand accesses, and of each live run the faults that waited for an eviction, a thousand
faults.  The last lines are the geometric means over all cases, and how far the live figures are from the simulated ones
at most.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dmh.bench.rows import Progress, Row, waits
from dmh.bench.subject import MismatchError, Options, service, settings
from dmh.bench.work import address, touch_at
from dmh.config.model import Config, EvictorConfig
from dmh.evict.policies import policy_class
from dmh.observe.trace import read_trace
from dmh.region.region import Region
from dmh.simulate.generators import make_trace
from dmh.simulate.live import Pace, Setting, replay_live
from dmh.simulate.replay import Outcome, replay

PAGES, QUICK_PAGES = 4096, 512
SHARES = (0.25, 0.5)
ACCESSES = 16
"""A page, on average, of the lists."""
RECORDING_SHARE = 1 / 16
NEIGHBOURS, ROUNDS = 16, 3

Words = npt.NDArray[np.uint64]
Trace = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Workload:
    """Something that uses pages.

    Attributes:
        pages: of its array.
        fill: puts content into the array.
        run: uses it.
        accesses: the pages that `run` uses, in order; None: to be recorded.
    """

    name: str
    pages: int
    fill: Callable[[Words], None]
    run: Callable[[Words], None]
    accesses: Trace | None = None


def run(options: Options, progress: Progress) -> list[Row]:
    """Rows of every workload."""
    pages = QUICK_PAGES if options.quick else PAGES
    rows: list[Row] = []
    ratios: dict[str, list[float]] = {}
    default = _default_policy()
    for workload in workloads(pages, options.page_size):
        if options.quick and workload.name != "zipf":
            continue
        accesses = workload.accesses
        if accesses is None:
            progress(f"policies {workload.name}: recording")
            accesses = record(options, workload)
        for share in SHARES[-1:] if options.quick else SHARES:
            case = f"{workload.name} {share:.0%}"
            found: dict[str, float] = {}
            for subject, policy in (("fifo", "fifo"), ("default", default)):
                progress(f"policies {case}: {policy}")
                live = measure(options, workload, share, policy)
                found[subject] = 1000 * live.hard / len(accesses)
                setting = Setting.of(configuration(options, workload, share, policy), live.idle)
                for name, outcome in (
                    ("simulated", simulate(accesses, workload.pages, policy, setting, live.pace)),
                    ("ideal", idealise(accesses, workload.pages, policy, setting)),
                ):
                    found[f"{subject}, {name}"] = outcome.per_thousand(outcome.hard)
                rows.append(waits("policies", case, subject, live.waits, live.faults, options.runs))
            rows += [
                _row(case, name, "hard faults a 1000 accesses", value, found["fifo"]) for name, value in found.items()
            ]
            for subject in ("fifo", "default"):
                ratios.setdefault(f"{subject} / simulated", []).append(found[subject] / found[f"{subject}, simulated"])
            ratios.setdefault("default / fifo", []).append(found["default"] / found["fifo"])
    for name, values in ratios.items():
        rows.append(_row("all", name, "hard faults, geometric mean", float(np.exp(np.mean(np.log(values))))))
        if name.endswith("simulated"):
            furthest = max(abs(np.log(values)))
            rows.append(_row("all", name, "hard faults, times apart at most", float(np.exp(furthest))))
    return rows


def _row(case: str, subject: str, metric: str, value: float, fifo: float | None = None) -> Row:
    ratio = None if fifo is None or subject == "fifo" else value / fifo
    return Row("policies", case, subject, metric, "", value, value, 1, ratio, None if ratio is None else "fifo")


def _default_policy() -> str:
    return EvictorConfig().policy


# ---- running live


@dataclass(frozen=True, slots=True)
class Live:
    """Counts of one live run, its idle source, and how long it took."""

    hard: int
    faults: int
    waits: int
    idle: str
    seconds: float

    @property
    def pace(self) -> Pace:
        """As fast as faults came here; what the program did between them is in it."""
        return Pace(use=0.0, hard=1e6 * self.seconds / max(self.hard, 1))


def measure(options: Options, workload: Workload, share: float, policy: str) -> Live:
    """Run a workload with a share of its pages local."""
    with _filled(options, workload, share, f"evictor.policy={policy}") as (region, array):
        before, began = region.stats(), time.monotonic()
        workload.run(array)
        seconds = time.monotonic() - began
        after = region.stats()
    counts = {name: after.counters[name] - before.counters[name] for name in ("hard", "faults", "room_waits")}
    return Live(counts["hard"], counts["faults"], counts["room_waits"], after.idle, seconds)


def record(options: Options, workload: Workload) -> Trace:
    """The pages that a program uses, as recorded with little local memory."""
    share = max(RECORDING_SHARE, 16 / workload.pages)
    with tempfile.TemporaryDirectory(prefix="dmh-bench-") as directory:
        path = Path(directory) / "trace"
        with _filled(options, workload, share, "evictor.policy=fifo", f"record.file={path}") as (region, array):
            first = region.offset_of(array) // options.page_size
            began = region.stats().counters["faults"]
            workload.run(array)
        return (read_trace(path).accesses()[began:] - first).astype(np.uint64)


@contextmanager
def _filled(options: Options, workload: Workload, share: float, *more: str) -> Iterator[tuple[Region, Words]]:
    size, limit = _sizes(options, workload, share)
    with service(options, size=size, limit=limit, prefetch=False, more=more) as region:
        array = region.empty(workload.pages * options.page_size // 8, "u8")
        workload.fill(array)
        region.evict(array)
        yield region, array


def _sizes(options: Options, workload: Workload, share: float) -> tuple[int, int]:
    """Bytes of the region, and of the memory for it."""
    return 2 * workload.pages * options.page_size, int(workload.pages * share) * options.page_size


def configuration(options: Options, workload: Workload, share: float, policy: str) -> Config:
    """What `measure` runs with."""
    size, limit = _sizes(options, workload, share)
    return settings(
        options, Path("/"), size=size, limit=limit, prefetch=False, more=[f"evictor.policy={policy}"]
    )  # fmt: skip


def simulate(accesses: Trace, pages: int, policy: str, setting: Setting, pace: Pace) -> Outcome:
    """The same accesses in a simulated service, which begins as the live one does: filled, and all of it evicted."""
    made = policy_class(policy)(pages, setting.reckoned, accessed=setting.accessed)
    return replay_live(made, accesses, pages, setting, pace, filled=True)


def idealise(accesses: Trace, pages: int, policy: str, setting: Setting) -> Outcome:
    """The same accesses where the policy has all of the memory."""
    limit = setting.limits.limit
    return replay(policy_class(policy)(pages, limit, accessed=setting.accessed), accesses, pages, limit)


# ---- the workloads


def workloads(pages: int, page_size: int) -> Iterator[Workload]:
    """All of them, over about so many pages."""
    for name, trace in (("zipf", "zipf"), ("hot-scan", "scan-with-hot-set"), ("loop", "loop")):
        accesses = make_trace(trace, pages)[: ACCESSES * pages]
        yield Workload(name, pages, _mixed, _toucher(accesses, page_size), accesses)
    yield Workload("sort", pages, _mixed, _sort)
    yield page_rank(pages, page_size)


def _mixed(array: Words) -> None:
    step = 1 << 16
    for first in range(0, len(array), step):
        numbers = np.arange(first, min(first + step, len(array)), dtype=np.uint64)
        array[first : first + step] = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)


def _toucher(accesses: Trace, page_size: int) -> Callable[[Words], None]:
    offsets = accesses * np.uint64(page_size)

    def run(array: Words) -> None:
        touch_at(address(array), offsets)

    return run


def _sort(array: Words) -> None:
    array.sort()
    for first in range(0, len(array) - 1, 1 << 16):
        part = array[first : first + (1 << 16) + 1]
        if (part[:-1] > part[1:]).any():
            raise MismatchError("what was sorted is not in order: pages came back with other bytes")


def page_rank(pages: int, page_size: int) -> Workload:
    """Ranks of vertices, 8 bytes each, two arrays; neighbours, 8 bytes each."""
    words = page_size // 8
    vertices = pages * words // (NEIGHBOURS + 2)
    vertices -= vertices % words
    weights = np.cumsum(1.0 / np.arange(1, vertices + 1) ** 0.9)

    def fill(array: Words) -> None:
        rng = np.random.default_rng(5)
        array[: 2 * vertices] = 1 << 32
        # Popular vertices are neighbours in memory, as where a graph is ordered by degree.
        for first in range(0, vertices, 4096):
            n = min(4096, vertices - first)
            picked = np.searchsorted(weights, rng.random(n * NEIGHBOURS) * weights[-1])
            at = 2 * vertices + first * NEIGHBOURS
            array[at : at + n * NEIGHBOURS] = np.minimum(picked, vertices - 1)

    def run(array: Words) -> None:
        here, there = array[:vertices], array[vertices : 2 * vertices]
        edges = array[2 * vertices : (2 + NEIGHBOURS) * vertices]
        for _ in range(ROUNDS):
            for first in range(0, vertices, 256):
                n = min(256, vertices - first)
                near = edges[first * NEIGHBOURS : (first + n) * NEIGHBOURS]
                there[first : first + n] = here[near].reshape(n, NEIGHBOURS).sum(axis=1) // NEIGHBOURS
            here, there = there, here

    return Workload("pagerank", pages, fill, run)

"""The classic access patterns as traces of page numbers.

Pure: a generator makes an array from a number of pages and a random generator, so the same seed makes the same trace.
`GENERATORS` has them by name; `make_trace` is what the simulator calls.  Each generator's docstring says what program
behaves so.  Page numbers lie below `pages`; a page that is used several times in a row appears once, as it would in a
trace of page faults with infinite resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

Trace = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]
Random = np.random.Generator
Generator = Callable[[int, Random], "Indices"]

GENERATORS: dict[str, Generator] = {}
LENGTH = 24
"""About how often a trace uses each page, on average."""


def make_trace(name: str, pages: int, seed: int = 0) -> Trace:
    """The trace of a generator over `pages` pages."""
    trace = GENERATORS[name](pages, np.random.default_rng([seed, *name.encode()]))
    keep = np.ones(len(trace), bool)
    keep[1:] = trace[1:] != trace[:-1]
    return trace[keep].astype(np.uint64)


def _generator(make: Generator) -> Generator:
    GENERATORS[make.__name__.replace("_", "-")] = make
    return make


def _zipf(n: int, count: int, skew: float, rng: Random) -> Indices:
    """`count` draws from n items, item k with weight 1 / (k + 1)^skew, in an order that has nothing to do with k."""
    weights = np.cumsum(1.0 / np.arange(1, n + 1) ** skew)
    ranks = np.searchsorted(weights, rng.random(count) * weights[-1])
    items: Indices = rng.permutation(n)[np.minimum(ranks, n - 1)]
    return items


def _interleave(*streams: Indices) -> Indices:
    """One element of each in turn, as long as the shortest lasts."""
    n = min(map(len, streams))
    return np.stack([stream[:n] for stream in streams], axis=1).ravel()


def _join(parts: Iterator[Indices] | list[Indices], most: int) -> Indices:
    """Parts one after another, until there are enough."""
    taken: list[Indices] = []
    total = 0
    for part in parts:
        taken.append(part)
        total += len(part)
        if total >= most:
            break
    return np.concatenate(taken)[:most]


# ---- popularity ----


@_generator
def zipf(pages: int, rng: Random) -> Indices:
    """A key-value cache: popularity by Zipf's law, 0.99."""
    return _zipf(pages, LENGTH * pages, 0.99, rng)


@_generator
def zipf_flat(pages: int, rng: Random) -> Indices:
    """The same, less skewed: 0.7."""
    return _zipf(pages, LENGTH * pages, 0.7, rng)


@_generator
def zipf_steep(pages: int, rng: Random) -> Indices:
    """The same, more skewed: 1.2."""
    return _zipf(pages, LENGTH * pages, 1.2, rng)


@_generator
def uniform(pages: int, rng: Random) -> Indices:
    """A hash table that fills everything: each page as likely as any other."""
    return rng.integers(0, pages, LENGTH * pages)


@_generator
def hot_cold(pages: int, rng: Random) -> Indices:
    """A tenth of the pages takes nine tenths of the uses."""
    hot = rng.integers(0, pages // 10, LENGTH * pages)
    cold = rng.integers(pages // 10, pages, LENGTH * pages)
    return np.where(rng.random(LENGTH * pages) < 0.9, hot, cold)


# ---- loops and scans ----


@_generator
def loop(pages: int, rng: Random) -> Indices:
    """One loop over everything, again and again: LRU's worst."""
    return np.tile(np.arange(pages), LENGTH)


@_generator
def loop_nest(pages: int, rng: Random) -> Indices:
    """An outer loop over blocks, each gone over four times before the next."""
    blocks = np.array_split(np.arange(pages), 8)
    return np.tile(np.concatenate([np.tile(block, 4) for block in blocks]), LENGTH // 4)


@_generator
def loops_of_three_sizes(pages: int, rng: Random) -> Indices:
    """Three programs, each with a loop of its own (1/10, 3/10 and 6/10 of the pages), taking turns use by use."""
    a, b = pages // 10, 4 * pages // 10
    streams = [np.resize(np.arange(*part), LENGTH * pages // 3) for part in ((0, a), (a, b), (b, pages))]
    return _interleave(*streams)


@_generator
def sawtooth(pages: int, rng: Random) -> Indices:
    """Forwards and backwards by turns: LRU's best."""
    up = np.arange(pages)
    return np.tile(np.concatenate([up, up[::-1]]), LENGTH // 2)


@_generator
def scan_with_hot_set(pages: int, rng: Random) -> Indices:
    """Every other use goes to a hot tenth by Zipf's law, the others scan the rest in a loop."""
    hot = pages // 10
    count = LENGTH * pages // 2
    return _interleave(_zipf(hot, count, 0.8, rng), np.resize(np.arange(hot, pages), count))


@_generator
def zipf_with_scans(pages: int, rng: Random) -> Indices:
    """A database: Zipf look-ups, and now and then a scan over everything (a report, a backup)."""
    parts = [p for _ in range(6) for p in (_zipf(pages, 3 * pages, 0.99, rng), np.arange(pages))]
    order = rng.permutation(pages)
    return np.concatenate([p if i % 2 else order[p] for i, p in enumerate(parts)])


@_generator
def triad(pages: int, rng: Random) -> Indices:
    """STREAM: a = b + s c, three arrays in step."""
    n = pages // 3
    sweep = _interleave(np.arange(n), np.arange(n, 2 * n), np.arange(2 * n, 3 * n))
    return np.tile(sweep, LENGTH)


@_generator
def stencil(pages: int, rng: Random) -> Indices:
    """A five-point stencil: each row with its two neighbours, from one grid to the other."""
    n = pages // 2
    row = np.arange(1, n - 1)
    there = _interleave(row - 1, row, row + 1, n + row)
    back = _interleave(n + row - 1, n + row, n + row + 1, row)
    return np.tile(np.concatenate([there, back]), LENGTH // 8 + 1)


# ---- change ----


@_generator
def phases(pages: int, rng: Random) -> Indices:
    """Eight phases, each uniform over its own eighth and a little of the rest."""
    return np.concatenate([
        np.where(rng.random(3 * pages) < 0.95, k * (pages // 8) + rng.integers(0, pages // 8, 3 * pages),
                 rng.integers(0, pages, 3 * pages))
        for k in rng.permutation(8)
    ])  # fmt: skip


@_generator
def phases_of_zipf(pages: int, rng: Random) -> Indices:
    """Zipf, whose popular pages become others six times."""
    return np.concatenate([_zipf(pages, 4 * pages, 0.99, rng) for _ in range(6)])


@_generator
def phases_of_loops(pages: int, rng: Random) -> Indices:
    """Loops over random parts of 20 to 60 % of the pages, each for a while."""

    def parts() -> Iterator[Indices]:
        while True:
            size = int(pages * rng.uniform(0.2, 0.6))
            yield np.tile((np.arange(size) + rng.integers(pages)) % pages, int(rng.integers(3, 9)))

    return _join(parts(), LENGTH * pages)


@_generator
def drift(pages: int, rng: Random) -> Indices:
    """A working set of a fifth of the pages that slides along."""
    count = LENGTH * pages
    at = np.linspace(0, 2 * pages, count).astype(np.int64)
    trace: Indices = (at + rng.integers(0, pages // 5, count)) % pages
    return trace


@_generator
def latest(pages: int, rng: Random) -> Indices:
    """A log or a feed: what was written last is read most (YCSB's D)."""
    count = LENGTH * pages
    ago = np.minimum(rng.zipf(1.3, count), pages) - 1
    head = np.arange(count) // 8
    trace: Indices = (head - ago) % pages
    return trace


@_generator
def stack_distances(pages: int, rng: Random) -> Indices:
    """LRU's own model: the page used k uses ago, k log-normal."""
    stack = list(range(pages))
    depths = np.minimum(rng.lognormal(np.log(pages / 16), 1.5, LENGTH * pages).astype(int), pages - 1)
    out = np.empty(len(depths), np.int64)
    for i, depth in enumerate(depths.tolist()):
        page = stack.pop(-1 - depth)
        stack.append(page)
        out[i] = page
    return out


# ---- algorithms ----


@_generator
def merge_sort(pages: int, rng: Random) -> Indices:
    """Bottom-up: every pass reads two runs in step and writes to the other half."""
    n = pages // 2

    def passes() -> Iterator[Indices]:
        here, there, run = 0, n, 1
        while True:
            if run >= n:
                run = 1
            begin = np.arange(0, n)
            pair = begin // (2 * run) * 2 * run
            step = begin - pair
            left = np.minimum(pair + step // 2, n - 1)
            right = np.minimum(pair + run + step // 2, n - 1)
            yield _interleave(here + np.where(step % 2, right, left), there + begin)
            here, there, run = there, here, run * 2

    return _join(passes(), LENGTH * pages)


@_generator
def quick_sort(pages: int, rng: Random) -> Indices:
    """Partition from both ends, then each part, down to a page."""

    def visits() -> Iterator[Indices]:
        while True:
            todo = [(0, pages)]
            while todo:
                low, high = todo.pop()
                if high - low < 2:
                    continue
                span = np.arange(low, high)
                half = (len(span) + 1) // 2
                yield _interleave(span[:half], span[::-1][:half])
                middle = low + int((high - low) * rng.uniform(0.3, 0.7))
                todo += [(middle, high), (low, middle)]

    return _join(visits(), LENGTH * pages)


@_generator
def fft(pages: int, rng: Random) -> Indices:
    """Butterflies: pairs at distances that double from pass to pass."""
    bits = int(np.log2(pages))
    index = np.arange(1 << bits)
    sweeps = [_interleave(low := index[(index >> b) & 1 == 0], low | 1 << b) for b in range(bits)]
    return _join((sweeps[k % bits] for k in range(1000)), LENGTH * pages)


def _square(pages: int) -> int:
    return max(int(np.sqrt(pages / 3)), 4)


@_generator
def matmul(pages: int, rng: Random) -> Indices:
    """C = A B by rows and columns: a row of A and all of B for each row of C."""
    n = _square(pages)
    j = np.repeat(np.arange(n), n)
    k = np.tile(np.arange(n), n)
    rows = (_interleave(i * n + k, n * n + k * n + j, 2 * n * n + i * n + j) for i in range(n))
    return _join(rows, LENGTH * pages)


@_generator
def matmul_tiled(pages: int, rng: Random) -> Indices:
    """The same in tiles of a fifth of the rows."""
    n = _square(pages)
    tile = max(n // 5, 1)
    within = np.arange(tile)
    i, k, j = (x.ravel() for x in np.meshgrid(within, within, within, indexing="ij"))

    def tiles() -> Iterator[Indices]:
        while True:
            for ti in range(0, n - tile + 1, tile):
                for tj in range(0, n - tile + 1, tile):
                    for tk in range(0, n - tile + 1, tile):
                        a = (ti + i) * n + tk + k
                        b = n * n + (tk + k) * n + tj + j
                        c = 2 * n * n + (ti + i) * n + tj + j
                        yield _interleave(a, b, c)

    return _join(tiles(), LENGTH * pages)


@_generator
def kmeans(pages: int, rng: Random) -> Indices:
    """All points in a loop, each with one of the few pages of centroids."""
    centroids = max(pages // 50, 1)
    points = np.tile(np.arange(centroids, pages), LENGTH // 2)
    return _interleave(points, rng.integers(0, centroids, len(points)))


@_generator
def histogram(pages: int, rng: Random) -> Indices:
    """A scan of the input; for each page some bins, of which some are popular."""
    bins = pages // 4
    scan = np.tile(np.arange(bins, pages), LENGTH // 4)
    return _interleave(scan, *(_zipf(bins, len(scan), 0.6, rng) for _ in range(3)))


# ---- graphs and databases ----


@_generator
def page_rank(pages: int, rng: Random) -> Indices:
    """Edges in order, ranks of the vertices that they lead to: a loop with Zipf beside it."""
    vertices = pages // 4
    edges = np.arange(vertices, pages)
    targets = _zipf(vertices, 2 * len(edges), 0.9, rng)
    sweep = _interleave(edges, targets[::2], targets[1::2])
    return _join((sweep for _ in range(1000)), LENGTH * pages)


@_generator
def breadth_first(pages: int, rng: Random) -> Indices:
    """Breadth-first searches of a random graph from different roots: every page once a search, in other orders."""
    near = (np.arange(pages)[:, None] + rng.integers(-20, 21, (pages, 3))) % pages
    far = rng.integers(0, pages, (pages, 1))
    neighbours = np.hstack([near, far]).tolist()

    def searches() -> Iterator[Indices]:
        while True:
            root = int(rng.integers(pages))
            seen, order, at = {root}, [root], 0
            visits: list[int] = []
            while at < len(order):
                page = order[at]
                at += 1
                visits.append(page)
                for other in neighbours[page]:
                    visits.append(other)
                    if other not in seen:
                        seen.add(other)
                        order.append(other)
            yield np.array(visits)

    return _join(searches(), LENGTH * pages)


@_generator
def random_walk(pages: int, rng: Random) -> Indices:
    """A walk along links that mostly lead nearby."""
    steps = np.where(rng.random(LENGTH * pages) < 0.02, rng.integers(0, pages, LENGTH * pages),
                     rng.integers(-8, 9, LENGTH * pages))  # fmt: skip
    trace: Indices = np.cumsum(steps) % pages
    return trace


@_generator
def hash_join(pages: int, rng: Random) -> Indices:
    """Build a hash table from one relation, then probe it with another, popular keys more often; several joins."""
    table, build = pages // 3, pages // 6

    def joins() -> Iterator[Indices]:
        while True:
            inner = np.arange(table, table + build)
            yield _interleave(inner, rng.integers(0, table, len(inner)), rng.integers(0, table, len(inner)))
            outer = np.arange(table + build, pages)
            yield _interleave(outer, *(_zipf(table, len(outer), 0.7, rng) for _ in range(4)))

    return _join(joins(), LENGTH * pages)


@_generator
def loop_join(pages: int, rng: Random) -> Indices:
    """Blocks of the outer relation, all of the inner one for each."""
    outer, inner = np.array_split(np.arange(pages // 3), 12), np.arange(pages // 3, pages)
    sweep = np.concatenate([np.concatenate([block, inner]) for block in outer])
    return _join((sweep for _ in range(1000)), LENGTH * pages)


@_generator
def btree(pages: int, rng: Random) -> Indices:
    """Look-ups in a B-tree with a fan-out of 32: the root, two levels of inner pages, leaves by Zipf's law."""
    upper, middle = 1, max(pages // 32, 1)
    leaves = pages - upper - middle
    leaf = _zipf(leaves, LENGTH * pages // 3, 0.8, rng)
    return _interleave(np.zeros(len(leaf), np.int64), upper + leaf * middle // leaves, upper + middle + leaf)


@_generator
def btree_ranges(pages: int, rng: Random) -> Indices:
    """Range queries in it: down to a leaf, then along 20 leaves."""
    middle = max(pages // 32, 1)
    leaves = pages - 1 - middle
    starts = _zipf(leaves, LENGTH * pages // 22, 0.8, rng)
    along = np.minimum(starts[:, None] + np.arange(20), leaves - 1)
    inner = 1 + starts[:, None] * middle // leaves
    return np.hstack([np.zeros_like(inner), inner, 1 + middle + along]).ravel()


@_generator
def mark_and_sweep(pages: int, rng: Random) -> Indices:
    """A collector: a program's Zipf uses, then marking in a random order, then a sweep in address order."""
    return np.concatenate([
        part for _ in range(4) for part in (_zipf(pages, 4 * pages, 0.9, rng), rng.permutation(pages), np.arange(pages))
    ])  # fmt: skip

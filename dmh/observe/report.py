"""The figures of a service at one moment, as programs get them and as people read them.

Owns the snapshot and its rendering.  Counting happens where things happen (native code and workers); names are
`dmh.observe.names`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dmh.lspt.table import Table


@dataclass(slots=True)
class Snapshot:
    """Figures of one moment.  Pages unless said otherwise.

    Attributes:
        name: the service.
        seconds: since it started.
        page_size: bytes a page.
        pages: of the region.
        limit: local pages allowed (memory.limit).
        high, low: LPET's thresholds.
        resident: in the region's memory now (or promised to a page that is coming in).
        staged: in the victim buffer now.
        slots: the victim buffer's size.
        pinned: kept resident by a pin.
        allocated: handed out to arrays.
        programs: that have the region mapped.
        writers: of them, those that can write to it.
        states: pages in each state.
        counters: see `dmh.observe.names.COUNTERS`.
        policy, idle: the eviction policy, and the source that says whether a page was used.
        reserve: room that LPET keeps free now.
        fault_us: p50, p90, p99 in µs from receipt of a fault to its page's installation, as upper bounds of powers of
        two.
        store: what the store says of itself.
    """

    name: str
    seconds: float
    page_size: int
    pages: int
    limit: int
    high: int
    low: int
    resident: int
    staged: int
    slots: int
    pinned: int
    allocated: int
    programs: int
    states: dict[str, int]
    counters: dict[str, int]
    fault_us: dict[str, float]
    store: dict[str, Any] = field(default_factory=dict)
    policy: str = ""
    idle: str = ""
    reserve: int = 0
    writers: int = 0

    @classmethod
    def take(
        cls,
        table: Table,
        *,
        name: str,
        programs: int,
        limit: int,
        allocated: int,
        seconds: float,
        store: dict[str, Any],
        writers: int = 0,
        policy: str = "",
        idle: str = "",
    ) -> Snapshot:
        """Read the shared table."""
        raw = table.raw
        return cls(
            name=name,
            seconds=round(seconds, 3),
            page_size=table.page_size,
            pages=table.pages,
            limit=limit,
            high=int(raw.high),
            low=int(raw.low),
            resident=table.resident,
            staged=table.staged,
            slots=table.slots,
            pinned=int(raw.pinned),
            allocated=allocated,
            programs=programs,
            states={state.name.lower(): n for state, n in table.states().items()},
            counters=table.counters(),
            fault_us=percentiles(table.fault_times()),
            store=store,
            policy=policy,
            idle=idle,
            writers=writers,
            reserve=max(int(raw.resident_max) - int(raw.high), 0),
        )

    def to_wire(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Snapshot:
        """The inverse of `to_wire`."""
        return cls(**wire)


def percentiles(histogram: npt.NDArray[np.uint64]) -> dict[str, float]:
    """p50, p90 and p99 in µs of a histogram over powers of two of nanoseconds; empty where nothing was counted."""
    total = int(histogram.sum())
    if not total:
        return {}
    reached = np.cumsum(histogram)
    return {
        f"p{share}": round(2.0 ** (int(np.searchsorted(reached, total * share / 100)) + 1) / 1000, 1)
        for share in (50, 90, 99)
    }


_GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "faults",
        ("messages", "faults", "zero", "soft", "hard", "inline", "duplicates", "dropped", "woken", "room_waits"),
    ),
    ("coming in", ("prefetched", "prefetched_new", "fetch_calls", "fetched_bytes")),
    (
        "going out",
        (
            "rings",
            "runs",
            "evicted",
            "marked",
            "found_used",
            "mark_us",
            "clean",
            "zeroed",
            "dropped_clean",
            "written",
            "written_bytes",
            "write_calls",
            "taken_back",
        ),
    ),
    ("other", ("discarded", "deleted", "store_retries", "poisoned", "withheld", "healed", "intruded", "refused")),
)


def rows(snapshot: Snapshot) -> list[tuple[str, str, str]]:
    """(group, what, figure) lines of a snapshot for people; counters that are zero are left out of the last group."""
    page = snapshot.page_size

    def pages(n: int) -> str:
        return f"{n:,} pages, {n * page / 2**20:,.1f} MiB"

    out = [
        (
            "memory",
            "resident",
            f"{pages(snapshot.resident)} of {pages(snapshot.limit)} ({snapshot.resident / snapshot.limit:.0%})",
        ),
        ("memory", "staged", f"{snapshot.staged:,} of {snapshot.slots:,} slots"),
        (
            "memory",
            "region",
            f"{pages(snapshot.pages)}, {snapshot.allocated / snapshot.pages:.0%} allocated, {snapshot.programs} "
            f"programs, {snapshot.writers} that can write",
        ),
        ("memory", "stored", pages(snapshot.states.get("stored", 0))),
    ]
    if snapshot.policy:
        kept = f"{snapshot.reserve:,} pages kept free"
        out.append(("memory", "evictor", f"policy {snapshot.policy}, use told by {snapshot.idle}, {kept}"))
    if snapshot.pinned:
        out.append(("memory", "pinned", pages(snapshot.pinned)))
    if snapshot.fault_us:
        times = ", ".join(f"{name} < {value:g} µs" for name, value in snapshot.fault_us.items())
        out.append(("faults", "received to installed", times))
    for group, names in _GROUPS:
        for name in names:
            value = snapshot.counters.get(name, 0)
            if value or group not in ("other",):
                text = f"{value / 2**20:,.1f} MiB" if name.endswith("_bytes") else f"{value:,}"
                out.append((group, shown(name), text))
    out += [
        ("store", name, f"{value:,}" if isinstance(value, int) else str(value))
        for name, value in snapshot.store.items()
    ]
    return out


def rates(now: Snapshot, before: Snapshot) -> dict[tuple[str, bool], str]:
    """What each counter has gained a second: (its name as `rows` shows it, whether it counts bytes) -> figure.

    Those that stand still are left out.
    """
    seconds = max(now.seconds - before.seconds, 1e-3)
    gained = {name: (value - before.counters.get(name, 0)) / seconds for name, value in now.counters.items()}
    return {
        (shown(name), name.endswith("_bytes")): f"{gain / 2**20:,.1f} MiB"
        if name.endswith("_bytes")
        else f"{gain:,.0f}"
        for name, gain in gained.items()
        if gain
    }


def shown(counter: str) -> str:
    """A counter's name for people."""
    return counter.removesuffix("_bytes").replace("_", " ")

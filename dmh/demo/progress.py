"""What is known of a running demo at one moment: the phases as the program tells them, and memory as it is observed.

Pure: takes lines and figures, reads no clock and draws nothing.  `dmh.cli.demo` feeds it, `dmh.demo.display` shows it.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field

MEGABYTE = 1e6
RATE_SECONDS = 1.0
PHASES = ("fill", "checksum", "random updates", "verify updates", "sort", "verify sort")


@dataclass(frozen=True, slots=True)
class Job:
    """What is going to be done.

    Attributes:
        array: bytes of the array.
        limit: bytes of memory.limit.
        page_size: bytes a page.
        updates: how many random updates.
        seed: of all numbers.
        place: where the pages go, for people.
    """

    array: int
    limit: int
    page_size: int
    updates: int
    seed: int
    place: str


@dataclass(slots=True)
class Phase:
    """One phase.

    Attributes:
        state: "waiting", "running" or "done".
        fraction: done of it; None where the phase does not tell.
        seconds: it has taken, when done.
        counters: what dmh counted meanwhile, when done.
    """

    name: str
    state: str = "waiting"
    fraction: float | None = None
    began: float = 0.0
    seconds: float = 0.0
    counters: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Wrong:
    """An element that is not what it must be."""

    phase: str
    index: int
    expected: int
    got: int


@dataclass(frozen=True, slots=True)
class Rates:
    """Faults, and bytes read from and written to the store, a second."""

    faults: float = 0.0
    fetched: float = 0.0
    written: float = 0.0


class Progress:
    """The demo so far.

    Attributes:
        phases: in the order of the program.
        resident: bytes of memory that the region has now.
        highest: the most it was ever seen to have.
        wrong: what the verification found, if it did.
        verified: the program has said that every byte was right.
    """

    def __init__(self) -> None:
        self.phases = [Phase(name) for name in PHASES]
        self.resident = 0
        self.highest = 0
        self.wrong: Wrong | None = None
        self.verified = False
        self._samples: deque[tuple[float, dict[str, int]]] = deque()

    @property
    def current(self) -> Phase | None:
        """The phase that runs."""
        return next((phase for phase in self.phases if phase.state == "running"), None)

    def told(self, line: bytes, now: float) -> Phase | None:
        """Take in a line of the program; returns the phase that has ended with it."""
        facts = json.loads(line)
        phase = self.current
        if "began" in facts:
            phase = next(p for p in self.phases if p.name == facts["began"])
            phase.state, phase.began = "running", now
        elif "verified" in facts:
            self.verified = self.wrong is None and all(p.state == "done" for p in self.phases)
        elif phase is not None and "fraction" in facts:
            phase.fraction = facts["fraction"]
        elif phase is not None and "ended" in facts:
            phase.state, phase.fraction = "done", 1.0
            phase.seconds, phase.counters = facts["seconds"], facts["counters"]
            return phase
        elif phase is not None and "mismatch" in facts:
            self.wrong = Wrong(phase.name, facts["mismatch"], facts["expected"], facts["got"])
        return None

    def memory(self, resident: int) -> None:
        """Take in how many bytes the region has now."""
        self.resident = resident
        self.highest = max(self.highest, resident)

    def counted(self, counters: dict[str, int], now: float) -> None:
        """Take in the service's counters of this moment."""
        self._samples.append((now, counters))
        while len(self._samples) > 2 and now - self._samples[1][0] >= RATE_SECONDS:
            self._samples.popleft()

    def rates(self) -> Rates:
        """Over the last second or so."""
        if len(self._samples) < 2:
            return Rates()
        (start, old), (end, new) = self._samples[0], self._samples[-1]
        seconds = max(end - start, 1e-3)
        return Rates(*((new[name] - old[name]) / seconds for name in ("faults", "fetched_bytes", "written_bytes")))

    def total(self) -> Phase:
        """All phases that are done, as one."""
        done = [phase for phase in self.phases if phase.state == "done"]
        counters: dict[str, int] = {}
        for phase in done:
            for name, value in phase.counters.items():
                counters[name] = counters.get(name, 0) + value
        return Phase("total", "done", 1.0, 0.0, sum(phase.seconds for phase in done), counters)

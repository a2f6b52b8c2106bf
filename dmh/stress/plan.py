"""What a stress run is going to do: its options, and which pages and words belong to whom.  Pure.

The first half of the region is everybody's: each thread of each program has every n-th word of every page there, so
pages are shared and words are not.  The rest is divided among the threads, for what needs pages of one's own:
discarding.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from dmh.errors import RegionError


@dataclass(frozen=True, slots=True)
class Plan:
    """Options of one run.

    Attributes:
        seconds: of random work, before the verifying scan.
        processes: programs.
        threads: of each program.
        kill_rate: SIGKILLs of workers a second, on average.
        kill_store: kill, or pause, the store's server now and then, too.
        seed: of all random numbers.
        patience: seconds without progress of a thread, or of anything else, that count as a hang.
        page_size: bytes.
        pages: of the region.
        pin_pages: that one thread may pin at a time (0: none).
        system_calls: let system calls touch absent pages, too.
    """

    seconds: float
    processes: int
    threads: int
    kill_rate: float
    kill_store: bool
    seed: int
    patience: float
    page_size: int
    pages: int
    pin_pages: int
    system_calls: bool

    def __post_init__(self) -> None:
        if self.pages < 2 * self.lanes:
            raise RegionError(
                f"{self.processes} processes of {self.threads} threads need a region of {2 * self.lanes} pages, "
                f"and this one has {self.pages}: make --size larger"
            )
        if self.lanes > self.page_size // 8:
            raise RegionError(f"more than {self.page_size // 8} threads in all find no word of their own in a page")

    @property
    def lanes(self) -> int:
        """Threads in all."""
        return self.processes * self.threads

    @property
    def shared(self) -> int:
        """Pages that all threads have words in: 0 .. shared - 1."""
        return self.pages - self.own * self.lanes

    @property
    def own(self) -> int:
        """Pages that each thread has for itself, behind the shared ones, in the order of their lanes."""
        return max(1, self.pages // 2 // self.lanes)

    @property
    def shadow_bytes(self) -> int:
        """Ordinary memory for the shadows of all programs."""
        return self.pages * self.page_size // 4

    def to_wire(self) -> str:
        """For a program's command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_wire(cls, text: str) -> Plan:
        """The inverse of `to_wire`."""
        return cls(**json.loads(text))

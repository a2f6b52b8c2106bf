"""One program of a stress run, ``python -m dmh.stress.program PLAN NUMBER``: joins the service that DMH_SOCKET names.

Owns the threads, their shadows, and what they ask of the region between two bursts of reads and writes.  Tells what it
does as JSON lines on standard output and waits for a line on standard input between the phases (attached, ran,
verified), so that the run can look at the service while nothing happens.  Never touches the region from Python: a
fault would hold the interpreter lock.
"""

from __future__ import annotations

import functools
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

import dmh
from dmh.errors import RegionError
from dmh.native import ffi, lib
from dmh.region.region import Region
from dmh.stress.plan import Plan

BURST = 60
"""Operations between two requests: short enough for many requests, long enough that they do not rule."""
LARGEST_REQUEST = 64
REPORT_SECONDS = 0.25


class Part:
    """The words of one thread in a run of pages, and their shadow."""

    def __init__(
        self, region: Region, plan: Plan, first: int, pages: int, lane: int, lanes: int, scratch_fd: int
    ) -> None:
        self.first, self.pages = first, pages
        size = plan.page_size
        self.bytes: npt.NDArray[np.uint8] = region.ndarray((pages * size,), np.uint8, first * size)
        self.versions = np.zeros((pages, -(-(size // 8) // lanes)), np.uint16)
        self.state: Any = ffi.new("struct dmh_stress *")
        self.state.base = ffi.cast("uint8_t *", self.bytes.ctypes.data)
        self.state.versions = ffi.from_buffer("uint16_t[]", self.versions)
        self.state.first, self.state.pages, self.state.page_size = first, pages, size
        self.state.seed = plan.seed & 0xFFFFFFFF
        self.state.random = (plan.seed * 0x9E3779B97F4A7C15 + first * 31 + lane * 7 + 1) & 0xFFFFFFFFFFFFFFFF or 1
        self.state.lanes, self.state.lane, self.state.scratch_fd = lanes, lane, scratch_fd

    def some(self, rng: random.Random, most: int) -> tuple[int, int, npt.NDArray[np.uint8]]:
        """A random run of pages: the first, counted from the part's own, how many, and their bytes."""
        count = rng.randint(1, min(most, self.pages))
        first = rng.randrange(self.pages - count + 1)
        size = len(self.bytes) // self.pages
        return first, count, self.bytes[first * size : (first + count) * size]

    @property
    def words(self) -> int:
        """How many words are the thread's here."""
        lane, lanes = int(self.state.lane), int(self.state.lanes)
        return self.pages * len(range(lane, int(self.state.page_size) // 8, lanes))


class Lane:
    """One thread's share: bursts of reads and writes, and between them something that is asked of the region."""

    def __init__(self, region: Region, plan: Plan, number: int) -> None:
        # System calls of two threads must not move their words through one place.
        scratch_fd = os.memfd_create("stress-scratch", os.MFD_CLOEXEC) if plan.system_calls else -1
        self.number = number
        self.shared = Part(region, plan, 0, plan.shared, number, plan.lanes, scratch_fd)
        self.own = Part(region, plan, plan.shared + number * plan.own, plan.own, 0, 1, scratch_fd)
        self.parts = (self.shared, self.own)
        self.asked: dict[str, int] = {}
        self.doing = ""
        self.trouble: str | None = None
        self.thread = threading.Thread()
        self._region, self._plan = region, plan
        self._rng = random.Random(f"{plan.seed} {number}")

    def start(self, work: Callable[[], None]) -> None:
        """Do it in a thread; whatever goes wrong is kept for the main thread to tell."""

        def run() -> None:
            try:
                work()
            except Exception as error:
                self.trouble = f"{type(error).__name__}: {error}"

        self.thread = threading.Thread(target=run, name=f"lane {self.number}", daemon=True)
        self.thread.start()

    def stress(self, until: float) -> None:
        """Work at random until a moment of time.monotonic(), or until a word is wrong."""
        while time.monotonic() < until:
            for part in self.parts:
                self.doing = "reading and writing"
                if not self._check(lib.dmh_stress_run(part.state, BURST)):
                    return
            self._ask(self._rng.choice(self.parts))

    def _check(self, result: int) -> bool:
        if result < 0:
            raise OSError(-result, f"a system call on the region failed: {os.strerror(-result)}")
        return not result

    def _ask(self, part: Part) -> None:
        rng, region = self._rng, self._region
        kind = rng.choice(("nothing", "nothing", "nothing", "evict", "flush", "prefetch", "pin", "discard", "scan"))
        if kind == "nothing" or (kind == "pin" and not self._plan.pin_pages):
            return
        self.doing = kind
        if kind == "discard":
            first, count, there = self.own.some(rng, LARGEST_REQUEST)
            region.discard(there)
            self.own.versions[first : first + count] = 0
        elif kind == "pin":
            _, _, there = part.some(rng, self._plan.pin_pages)
            try:
                with region.pin(there):
                    self._check(lib.dmh_stress_run(part.state, BURST // 4))
            except RegionError:
                kind = "pin refused"  # by what the others have pinned
        elif kind == "scan":
            first, count, _ = part.some(rng, LARGEST_REQUEST)
            lib.dmh_stress_verify(part.state, first, count)
        else:
            _, _, there = part.some(rng, LARGEST_REQUEST)
            {"evict": region.evict, "flush": region.flush, "prefetch": region.prefetch}[kind](there)
        self.asked[kind] = self.asked.get(kind, 0) + 1
        self.own.state.done += 1

    def verify(self) -> None:
        """Every word that is this thread's."""
        self.doing = "the verifying scan"
        for part in self.parts:
            if lib.dmh_stress_verify(part.state, 0, part.pages):
                return

    @property
    def wrong(self) -> dict[str, int] | None:
        """The first word that was not what it had to be."""
        for part in self.parts:
            state = part.state
            if state.wrong:
                names = ("wrong_page", "wrong_word", "wrong_version", "expected", "got", "again", "older")
                return {name.removeprefix("wrong_"): int(getattr(state, name)) for name in names}
        return None

    def progress(self) -> list[int]:
        """Operations so far, and the page that is being touched."""
        done = [int(part.state.done) for part in self.parts]
        page = int(self.shared.state.page if self.doing != "discard" else self.own.state.page)
        return [sum(done), page]


def tell(**facts: Any) -> None:
    """One line for the process that started this one."""
    print(json.dumps(facts), flush=True)


def watch(lanes: list[Lane]) -> bool:
    """Tell of every thread's progress until all have ended; whether none has found anything."""
    while True:
        tell(progress=[lane.progress() for lane in lanes], doing=[lane.doing for lane in lanes])
        alive = [lane for lane in lanes if lane.thread.is_alive()]
        if not alive:
            break
        alive[0].thread.join(REPORT_SECONDS)
    for lane in lanes:
        if lane.wrong:
            tell(wrong=lane.wrong, lane=lane.number)
        if lane.trouble:
            tell(trouble=lane.trouble, lane=lane.number)
    return not any(lane.wrong or lane.trouble for lane in lanes)


def main() -> int:
    """0 if every word was right."""
    plan, number = Plan.from_wire(sys.argv[1]), int(sys.argv[2])
    lib.dmh_die_with_parent()
    with dmh.attach() as region:
        lanes = [Lane(region, plan, number * plan.threads + i) for i in range(plan.threads)]
        tell(phase="attached")
        sys.stdin.readline()
        until = time.monotonic() + plan.seconds
        for lane in lanes:
            lane.start(functools.partial(lane.stress, until))
        right = watch(lanes)
        if right:
            tell(phase="ran")
            sys.stdin.readline()
            for lane in lanes:
                lane.start(lane.verify)
            right = watch(lanes)
        parts = [part for lane in lanes for part in lane.parts]
        tell(
            phase="verified" if right else "failed",
            words=sum(part.words for part in parts),
            asked=[lane.asked for lane in lanes],
            longest_ms=max(int(part.state.longest_ns) for part in parts) / 1e6,
        )
        sys.stdin.readline()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())

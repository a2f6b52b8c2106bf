"""Read-ahead on the live system: what scans find there before they ask, and what other access fetches in vain.

Asked for too early are faults, and messages for pages that were on their way (`late`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from regions import pattern

import dmh
from dmh.native import ffi, lib

OpenRegion = Callable[..., dmh.Region]
Pages = npt.NDArray[np.uint64]

PAGES = 8192
HALF, QUARTER = PAGES // 2, PAGES // 4
SIZE = ("region.size=34MiB", "memory.limit=8MiB")


def interleaved(*scans: range) -> Pages:
    return np.array(scans, np.uint64).T.reshape(-1)


SCANS = {
    "sequential": np.arange(PAGES, dtype=np.uint64),
    "backward": np.arange(PAGES - 1, -1, -1).astype(np.uint64),
    "two": interleaved(range(HALF), range(HALF, PAGES)),
    "triad": interleaved(*(range(i * QUARTER, (i + 1) * QUARTER) for i in range(4))),
    "strided": np.arange(0, PAGES, 3, dtype=np.uint64),
}


class Walked:
    """An array four times larger than memory, every page of it with its number in it, and the walks over it."""

    def __init__(self, region: dmh.Region) -> None:
        self.region = region
        self.size = region.page_size
        self.pages = (32 << 20) // self.size
        self.words = region.empty((self.pages, self.size // 8), "u8")
        self.words[:, 7] = np.arange(self.pages)

    def walk_from_afar(self, pages: Pages) -> dict[str, float]:
        """The same where nothing is local at the beginning, whatever an earlier walk has left there."""
        self.region.evict(self.words)
        return self.walk(pages)

    def walk(self, pages: Pages) -> dict[str, float]:
        """Read one word of each page in this order; returns what was counted, a page of the walk."""
        before = self.region.stats().counters
        base = ffi.cast("uint64_t *", self.words.ctypes.data)
        if len(np.unique(pages)) == len(pages):
            # C, so that the program asks as fast as it can.
            times = np.empty(len(pages), np.uint64)
            lib.dmh_time_touch(
                ffi.cast("uint8_t *", base), ffi.from_buffer("uint64_t[]", pages * np.uint64(self.size)), len(pages), 0,
                ffi.from_buffer("uint64_t[]", times),
            )  # fmt: skip
        assert (self.words[:, 7][pages[-64:]] == pages[-64:]).all()
        for page in pages.tolist() if len(np.unique(pages)) < len(pages) else []:
            assert base[page * self.size // 8 + 7] == page
        after = self.region.stats().counters
        return {name: (after[name] - before[name]) / len(pages) for name in after}


@pytest.mark.parametrize(("inline", "policy"), [("true", "auto"), ("true", "fifo"), ("false", "auto")])
def test_scans_find_their_pages_before_they_ask_for_them(open_region: OpenRegion, inline: str, policy: str) -> None:
    walked = Walked(open_region(*SIZE, f"workers.inline={inline}", f"evictor.policy={policy}"))
    for scan, pages in SCANS.items():
        # Where others have the processors, nobody can be ahead of a program that only touches: the best of three.
        counted = min((walked.walk_from_afar(pages) for _ in range(3)), key=lambda walk: walk["faults"] + walk["late"])
        assert counted["faults"] + counted["late"] < 0.05, (scan, counted)
        assert counted["prefetched"] < 1.1, (scan, counted)  # of what is read ahead, hardly a page in vain or twice
        assert counted["ahead_used"] > 0.8 * counted["prefetched"], (scan, counted)


def test_larger_pages(open_region: OpenRegion) -> None:
    walked = Walked(open_region(*SIZE[:1], "region.page_size=16KiB", "memory.limit=16MiB"))
    counted = walked.walk(np.arange(walked.pages, dtype=np.uint64))
    assert counted["faults"] + counted["late"] < 0.1  # the window is an eighth of what is local: 122 pages


def test_random_access_fetches_little_in_vain(open_region: OpenRegion, rng: np.random.Generator) -> None:
    walked = Walked(open_region(*SIZE))
    counted = walked.walk(rng.permutation(PAGES).astype(np.uint64))
    assert counted["faults"] > 0.5
    assert counted["prefetched"] < 0.05 * counted["hard"]


def test_zipf_access_fetches_little_in_vain(open_region: OpenRegion, rng: np.random.Generator) -> None:
    walked = Walked(open_region(*SIZE))
    weight = np.arange(1, PAGES + 1) ** -0.99
    chosen = rng.choice(PAGES, 10_000, p=weight / weight.sum())
    counted = walked.walk(rng.permutation(PAGES)[chosen].astype(np.uint64))
    assert counted["faults"] > 0.1
    assert counted["prefetched"] < 0.05 * counted["hard"]


def test_a_scan_among_random_access_is_still_read_ahead(open_region: OpenRegion, rng: np.random.Generator) -> None:
    walked = Walked(open_region(*SIZE))
    counted = walked.walk(interleaved(range(HALF), (rng.permutation(HALF) + HALF).tolist()))
    assert counted["prefetched"] > 0.4  # half of the walk is a scan
    assert counted["faults"] < 0.6


def test_without_room_for_windows_a_scan_goes_on(open_region: OpenRegion) -> None:
    region = open_region("region.size=1MiB", "memory.limit=32KiB")
    array: Any = region.empty((200, 4096), "u1")
    for page in range(200):
        array[page] = pattern(page, 4096)
    assert all((array[page] == pattern(page, 4096)).all() for page in range(200))

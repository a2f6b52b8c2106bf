"""How much room LPET keeps free ahead of demand, so that no fault waits for an eviction.

    reserve = arrivals a second * the time LPET takes to react * 2

Arrivals are counted over the last few milliseconds that had any; the reaction is the time from a ring to the first
freed page, or one batch, whichever was longer.  Of both the recent peak counts, which fades within a second: a burst is
met by what the last burst needed.  A fault that had to wait all the same doubles the reserve, at once.

Pure: told of times, reads no clock.  LPET turns the reserve into thresholds.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

WINDOW_NS = 5_000_000
"""Arrivals are counted over windows of this length."""
FADE_SECONDS = 1.0
"""A peak has fallen to a third after this."""
MARGIN = 2.0


class Reserve:
    """Invariant: least <= pages <= most."""

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, max(most, least)
        self._rate = 0.0  # arrivals a second, recent peak
        self._reaction = 0.001  # seconds, recent peak
        self._waited = 0.0  # pages, after waits
        self._at = 0.0

    @classmethod
    def of(cls, resident_max: int, low: int) -> Reserve:
        """From 1/256 of the memory to most of what lies above the low threshold: then runs end above it, too."""
        return cls(least=max(resident_max // 256, 1), most=max((resident_max - low) * 3 // 4, 1))

    @property
    def pages(self) -> int:
        """The room to keep free, in pages."""
        wanted = max(self._rate * self._reaction * MARGIN, self._waited)
        return int(min(max(wanted, self.least), self.most))

    def arrived(self, ns: npt.NDArray[np.uint64]) -> None:
        """Pages came in at these times."""
        if len(ns):
            recent = int(np.count_nonzero(ns + np.uint64(WINDOW_NS) > ns.max()))
            self._rate = max(self._rate, recent / (WINDOW_NS / 1e9))

    def reacted(self, seconds: float) -> None:
        """It took so long until there was room again."""
        self._reaction = max(self._reaction, seconds)

    def waited(self, faults: int) -> None:
        """So many faults found no room."""
        if faults:
            self._waited = min(max(2.0 * self.pages, float(faults)), float(self.most))

    def pass_time(self, now: float) -> None:
        """Let the peaks fade; `now` in seconds, of any clock that does not go back."""
        faded = float(np.exp((self._at - now) / FADE_SECONDS)) if self._at else 1.0
        self._at = now
        self._rate *= faded
        self._reaction = max(self._reaction * faded, 0.0002)
        self._waited *= faded

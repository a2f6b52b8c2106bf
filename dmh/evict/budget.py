"""How many pages may be marked now, so that marks never take more than their share of a processor.

Pure: told of times, reads no clock.  Time accrues at the share and is spent by marks and looks; what a page costs is
learned.  Without time left nothing is marked, and policies do without what marks would have told.
"""

from __future__ import annotations

FIRST_GUESS = 2e-6
"""Seconds a page, until marks have been timed."""
SAVED_SECONDS = 0.02
"""At most so much processor time is saved up while nothing is marked: a burst of marks is bounded by it."""


class MarkBudget:
    """Invariant: left <= SAVED_SECONDS."""

    def __init__(self, share: float) -> None:
        """`share`: of one processor, 0 to 1."""
        self.share = share
        self.left = SAVED_SECONDS
        self.page_cost = FIRST_GUESS
        self._at: float | None = None

    def pages(self, now: float, most: int, *, pressed: bool = False) -> int:
        """How many pages may be marked, at most `most`; `now` in seconds, of any clock that does not go back.

        `pressed`: evictions are due, so that what was saved up is kept for later; no more than the share since the
        last time.
        """
        accrued = (now - self._at) * self.share if self._at is not None else 0.0
        self.left = min(self.left + accrued, SAVED_SECONDS)
        self._at = now
        usable = min(self.left, accrued) if pressed else self.left
        return max(min(int(usable / self.page_cost), most), 0) if self.share else 0

    def spent(self, seconds: float, marked: int) -> None:
        """Marks, or looks where `marked` is 0, have taken this much processor time."""
        self.left -= seconds
        if marked:
            self.page_cost = max(0.9 * self.page_cost + 0.1 * seconds / marked, 1e-8)

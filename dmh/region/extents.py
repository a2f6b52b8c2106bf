"""Which pages of a region are handed out.  Pure.

First fit over free extents, neighbours merged on return.  Runs in the launcher, so that every program on a region
draws from one pool.
"""

from __future__ import annotations

from bisect import bisect_left

from dmh.errors import RegionError


class Extents:
    """Free page runs of a region of `pages` pages.

    Invariant: ``_free`` holds (first, count) runs, ascending, none empty, no two touching.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free: list[tuple[int, int]] = [(0, pages)]

    @property
    def free_pages(self) -> int:
        """Pages not handed out."""
        return sum(count for _, count in self._free)

    @property
    def largest(self) -> int:
        """Pages of the longest free run."""
        return max((count for _, count in self._free), default=0)

    def allocate(self, count: int) -> int:
        """Hand out `count` neighbouring pages; returns the first."""
        if count < 1:
            raise RegionError(f"cannot allocate {count} pages")
        for i, (first, length) in enumerate(self._free):
            if length >= count:
                if length == count:
                    del self._free[i]
                else:
                    self._free[i] = (first + count, length - count)
                return first
        raise RegionError(
            f"no room for {count} neighbouring pages: the largest free run has {self.largest}, {self.free_pages} "
            f"of {self.pages} "
            f"pages are free in all; delete arrays, or make region.size larger"
        )

    def take(self, first: int, count: int) -> None:
        """Mark the pages of a range as handed out, whatever part of it is still free."""
        end = first + count
        if not 0 <= first < end <= self.pages:
            raise RegionError(f"pages {first} to {end - 1} are not all within the region of {self.pages} pages")
        kept: list[tuple[int, int]] = []
        for start, length in self._free:
            stop = start + length
            if start < first:
                kept.append((start, min(stop, first) - start))
            if stop > end:
                kept.append((max(start, end), stop - max(start, end)))
        self._free = [(start, length) for start, length in kept if length > 0]

    def release(self, first: int, count: int) -> None:
        """Take back a run that `allocate` handed out."""
        i = bisect_left(self._free, (first, 0))
        end = first + count
        before = self._free[i - 1] if i else None
        after = self._free[i] if i < len(self._free) else None
        if count < 1 or end > self.pages or (before and sum(before) > first) or (after and after[0] < end):
            raise RegionError(f"pages {first} to {end - 1} are given back but were not handed out")
        if after and after[0] == end:
            end = sum(after)
            del self._free[i]
        if before and sum(before) == first:
            first = before[0]
            i -= 1
            del self._free[i]
        self._free.insert(i, (first, end - first))

    def validate(self) -> None:
        """Check the invariant."""
        last = -1
        for first, count in self._free:
            assert count > 0
            assert first > last
            assert first + count <= self.pages
            last = first + count

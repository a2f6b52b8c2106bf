"""The one error tree of dmh.

Owns every exception class that the package raises on purpose.  Imports nothing, so every module may import it.
A message says what is wrong, where, and what to do about it; the attributes carry the same facts for programs.
"""

from __future__ import annotations

from collections.abc import Sequence


class DmhError(Exception):
    """Root of every error that dmh raises on purpose.

    Attributes:
        region: name of the region concerned, or None.
        page: page number concerned (0 is the region's first page), or None.
        worker: name of the process that noticed, or None.
    """

    def __init__(
        self, message: str, *, region: str | None = None, page: int | None = None, worker: str | None = None
    ) -> None:
        super().__init__(message)
        self.region = region
        self.page = page
        self.worker = worker


class ConfigError(DmhError):
    """A configuration that cannot be used; ``problems`` lists every one found, each with its place."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class KernelError(DmhError):
    """The kernel lacks, or refuses this user, something that dmh needs."""


class ServiceError(DmhError):
    """A service could not be started, reached or joined, or ended while it was needed."""


class RegionError(DmhError):
    """A request that the region cannot carry out: out of room, out of bounds, closed, too much pinned."""


class StoreError(DmhError):
    """The page store cannot be used, or did not answer in time."""


class StoreUnavailable(StoreError):
    """The store does not answer now; the request may succeed when it is tried again."""


class PageLost(StoreError):
    """The store no longer has a page that it has acknowledged: lost data, never a new page."""


class PageCorrupt(StoreError):
    """The store returned bytes that are not the ones stored."""


class TraceError(DmhError):
    """A recording that cannot be written or read."""


class InvalidTransition(DmhError):
    """A page was asked to change state along an edge that the page life cycle does not have."""


class ProtocolError(DmhError):
    """A message on one of dmh's sockets that is malformed, oversized or of another version."""

"""What a page store (DMS) is: the interface that every store implements.

Owns the interface; owns no store, nor how a URL finds its class (`registry.py`).  The launcher calls `prepare` and
`remove`; the workers `open` a store and use it.  One process at a time writes (the evictor); several read (the
resolvers).  What sits on top of a store (`layers/`) is an `OpenStore` over another one.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

PageNumbers = npt.NDArray[np.uint64]
PageBytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.uint8]


class Found(enum.IntEnum):
    """What a store says of a page that it was asked for; native code knows these numbers too."""

    MISSING = 0
    """It has no such page."""
    THERE = 1
    """Its bytes are in the row; whether they are the right ones is checked by the caller."""
    DAMAGED = 2
    """It has something, but not what was stored: of another length, beyond the end of a truncated file, forged."""


@dataclass(frozen=True, slots=True)
class StoreSpec:
    """Which store, for which region.

    Attributes:
        url: the store's URL as the configuration has it.
        region: name of the region (for messages).
        region_id: 16 bytes that no other region has: the name space of this region's pages inside a shared store.
        page_size: bytes a page, a power of two from 4096 to 2 MiB.
        pages: pages in the region; page numbers run from 0 to pages - 1.
        timeout: seconds within which one request must be answered.
        encrypt: where the key is that pages are encrypted with (`layers/encrypt.py`); "none": they are not.
    """

    url: str
    region: str
    region_id: bytes
    page_size: int
    pages: int
    timeout: float
    encrypt: str = "none"


class OpenStore(abc.ABC):
    """A page store, as one process uses it.  Used by one thread at a time.

    Every method may raise `StoreUnavailable` (worth another try at once) or another `StoreError` (worth one when
    somebody has mended what it says).

    Attributes:
        elsewhere: another process takes the pages in, so that writing is mostly waiting: pages are captured meanwhile.
    """

    elsewhere: bool = False

    @abc.abstractmethod
    def get_many(self, pages: PageNumbers, out: PageBytes) -> Mask:
        """Read pages.

        Args:
            pages: shape (n,), page numbers, ascending or not, no page twice.
            out: shape (n, page_size), C-contiguous; row i receives page ``pages[i]``.

        Returns:
            shape (n,): a `Found` for each page.  Where it is not THERE, its row of `out` is undefined; one bad page
            never keeps the others of its batch from being read.
        """

    @abc.abstractmethod
    def put_many(self, pages: PageNumbers, data: PageBytes) -> None:
        """Store pages; on return the store has acknowledged every one.

        Args:
            pages: shape (n,), no page twice.
            data: shape (n, page_size), C-contiguous.
        """

    @abc.abstractmethod
    def delete_many(self, pages: PageNumbers) -> None:
        """Forget pages; those it does not have are ignored."""

    @abc.abstractmethod
    def flush(self) -> None:
        """Return when everything acknowledged so far is as durable as this store can make it."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release this process's connection, mappings and descriptors.  Stored pages stay."""

    def remote(self) -> Any:
        """A native reader (`struct dmh_redis`) by which native code may fetch pages itself, in the process and the
        thread that use this store; None where pages do not lie in the store as they are, or no such reader knows it.
        """
        return None

    def stats(self) -> dict[str, Any]:
        """Figures worth showing an operator (bytes used, server version, ...)."""
        return {}

    def epoch(self) -> str | None:
        """Something that changes when the store may have forgotten pages that it had acknowledged (a server's run
        id); None where it cannot forget.  Asks the store, so it may raise what the others raise.
        """
        return None


class Store(OpenStore):
    """What a store's class is: how one comes to be, and its end."""

    @classmethod
    @abc.abstractmethod
    def prepare(cls, spec: StoreSpec) -> list[int]:
        """Create or check what the store needs before any worker opens it; called once, by the launcher.

        Returns:
            File descriptors that each worker's `open` needs (owned by the caller from then on); often none.
        """

    @classmethod
    @abc.abstractmethod
    def open(cls, spec: StoreSpec, descriptors: Sequence[int]) -> OpenStore:
        """A store object for this process, over what `prepare` made.  It takes over the descriptors."""

    @classmethod
    @abc.abstractmethod
    def remove(cls, spec: StoreSpec) -> None:
        """Delete every page of this region and what `prepare` made; called once, by the launcher, at the end."""

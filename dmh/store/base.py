"""What a page store (DMS) is: the interface that every store implements, and how a URL finds its class.

Owns the interface and the registry; owns no store.  The launcher calls `prepare` and `remove`; the workers `open` a
store and use it.  One process at a time writes (the evictor); several read (the resolvers).
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

PageNumbers = npt.NDArray[np.uint64]
PageBytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


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
    """

    url: str
    region: str
    region_id: bytes
    page_size: int
    pages: int
    timeout: float


class Store(abc.ABC):
    """A page store, as one process sees it.  Not shared between threads.

    Every method may raise `StoreUnavailable` (worth another try) or another `StoreError` (not worth one).
    """

    @classmethod
    @abc.abstractmethod
    def prepare(cls, spec: StoreSpec) -> list[int]:
        """Create or check what the store needs before any worker opens it; called once, by the launcher.

        Returns:
            File descriptors that each worker's `open` needs (owned by the caller from then on); often none.
        """

    @classmethod
    @abc.abstractmethod
    def open(cls, spec: StoreSpec, descriptors: Sequence[int]) -> Store:
        """A store object for this process, over what `prepare` made.  It takes over the descriptors."""

    @classmethod
    @abc.abstractmethod
    def remove(cls, spec: StoreSpec) -> None:
        """Delete every page of this region and what `prepare` made; called once, by the launcher, at the end."""

    @abc.abstractmethod
    def get_many(self, pages: PageNumbers, out: PageBytes) -> Mask:
        """Read pages.

        Args:
            pages: shape (n,), page numbers, ascending or not, no page twice.
            out: shape (n, page_size), C-contiguous; row i receives page ``pages[i]``.

        Returns:
            shape (n,): False where the store has no such page (its row of `out` is then undefined).
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

    def stats(self) -> dict[str, Any]:
        """Figures worth showing an operator (bytes used, server version, ...)."""
        return {}

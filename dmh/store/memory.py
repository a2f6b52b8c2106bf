"""``memory:`` - an arena in shared memory, for tests and for measuring dmh without a store's own cost.

It saves no memory: pages that leave the region are still on this machine, outside `memory.limit`.
"""

from __future__ import annotations

import os

from dmh.store.base import StoreSpec
from dmh.store.paged_file import PagedFile, make_index


class MemoryStore(PagedFile):
    """A store in a memfd that all workers map."""

    @classmethod
    def prepare(cls, spec: StoreSpec) -> list[int]:
        arena = os.memfd_create("dmh-arena", os.MFD_CLOEXEC)
        os.ftruncate(arena, spec.pages * spec.page_size)
        return [arena, make_index(spec)]

    @classmethod
    def remove(cls, spec: StoreSpec) -> None:
        """Nothing to do: the arena goes with its last descriptor."""

    def flush(self) -> None:
        """Memory is as durable as it gets."""

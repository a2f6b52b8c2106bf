"""Idle source `buffer`: move the page to the victim buffer and see whether it comes back.

    mark(p):  capture p into a slot; it stays there, STAGED
    used(p):  is it not STAGED any more?  A touch has brought it back, as a soft fault.

Works everywhere, and costs a program that uses a marked page a fault through the whole path.  The number of pages
marked at one time is bounded by the buffer's free slots.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from dmh.evict.idle.base import IdleSource, Mask, Pages
from dmh.lspt.states import State
from dmh.lspt.table import Table


class Staging(Protocol):
    """How pages move to the victim buffer: `dmh.evict.leave.Leaver`, or a simulation."""

    def stage(self, pages: Pages) -> Pages:
        """Move resident pages there; returns those that were moved."""


class BufferSource(IdleSource):
    """Marks by moving."""

    name = "buffer"
    moves = True
    accessed = False

    def __init__(self, table: Table, leaver: Staging) -> None:
        self._table = table
        self._leaver = leaver

    def mark(self, pages: Pages) -> Mask:
        return np.isin(pages, self._leaver.stage(pages), assume_unique=True)

    def used(self, pages: Pages) -> Mask:
        used: Mask = (self._table.words[pages] & np.uint64(15)) != State.STAGED
        return used

"""What an idle source is: it marks pages, and says later which of them were used meanwhile.

A mark never touches a page's content.  When to mark what is LPET's business, what follows from the answer is the
policy's.  All of it runs in the evictor's main thread.
"""

from __future__ import annotations

import abc
from typing import ClassVar

import numpy as np
import numpy.typing as npt

Pages = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]


class IdleSource(abc.ABC):
    """One way of telling whether a page was used."""

    name: ClassVar[str]
    """As in the configuration."""
    moves: ClassVar[bool] = False
    """Marking moves the page to the victim buffer, so marks take room there, and a use is a soft fault."""

    accessed: ClassVar[bool] = True
    """Marks tell of every use and cost next to nothing, so policies may mark as much as they like."""

    @abc.abstractmethod
    def mark(self, pages: Pages) -> Mask:
        """Watch these pages (ascending, resident) from now on.  False where a page cannot be watched."""

    @abc.abstractmethod
    def used(self, pages: Pages) -> Mask:
        """Which of these pages (ascending, marked, and not gone since) were used since they were marked?"""


class NoSource(IdleSource):
    """Watches nothing: policies work from faults alone."""

    name = "none"
    accessed = False

    def mark(self, pages: Pages) -> Mask:
        return np.zeros(len(pages), np.bool_)

    def used(self, pages: Pages) -> Mask:
        return np.zeros(len(pages), np.bool_)

"""Idle sources: which of them this machine has, and the one that a configuration means.

`auto` takes none for a policy that does as well without marks, and for the others the best that a probe finds:
`page_idle` (marks cost the program nothing), else `unmap`, else `buffer`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from dmh.errors import KernelError
from dmh.evict.idle import page_idle, unmap
from dmh.evict.idle.base import IdleSource, NoSource
from dmh.evict.idle.buffer import BufferSource
from dmh.evict.idle.page_idle import PageIdleSource
from dmh.evict.idle.unmap import UnmapSource
from dmh.evict.leave import Leaver
from dmh.evict.policies import policy_class
from dmh.evict.unmap import Unmapper
from dmh.lspt.table import Table

__all__ = ["IdleSource", "choose_source", "open_source"]


def choose_source(name: str, page_size: int, policy: str | None = None) -> str:
    """The source that `evictor.idle` means on this machine, for this policy (None: one that profits from marks).

    Raises:
        KernelError: one that was asked for by name is not to be had here, and why.
    """
    probes: dict[str, Callable[[], str | None]] = {
        "page_idle": page_idle.probe,
        "unmap": partial(unmap.probe, page_size),
    }
    if name == "auto" and policy and not policy_class(policy).profits_from_marks:
        return "none"
    if name == "auto":
        return next((source for source, probe in probes.items() if probe() is None), "buffer")
    if name in probes and (reason := probes[name]()):
        raise KernelError(f"evictor.idle={name}: {reason}; or use evictor.idle=auto")
    return name


def open_source(name: str, context: Any, table: Table, leaver: Leaver) -> IdleSource:
    """The source of this name, for the evictor."""
    if name == "page_idle":
        return PageIdleSource(context)
    if name == "unmap":
        return UnmapSource(Unmapper(context))
    return BufferSource(table, leaver) if name == "buffer" else NoSource()

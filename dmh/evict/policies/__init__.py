"""The eviction policies by name."""

from __future__ import annotations

from dmh.evict.policies.base import Choice, Policy
from dmh.evict.policies.fifo import Fifo
from dmh.evict.policies.idle_walk import IdleWalk

POLICIES: dict[str, type[Policy]] = {"fifo": Fifo, "idle-walk": IdleWalk}
"""Name in the configuration -> class."""

__all__ = ["POLICIES", "Choice", "Policy"]

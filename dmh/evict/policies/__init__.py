"""The eviction policies by name.

Found through the entry-point group ``dmh.policies`` (name in the configuration -> class), so another package can add
one.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from dmh.errors import ConfigError
from dmh.evict.policies.base import Choice, Event, Policy

GROUP = "dmh.policies"

__all__ = ["GROUP", "Choice", "Event", "Policy", "policy_class", "policy_names"]


def policy_names() -> list[str]:
    """The policies that are installed."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def policy_class(name: str) -> type[Policy]:
    """The class of this name."""
    for point in entry_points(group=GROUP, name=name):
        found: type[Policy] = point.load()
        return found
    raise ConfigError([f"no policy {name!r} is installed; there are {', '.join(policy_names()) or 'none'}"])

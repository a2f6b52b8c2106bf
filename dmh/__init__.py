"""dmh, the DM-Handler: a program uses more memory than it is given.

A *region* of address space is paged, through Linux's userfaultfd, to a page store: a file, memory, Redis or Valkey.
Arrays in it are ordinary NumPy arrays.

    import dmh

    with dmh.open("configs/quickstart.yaml") as region:      # a service of its own
        a = region.zeros((20_000, 20_000), dtype="f8")       # 3.2 GB, of which memory.limit is resident

    region = dmh.attach()                                    # inside `dmh run`, or beside `dmh serve`

What this module exports is the public interface.  It is imported lazily, so that the workers start fast and a tree
can be built before its native module exists.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmh.config import Config, load
    from dmh.errors import (
        ConfigError,
        DmhError,
        KernelError,
        PageCorrupt,
        PageLost,
        RegionError,
        ServiceError,
        StoreError,
        StoreUnavailable,
    )
    from dmh.observe.report import Snapshot
    from dmh.region.array import Array
    from dmh.region.region import Region, attach
    from dmh.region.region import open_region as open

__version__ = "0.1.0"

_WHERE = {
    "Array": "dmh.region.array",
    "Config": "dmh.config",
    "Region": "dmh.region.region",
    "Snapshot": "dmh.observe.report",
    "attach": "dmh.region.region",
    "load": "dmh.config",
    "open": "dmh.region.region",
} | dict.fromkeys(
    (
        "ConfigError",
        "DmhError",
        "KernelError",
        "PageCorrupt",
        "PageLost",
        "RegionError",
        "ServiceError",
        "StoreError",
        "StoreUnavailable",
    ),
    "dmh.errors",
)

__all__ = [
    "Array",
    "Config",
    "ConfigError",
    "DmhError",
    "KernelError",
    "PageCorrupt",
    "PageLost",
    "Region",
    "RegionError",
    "ServiceError",
    "Snapshot",
    "StoreError",
    "StoreUnavailable",
    "attach",
    "load",
    "open",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'dmh' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), "open_region" if name == "open" else name)

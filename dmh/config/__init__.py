"""What a service is told: YAML in, one frozen model out, and the same in pages.

`load` reads a file, `Config` holds the settings, `Limits` the memory settings in pages.  Imports only `dmh.errors`, so
every other part may import this.
"""

from dmh.config.limits import Limits
from dmh.config.loader import load, loads
from dmh.config.model import (
    IDLE_SOURCES,
    POLICIES,
    Config,
    EvictorConfig,
    MemoryConfig,
    PrefetchConfig,
    RegionConfig,
    StoreConfig,
    WorkersConfig,
    config_schema,
    split_address,
)
from dmh.config.quantity import Amount, about, format_duration, format_size, parse_duration, parse_size
from dmh.config.storeurl import store_schemes, without_password

__all__ = [
    "IDLE_SOURCES",
    "POLICIES",
    "Amount",
    "Config",
    "EvictorConfig",
    "Limits",
    "MemoryConfig",
    "PrefetchConfig",
    "RegionConfig",
    "StoreConfig",
    "WorkersConfig",
    "about",
    "config_schema",
    "format_duration",
    "format_size",
    "load",
    "loads",
    "parse_duration",
    "parse_size",
    "split_address",
    "store_schemes",
    "without_password",
]

"""The native module, and the two idioms for calling it.

Owns nothing but the conversion of its results: C functions return -errno, Python raises.
"""

from __future__ import annotations

import os
from typing import Any

try:
    from dmh.native._dmh import ffi, lib
except ImportError as error:  # pragma: no cover - only in a tree that was never built
    raise ImportError(
        f"dmh's native module is not built ({error}); run `make` in a clone, or `pip install .`"
    ) from error

__all__ = ["check", "ffi", "lib", "pointer"]


def check(result: int, doing: str) -> int:
    """`result` of a native call, or OSError with what was being done where it is -errno."""
    if result < 0:
        raise OSError(-result, f"{doing}: {os.strerror(-result)}")
    return result


def pointer(array: Any, ctype: str = "uint8_t[]") -> Any:
    """A C pointer to the memory of a C-contiguous array; valid while the array lives."""
    return ffi.from_buffer(ctype, array, require_writable=False)

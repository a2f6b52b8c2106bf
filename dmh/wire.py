"""The frames between the monitor and the resolvers.  Pure.

A frame is ``b"dm"``, a version byte, a kind byte, then records of one fixed size.  Whatever does not parse is a
ProtocolError: the receiver counts it and goes on, because a dropped message is always safe (whoever waits is woken
and faults again).
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from typing import NamedTuple

from dmh.errors import ProtocolError

VERSION = 1
_HEAD = struct.Struct("<2sBB")
_RECORD = struct.Struct("<QqIIIQ")


class Kind(enum.IntEnum):
    """What a frame asks for."""

    FAULT = 1
    """Resolve the page, and bring in the window after it."""
    PREFETCH = 2
    """Bring in the window, which starts at the page; nobody waits."""
    STOP = 3
    """No more frames will come."""


class Request(NamedTuple):
    """One record: a page, and a window of `window` more pages, `stride` apart, after it."""

    page: int
    stride: int
    window: int
    view: int
    thread: int
    ns: int


def pack(kind: Kind, requests: list[Request]) -> bytes:
    """One frame."""
    return _HEAD.pack(b"dm", VERSION, kind) + b"".join([_RECORD.pack(*r) for r in requests])


def unpack(frame: bytes) -> tuple[Kind, Iterator[Request]]:
    """The frame's kind and its records, in order."""
    if len(frame) < _HEAD.size or (len(frame) - _HEAD.size) % _RECORD.size:
        raise ProtocolError(f"a frame of {len(frame)} bytes is not a header and whole records")
    magic, version, kind = _HEAD.unpack_from(frame)
    if magic != b"dm" or version != VERSION or not Kind.FAULT <= kind <= Kind.STOP:
        raise ProtocolError(f"a frame starts with {frame[:4]!r}, not with dm, version {VERSION} and a known kind")
    return Kind(kind), map(Request._make, _RECORD.iter_unpack(memoryview(frame)[_HEAD.size :]))

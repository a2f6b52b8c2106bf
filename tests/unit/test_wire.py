"""The frames between monitor and resolvers: what is packed comes back, and nothing else is believed."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dmh.errors import ProtocolError
from dmh.wire import VERSION, Kind, Request, pack, unpack

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
requests = st.builds(
    Request, page=u64, stride=st.integers(-(2**63), 2**63 - 1), window=u32, view=u32, thread=u32, ns=u64
)
RECORD = len(pack(Kind.FAULT, [Request(0, 0, 0, 0, 0, 0)])) - 4


@given(st.sampled_from(Kind), st.lists(requests, max_size=20))
def test_a_frame_comes_apart_as_it_was_packed(kind: Kind, sent: list[Request]) -> None:
    received, records = unpack(pack(kind, sent))
    assert received is kind
    assert list(records) == sent


@given(st.binary(max_size=200))
@example(b"")
@example(b"dm")
@example(b"dm\x01")
@example(b"dm\x01\x01" + b"\0" * 12)
def test_any_bytes_are_a_frame_or_a_protocol_error(frame: bytes) -> None:
    try:
        kind, records = unpack(frame)
        sent = list(records)
    except ProtocolError:
        return
    assert pack(kind, sent) == frame


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"dm\x01",
        b"DM" + bytes([VERSION, 1]),
        b"dm" + bytes([VERSION + 1, 1]),
        b"dm" + bytes([VERSION, 0]),
        b"dm" + bytes([VERSION, 4]),
        b"dm" + bytes([VERSION, 255]),
        pack(Kind.FAULT, [Request(1, 1, 0, 1, 1, 1)])[:-1],
        pack(Kind.FAULT, [Request(1, 1, 0, 1, 1, 1)]) + b"\0",
        pack(Kind.FAULT, [Request(1, 1, 0, 1, 1, 1)])[:-RECORD] + b"\0" * (RECORD // 2),
    ],
)
def test_malformed_frames_are_refused(frame: bytes) -> None:
    with pytest.raises(ProtocolError, match="a frame"):
        unpack(frame)


def test_what_does_not_fit_a_record_is_not_sent_shortened() -> None:
    for wrong in (Request(2**64, 1, 0, 0, 0, 0), Request(-1, 1, 0, 0, 0, 0), Request(0, 1, 2**32, 0, 0, 0)):
        with pytest.raises(Exception, match="format requires|out of range|too large|argument"):
            pack(Kind.FAULT, [wrong])

"""What writes behind the processor's back needs a pin: without one an eviction can lose its bytes, with one it cannot."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

import dmh

OpenRegion = Callable[..., dmh.Region]
PIECE = 1 << 18
PIECES = 64
SECONDS = 6.0


@pytest.fixture
def file() -> Path:
    """A file on a disk, whose pieces each hold one byte value."""
    path = Path(f"/var/tmp/dmh-test-direct-{os.getpid()}")
    path.write_bytes(b"".join(bytes([piece + 1]) * PIECE for piece in range(PIECES)))
    yield path
    path.unlink()


def lost_reads(region: dmh.Region, path: Path, *, pin: bool, seconds: float, enough: int) -> tuple[int, int]:
    """Read pieces with O_DIRECT while everything is evicted all the time: how many came out wrong, of how many."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        probe = region.empty(PIECE, "u1")
        probe[:] = 0
        os.preadv(fd, [memoryview(probe)], 0)
    except OSError as error:
        pytest.skip(f"needs O_DIRECT on /var/tmp ({error.strerror})")
    target = region.empty(PIECE, "u1")
    stop = threading.Event()

    def evict() -> None:
        while not stop.is_set():
            region.evict(target)

    evicting = threading.Thread(target=evict)
    evicting.start()
    lost = done = 0
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end and lost < enough:
            piece = done % PIECES
            target[:] = 0
            with region.pin(target) if pin else nullcontext():
                assert os.preadv(fd, [memoryview(target)], piece * PIECE) == PIECE
            lost += bool((target != piece + 1).any())
            done += 1
    finally:
        stop.set()
        evicting.join()
        os.close(fd)
    return lost, done


def test_direct_reads_are_lost_without_a_pin_and_safe_with_one(open_region: OpenRegion, file: Path) -> None:
    region = open_region("memory.limit=2MiB", "prefetch.enabled=false")
    lost, done = lost_reads(region, file, pin=True, seconds=SECONDS / 4, enough=1)
    assert lost == 0
    assert done > 10
    lost, done = lost_reads(region, file, pin=False, seconds=SECONDS, enough=1)
    if not lost:
        pytest.skip(f"needs a disk that is slow enough: none of {done} unpinned reads met an eviction")
    array = region.empty(PIECE, "u1")  # nothing else has suffered
    array[:] = np.arange(PIECE) % 251
    region.evict(array)
    assert (array == np.arange(PIECE) % 251).all()

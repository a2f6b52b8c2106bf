"""System calls on absent pages: the kernel touches the memory itself, waits for the page like any thread, and
succeeds.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import dmh
from dmh.native import ffi, lib

OpenRegion = Callable[..., dmh.Region]
SIZE = 300_000  # more than the local memory of the tests' region, so every call evicts while it runs


def _kernel_faults() -> bool:
    how, features = ffi.new("int *"), ffi.new("uint64_t *")
    fd = lib.dmh_uffd_open(how, features)
    if fd >= 0:
        os.close(fd)
    return bool(fd >= 0 and how[0] != lib.DMH_UFFD_USER_ONLY)


pytestmark = pytest.mark.skipif(not _kernel_faults(), reason="needs userfaultfd with kernel-mode faults")


@pytest.fixture
def data(rng: np.random.Generator) -> bytes:
    return rng.bytes(SIZE)


@pytest.fixture
def array(open_region: OpenRegion) -> np.ndarray:
    region = open_region("memory.limit=128KiB")
    array = region.empty(SIZE, "u1")
    array[:] = 1
    region.evict(array)
    return array


def test_readinto(array: np.ndarray, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(data)
    with open(path, "rb", buffering=0) as file:
        assert file.readinto(memoryview(array)) == SIZE
    assert array.tobytes() == data


def test_write(array: np.ndarray, data: bytes, tmp_path: Path) -> None:
    array[:] = np.frombuffer(data, "u1")
    path = tmp_path / "data"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        assert os.write(fd, memoryview(array)) == SIZE
    finally:
        os.close(fd)
    assert path.read_bytes() == data


def test_preadv_into_scattered_pieces(array: np.ndarray, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(data)
    pieces = [memoryview(array)[at : at + 9999] for at in range(0, SIZE, 9999)]
    fd = os.open(path, os.O_RDONLY)
    try:
        assert os.preadv(fd, pieces, 0) == SIZE
    finally:
        os.close(fd)
    assert array.tobytes() == data


def test_recv_into_and_send(array: np.ndarray, data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=ours.sendall, args=(data,))
        sender.start()
        got = 0
        while got < SIZE:
            got += theirs.recv_into(memoryview(array)[got:])
        sender.join()
        assert array.tobytes() == data
        received: list[bytes] = []
        reader = threading.Thread(target=lambda: received.append(ours.recv(SIZE, socket.MSG_WAITALL)))
        reader.start()
        theirs.sendall(memoryview(array))
        reader.join()
        assert received[0] == data

"""Stored bytes that change behind dmh's back: found at the fetch, on every way that a page can come in, never served.

System calls tell what a program would get: on a page that raises SIGBUS they fail with EFAULT.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from regions import inside, launcher_of, page_of, pattern, wait_until
from store_servers import RedisServer
from stored import StoredInRedis, StoredPages, memory_of

import dmh
from dmh.lspt.states import State

OpenRegion = Callable[..., dmh.Region]
SIZE, PAGES = 4096, 24
FLIPPED, SWAPPED, OTHER, OLDER, CUT = 2, 5, 6, 9, PAGES - 1
BAD = {FLIPPED, SWAPPED, OTHER, OLDER, CUT}

WAYS = {
    "monitor": ("prefetch.enabled=false",),
    "lane": ("prefetch.enabled=false", "workers.inline=false", "workers.resolvers=1"),
    "batch": ("prefetch.window=24 pages", "memory.limit=1MiB"),
}


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_bytes(os.urandom(32))
    return path


@contextmanager
def a_store(
    kind: str, size: int, open_region: OpenRegion, request: pytest.FixtureRequest, *more: str
) -> Iterator[tuple[dmh.Region, StoredPages]]:
    """A region over a store of this kind, and what that holds."""
    tmp_path: Path = request.getfixturevalue("tmp_path")
    if kind == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        region, stored = open_region(f"store.url={server.unix_url}", *more), StoredInRedis(server, size)
    elif kind == "file":
        region = open_region(f"store.url=file://{tmp_path}/pages", *more)
        stored = StoredPages(os.open(tmp_path / "pages", os.O_RDWR), size)
    else:
        region = open_region("store.url='memory:'", *more)
        stored = StoredPages(memory_of(launcher_of(region), "dmh-arena"), size)
    yield region, stored
    stored.close()


def fill(array: np.ndarray, version: int) -> None:
    for page in range(len(array)):
        array[page] = pattern(page, SIZE, version)


def served(row: np.ndarray) -> bytes | None:
    """The page as a program gets it; None where the access raises."""
    fd = os.memfd_create("copy")
    try:
        os.pwrite(fd, row.data, 0)
        return os.pread(fd, SIZE, 0)
    except OSError as error:
        assert error.errno == errno.EFAULT
        return None
    finally:
        os.close(fd)


def spoil(stored: StoredPages, first: int, older: bytes) -> None:
    """Everything that may happen to stored bytes, each to its page."""
    content = bytearray(stored.read(first + FLIPPED))
    content[len(content) // 3] ^= 0x10
    stored.write(first + FLIPPED, bytes(content))
    one, other = stored.read(first + SWAPPED), stored.read(first + OTHER)
    stored.write(first + SWAPPED, other)
    stored.write(first + OTHER, one)
    stored.write(first + OLDER, older)
    stored.cut(first + CUT)


@pytest.mark.parametrize(
    ("kind", "way", "encrypt"),
    [(kind, way, "plain") for kind in ("file", "memory", "redis") for way in WAYS]
    + [("file", "monitor", "encrypted"), ("redis", "batch", "encrypted")],
)
def test_every_change_is_found_and_nothing_else_suffers(
    kind: str, way: str, encrypt: str, open_region: OpenRegion, key_file: Path, request: pytest.FixtureRequest
) -> None:
    settings = (*WAYS[way], f"store.encrypt=file:{key_file}") if encrypt == "encrypted" else WAYS[way]
    with a_store(kind, SIZE + 16 * (encrypt == "encrypted"), open_region, request, *settings) as (region, stored):
        array = region.empty((PAGES, SIZE), "u1")
        first = page_of(region, array)
        fill(array, 1)
        region.evict(array)
        older = stored.read(first + OLDER)
        fill(array, 2)
        region.evict(array)
        spoil(stored, first, older)
        before = region.stats().counters
        with inside(region) as look:
            if way == "batch":
                region.prefetch(array)
                wait_until(
                    lambda: {State.RESIDENT, State.POISONED} == set(look.states(first, PAGES)), "all are dealt with"
                )
            for page in range(PAGES):
                assert served(array[page]) == (None if page in BAD else pattern(page, SIZE, 2).tobytes()), page
            look.validate()
            assert {page for page in range(PAGES) if look.table.state(first + page) is State.POISONED} == BAD
        after = region.stats().counters
        assert after["poisoned"] - before["poisoned"] == len(BAD)
        fetch_calls = after["fetch_calls"] - before["fetch_calls"]
        if way == "monitor":
            # Only a plain page file is read by the monitor itself (the kernel has no RWF_NOWAIT for shared memory).
            assert (fetch_calls == 0) is (kind == "file" and encrypt == "plain")
        elif way == "batch":
            assert (
                fetch_calls <= 2
            )  # the second, where Python asks again for what native code did not find as it should be
        region.discard(array)
        assert not array.any()

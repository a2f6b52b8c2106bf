"""Fixtures that several test directories share."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from regions import launcher_of, left_by, processes_of, settings, traces
from store_servers import RedisServer

import dmh

# For the programs that tests start: a thousand times NumPy, whose linear algebra starts threads that nobody needs.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


@pytest.fixture
def start_redis() -> Iterator[Callable[..., RedisServer]]:
    """Starts Redis servers with options of the test's choice (RedisServer's arguments), and ends them."""
    servers: list[RedisServer] = []

    def start(**options: Any) -> RedisServer:
        server = RedisServer(**options)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def redis_server(start_redis: Callable[..., RedisServer]) -> RedisServer:
    """A running, empty Redis server without persistence and without limits."""
    return start_redis()


@pytest.fixture
def open_region() -> Iterator[Callable[..., dmh.Region]]:
    """Starts a service of the test's own with settings such as "memory.high=4 pages" and maps its region.

    At the end every region is closed, and nothing of it may be left: no process, no socket, no descriptor, no shared
    memory.
    """
    before = traces()
    opened: list[tuple[dmh.Region, list[int]]] = []

    def start(*overrides: str) -> dmh.Region:
        region = dmh.open(settings(*overrides))
        opened.append((region, processes_of(launcher_of(region))))
        return region

    yield start
    left = []
    for region, processes in opened:
        region.close()
        left += left_by(region.name, processes)
    opened.clear()
    gc.collect()
    assert left + sorted(traces() - before) == []

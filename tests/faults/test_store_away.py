"""A worker that dies while the store is away: its successor comes up all the same, and reads and writes when the store is back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import numpy as np
import pytest
from regions import inside, wait_until
from store_servers import RedisServer

import dmh

OpenRegion = Callable[..., dmh.Region]


@pytest.mark.parametrize("role", ["resolver", "evictor"])
def test_a_worker_that_is_started_again_without_a_store_comes_up(
    open_region: OpenRegion, start_redis: Callable[..., RedisServer], role: str
) -> None:
    """Each start that failed would count as a death, and the launcher gives up on a worker that only dies."""
    server = start_redis(appendonly="no")
    region = open_region(f"store.url={server.unix_url}", "store.on_failure=wait", "store.timeout=1s")
    array = region.empty(200_000, np.int64)
    array[:] = np.arange(200_000)
    region.evict(array)
    server.kill()
    with inside(region) as look:
        for pid in look.workers[role]:
            os.kill(pid, signal.SIGKILL)
        killed = len(look.workers[role])
        wait_until(lambda: look.table.counters()["restarts"] >= killed, "the successors have taken their places")
    server.start()
    assert np.array_equal(array, np.arange(200_000))
    region.close()

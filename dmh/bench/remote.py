"""A page store in another process: Redis or Valkey, over a Unix socket or a network, beside its plain client.

    random fault      one fault at a time on stored pages, in random order, nothing evicted
    sequential read   sum of all words of four times the memory limit, first to last, as `dmh bench stream` does

Subjects: dmh, dmh-pool; `client`, redis-py with hiredis, whose GET of a page's bytes is the baseline of one fault
(`client + floor`: plus the floor handler's fault of the same run), and whose MGET of 128 pages at a time that of a
scan.  The server is the one that ``--store`` names, or a redis-server of the benchmark's own on a Unix socket, where
that program is installed.  The client's keys begin with ``dmh-bench:`` and are deleted at the end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import redis

from dmh.bench import work
from dmh.bench.floor import Floor
from dmh.bench.rows import Progress, Row, Samples, interleave, not_measured, summarize
from dmh.bench.subject import Here, Options, contest, service, verify
from dmh.bench.words import MASK, Words, fill, total, value
from dmh.native import lib
from dmh.region.region import Region

PAGES, QUICK_PAGES = 1500, 60
LIMIT = 16 << 20
BATCH = 128
SCHEMES = ("redis:", "rediss:", "unix:")
START_SECONDS = 10.0

SUM = "client + floor"


def run(options: Options, progress: Progress) -> list[Row]:
    """Rows of both cases; of neither where there is no server."""
    with ExitStack() as stack:
        if not options.store.startswith(SCHEMES):
            program = shutil.which("redis-server")
            if program is None:
                why = "redis-server is not installed, and --store names no redis:// or unix:// URL"
                return [
                    not_measured("remote", "random fault", "dmh", "one fault", "µs", why),
                    not_measured("remote", "sequential read", "dmh", "time a page", "µs", why),
                ]
            options = replace(options, store=stack.enter_context(_server(program)))
        return _faults(options, progress) + _scan(options, progress)


@contextmanager
def _server(program: str) -> Iterator[str]:
    """The URL of a server that is empty and keeps nothing."""
    with tempfile.TemporaryDirectory(prefix="dmh-bench-") as directory:
        path = Path(directory) / "socket"
        settings = {"port": "0", "unixsocket": str(path), "dir": directory, "save": "", "appendonly": "no"}
        words = [word for name, setting in settings.items() for word in (f"--{name}", setting)]
        process = subprocess.Popen(
            [program, *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, preexec_fn=lib.dmh_die_with_parent
        )
        try:
            client = redis.Redis(unix_socket_path=str(path))
            deadline = time.monotonic() + START_SECONDS
            while True:
                with suppress(redis.RedisError):
                    client.ping()
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise OSError(f"{program} did not start")
                time.sleep(0.01)  # it says nowhere that it listens
            client.close()
            yield f"unix://{path}"
        finally:
            process.terminate()
            process.wait()


class Client:
    """The plain client, and its pages: the words that `fill` writes, a key a page."""

    def __init__(self, url: str, page_size: int, pages: int) -> None:
        self._redis: Any = redis.Redis.from_url(url)  # typed by halves
        self._prefix = f"dmh-bench:{os.getpid()}:"
        self._words = page_size // 8
        self._keys = [f"{self._prefix}{page}" for page in range(pages)]
        content = np.empty(pages * self._words, np.uint64)
        fill(content)
        rows = content.reshape(pages, self._words)
        for first in range(0, pages, BATCH):
            part = range(first, min(first + BATCH, pages))
            self._redis.mset({self._keys[page]: rows[page].tobytes() for page in part})

    def get(self, pages: list[int]) -> Samples:
        """GET of each; µs."""
        times, found = np.empty(len(pages)), 0
        for i, page in enumerate(pages):
            began = time.perf_counter()
            content = self._redis.get(self._keys[page])
            times[i] = (time.perf_counter() - began) * 1e6
            found += int.from_bytes(content[:8], "little")
        verify("client", found & MASK, int(value(np.array(pages, np.uint64) * np.uint64(self._words)).sum()))
        return times

    def scan(self) -> Samples:
        """MGET of all, batch by batch; µs a page."""
        seconds, found = 0.0, 0
        for first in range(0, len(self._keys), BATCH):
            began = time.perf_counter()
            contents = self._redis.mget(self._keys[first : first + BATCH])
            seconds += time.perf_counter() - began
            found += sum(int(np.frombuffer(content, np.uint64).sum()) for content in contents)
        verify("client", found & MASK, total(0, len(self._keys) * self._words))
        return np.array([seconds * 1e6 / len(self._keys)])

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        for first in range(0, len(self._keys), BATCH):
            self._redis.unlink(*self._keys[first : first + BATCH])
        self._redis.close()


def _faults(options: Options, progress: Progress) -> list[Row]:
    pages = QUICK_PAGES if options.quick else PAGES
    size = pages * options.page_size
    words = options.page_size // 8
    generator = np.random.default_rng(1)

    def order() -> Words:
        return generator.permutation(pages).astype(np.uint64)

    with ExitStack() as stack:
        floor = stack.enter_context(Floor(pages, options.page_size))
        client = stack.enter_context(Client(options.store, options.page_size, pages))

        def on_floor() -> Samples:
            floor.empty()
            return floor.call(work.touch, order() * np.uint64(words))

        def on_dmh(name: str, region: Region, array: Words) -> Samples:
            region.evict(array)
            numbers, here = order() * np.uint64(words), Here(work.Memory(array))
            times = here.call(work.touch, numbers)
            verify(name, here.call(work.access, numbers, False)[1], int(value(numbers).sum()))
            return times

        turns = {"floor": on_floor, "client": lambda: client.get(order().tolist())}
        for name, inline in (("dmh", True), ("dmh-pool", False)):
            region = stack.enter_context(service(options, size=4 * size, limit=2 * size, inline=inline, prefetch=False))
            array = region.empty(size // 8, "u8")
            fill(array)
            turns[name] = partial(on_dmh, name, region, array)
        results = interleave(turns, options.runs, lambda text: progress(f"remote, random fault: {text}"))
        results[SUM] = [
            samples + float(np.median(under))
            for samples, under in zip(results["client"], results["floor"], strict=True)
        ]
        return summarize("remote", "random fault", "one fault", "µs", results, SUM)


def _scan(options: Options, progress: Progress) -> list[Row]:
    limit = options.limit_or(LIMIT)
    size = 4 * limit
    pages = size // options.page_size
    with ExitStack() as stack:
        client = stack.enter_context(Client(options.store, options.page_size, pages))
        entered = stack.enter_context(
            contest(options, size, limit, ("dmh", "dmh-pool"), lambda text: progress(f"remote: {text}"))
        )

        def read(name: str) -> Samples:
            seconds, found = entered.subjects[name].call(work.read)
            verify(name, found, total(0, size // 8))
            return np.array([seconds * 1e6 / pages])

        turns = {"client": client.scan} | {name: partial(read, name) for name in entered.subjects}
        results = interleave(turns, options.runs, lambda text: progress(f"remote, sequential read: {text}"))
        return summarize("remote", "sequential read", "time a page", "µs", results, "client")

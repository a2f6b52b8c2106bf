"""Pages in one Redis or Valkey server: redis://, rediss:// and unix:// URLs.

Owns the key names, the bulk commands (MGET, MSET, UNLINK) and the check that the server can be trusted with pages.
Does not own the connection and its errors (`redis_link.py`), back-off (the caller), checksums or compression (layers),
or clusters.  The launcher calls `prepare` and `remove`; resolvers and evictor `open` it.

One page is one key: ``dmh:``, 16 bytes of region id, ``:``, the page number in 8 bytes, big-endian.

How durable: a page is in the server's memory when `put_many` returns.  With ``appendonly yes`` and ``appendfsync
always`` it is in the server's file as well.  With ``everysec`` a crash of the server's machine may cost the second or
two before it, except what `flush` has confirmed; before Redis 7.2 (no WAITAOF) not even `flush` closes that gap.
Without an append-only file a restart of the server loses everything since its last snapshot: `get_many` then says "not
found", and `stats` counts the restart.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

import numpy as np

from dmh.errors import StoreError, StoreUnavailable
from dmh.native import ffi, lib
from dmh.store.base import Found, Mask, PageBytes, PageNumbers, Store, StoreSpec
from dmh.store.redis_link import WINDOW, RedisLink

log = logging.getLogger(__name__)

# Small commands, several on the way, measured better than few large ones (64 pages of 4 KiB: 4.0 us a page written as
# 2 x 128 KiB, 4.7 as one command): the server works on the next while we copy the last, and others need not wait long.
COMMAND_BYTES = 128 << 10
KEYS_PER_UNLINK = 256  # the server frees strings on the spot, UNLINK or not: 256 pages of 2 MiB are enough at once


class RedisStore(Store):
    """One server, one connection.  A call that fails drops the connection; the next call connects again."""

    elsewhere = True

    def __init__(self, spec: StoreSpec) -> None:
        self._spec = spec
        self._prefix = b"dmh:" + spec.region_id + b":"
        self._per_command = max(1, COMMAND_BYTES // spec.page_size)
        self._mset: _Mset | None = None  # only the evictor needs it
        largest = self._per_command * spec.page_size
        self._link = RedisLink(spec.url, region=spec.region, timeout=spec.timeout, largest_command=largest)
        self._reader = ffi.gc(
            lib.dmh_redis_new(self._prefix, len(self._prefix), spec.page_size, self._per_command, WINDOW),
            lib.dmh_redis_free,
        )
        if self._reader == ffi.NULL:
            raise MemoryError("no memory for reading pages")
        self._link.lend_to(self._reader)

    @classmethod
    def prepare(cls, spec: StoreSpec) -> list[int]:
        store = cls(spec)
        link = store._link
        try:
            info = link.info()
        except StoreUnavailable as error:
            mend = "start a Redis or Valkey server there, or correct store.url"
            raise StoreUnavailable(f"{error}; {mend}", region=spec.region) from None
        finally:
            store.close()
        if info.get("cluster_enabled") == "1":
            raise link.refusal("is part of a Redis Cluster; name a server that has cluster-enabled no")
        if info.get("role") == "slave":  # even a writable one loses what was written to it at its next resync
            raise link.refusal(f"is a replica; name its primary, {info.get('master_host')}:{info.get('master_port')}")
        # INFO has both settings, so that CONFIG, which ACLs and hosted servers forbid, is not needed.  With maxmemory 0
        # nothing is ever evicted, so that a policy, whichever it is, never comes into play.
        if info.get("maxmemory", "0") != "0" and info.get("maxmemory_policy") != "noeviction":
            raise link.refusal(
                f"may forget pages silently: its maxmemory-policy is {info.get('maxmemory_policy')}; "
                "set maxmemory-policy to noeviction, or maxmemory to 0"
            )
        if info.get("loading", "0") != "0":
            raise link.unavailable("it is still loading its data")
        return []

    @classmethod
    def open(cls, spec: StoreSpec, descriptors: Sequence[int]) -> RedisStore:
        store = cls(spec)
        with suppress(StoreUnavailable):  # a worker that is replaced while the server is away must come up all the same
            store._link.call("PING")  # connects, and so learns which process the server is
        return store

    @classmethod
    def remove(cls, spec: StoreSpec) -> None:
        escaped = b"".join(b"\\%c" % byte if byte in b"*?[]\\" else b"%c" % byte for byte in spec.region_id)
        try:
            store = cls(spec)
        except StoreError as error:
            log.warning("pages of region %s were left behind: %s", spec.region, error)
            return
        cursor = b"0"
        try:
            while True:
                cursor, keys = store._link.call("SCAN", cursor, "MATCH", b"dmh:" + escaped + b":*", "COUNT", 1000)
                store._unlink(keys)
                if cursor == b"0":
                    break
        except StoreError as error:
            log.warning("pages of region %s were left behind: %s", spec.region, error)
        finally:
            store.close()

    def get_many(self, pages: PageNumbers, out: PageBytes) -> Mask:
        found = np.full(len(pages), Found.THERE, np.uint8)
        if not len(pages):
            return found
        if not self._get_natively(pages, out, found):
            self._get_by_client(pages, out, found)
        return found

    def _get_natively(self, pages: PageNumbers, out: PageBytes, found: Mask) -> bool:
        """False where the connection is none that native code can read."""
        lengths = np.empty(len(pages), np.uint64)
        arrays = (
            ffi.from_buffer("uint64_t[]", pages), len(pages), ffi.from_buffer("uint8_t[]", out),
            ffi.from_buffer("uint8_t[]", found), ffi.from_buffer("uint64_t[]", lengths),
        )  # fmt: skip
        size = len(pages) * self._spec.page_size
        if not self._link.read(self._reader, lambda: lib.dmh_redis_get(self._reader, *arrays), size):
            return False
        for row in np.flatnonzero(found == Found.DAMAGED):
            self._damaged(int(pages[row]), int(lengths[row]))
        return True

    def _get_by_client(self, pages: PageNumbers, out: PageBytes, found: Mask) -> None:
        size, step = self._spec.page_size, self._per_command
        keys = self._keys(pages)
        rows = out.data.cast("B")
        row = 0

        def take(values: Any) -> None:
            nonlocal row
            if not isinstance(values, list) or len(values) != min(step, len(keys) - row):
                raise self._link.refusal("answered MGET with something else than one value for each key")
            for value in values:
                if value is None:  # no such key, or one that is no string: MGET does not tell them apart
                    found[row] = Found.MISSING
                elif len(value) != size:
                    found[row] = self._damaged(int(pages[row]), len(value))
                else:
                    rows[row * size : (row + 1) * size] = value
                row += 1

        commands = (self._link.pack("MGET", *keys[i : i + step]) for i in range(0, len(keys), step))
        self._link.request(commands, take, len(keys) * size)

    def remote(self) -> Any:
        return self._reader

    def put_many(self, pages: PageNumbers, data: PageBytes) -> None:
        if self._mset is None:
            self._mset = _Mset(self._prefix, self._spec.page_size, self._per_command)

        def take(reply: Any) -> None:
            if reply != b"OK":
                raise self._link.refusal("answered MSET with something else than OK")

        self._link.request(self._mset.commands(pages, data), take, len(pages) * self._spec.page_size)

    def delete_many(self, pages: PageNumbers) -> None:
        self._unlink(self._keys(pages))

    def flush(self) -> None:
        info = self._link.info()
        version = tuple(int(part) for part in info.get("redis_version", "0").split(".")[:2])
        if info.get("aof_enabled") != "1" or version < (7, 2):
            return  # nothing that a client may ask for makes it more durable; see the module's docstring
        # WAITAOF waits for the last write of its own connection only.  The pages may have been written over an earlier
        # connection, or by another process, so this one writes something first (`remove` finds it by the same prefix).
        self._link.call("SET", self._prefix + b"flush", b"")
        deadline = monotonic() + self._spec.timeout
        patience = max(1, int(self._link.silence * 500))  # milliseconds: half of what the link takes for a dead server
        while self._link.call("WAITAOF", 1, 0, patience)[0] < 1:
            if monotonic() > deadline:
                raise self._link.unavailable(f"its append-only file was not on disk after {self._spec.timeout} s")

    def epoch(self) -> str | None:
        self._link.call("PING")  # connects again if need be, and so learns which process the server is
        return self._link.run_id

    def close(self) -> None:
        self._link.close()

    def stats(self) -> dict[str, Any]:
        figures: dict[str, Any] = {"address": self._link.address}
        try:
            info = self._link.info()
        except StoreError as error:
            figures["unavailable"] = str(error)
        else:
            figures["server_version"] = info.get("valkey_version") or info.get("redis_version")
            figures["used_memory"] = int(info.get("used_memory", 0))
            figures["maxmemory"] = int(info.get("maxmemory", 0))
        figures["run_id"] = self._link.run_id
        figures["restarts"] = self._link.restarts
        return figures

    def _keys(self, pages: PageNumbers) -> list[bytes]:
        numbers = pages.astype(">u8").tobytes()
        return [self._prefix + numbers[i : i + 8] for i in range(0, len(numbers), 8)]

    def _unlink(self, keys: list[bytes]) -> None:
        step = KEYS_PER_UNLINK
        commands = (self._link.pack("UNLINK", *keys[i : i + step]) for i in range(0, len(keys), step))
        self._link.request(commands, lambda reply: None, len(keys) * self._spec.page_size)

    def _damaged(self, page: int, size: int) -> Found:
        log.error(
            "page %d of region %s has %d bytes instead of %d in the page store %s: something else writes to its keys",
            page, self._spec.region, size, self._spec.page_size, self._link.address,
        )  # fmt: skip
        return Found.DAMAGED


class _Mset:
    """MSET commands, laid out once and filled in place: one copy a page, where redis-py's packer takes two.

    Measured at 64 pages of 4 KiB: 4.0 us a page against 5.2, and 2.6 us of this process's time against 4.1.
    """

    HEADER = 32  # room before the first record for b"*<count>\r\n$4\r\nMSET\r\n"

    def __init__(self, prefix: bytes, page_size: int, pages_per_command: int) -> None:
        before_key = b"$%d\r\n%b" % (len(prefix) + 8, prefix)
        before_value = b"\r\n$%d\r\n" % page_size
        key, value = len(before_key), len(before_key) + 8 + len(before_value)
        self._record = value + page_size + 2
        self._buffer = np.empty(self.HEADER + pages_per_command * self._record, np.uint8)
        records = self._buffer[self.HEADER :].reshape(pages_per_command, self._record)
        records[:, :key] = np.frombuffer(before_key, np.uint8)
        records[:, key + 8 : value] = np.frombuffer(before_value, np.uint8)
        records[:, value + page_size :] = np.frombuffer(b"\r\n", np.uint8)
        self._keys = records[:, key : key + 8]
        self._values = records[:, value : value + page_size]

    def commands(self, pages: PageNumbers, data: PageBytes) -> Iterator[list[memoryview]]:
        """Each must have been sent before the next is asked for: they share one buffer."""
        numbers = pages.astype(">u8").view(np.uint8).reshape(-1, 8)
        step = len(self._keys)
        for start in range(0, len(pages), step):
            count = min(step, len(pages) - start)
            self._keys[:count] = numbers[start : start + count]
            self._values[:count] = data[start : start + count]
            header = b"*%d\r\n$4\r\nMSET\r\n" % (2 * count + 1)
            first = self.HEADER - len(header)
            self._buffer[first : self.HEADER] = np.frombuffer(header, np.uint8)
            yield [self._buffer.data[first : self.HEADER + count * self._record]]

"""RedisStore's pages on a real server: stored, fetched, overwritten, deleted, damaged, made durable, removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import redis
from store_pages import REGION_ID, contents, empty, first_pages, numbers, spec_for
from store_servers import RedisServer

from dmh.errors import StoreUnavailable
from dmh.store.base import Found, StoreSpec
from dmh.store.redis import RedisStore

StartRedis = Callable[..., RedisServer]


def key(page: int) -> bytes:
    return b"dmh:" + REGION_ID + b":" + page.to_bytes(8, "big")


@pytest.fixture
def spec(redis_server: RedisServer) -> StoreSpec:
    return spec_for(redis_server.unix_url)


@pytest.fixture
def store(spec: StoreSpec) -> Iterator[RedisStore]:
    assert RedisStore.prepare(spec) == []
    store = RedisStore.open(spec, [])
    yield store
    store.close()


class TestPages:
    @pytest.mark.parametrize(("page_size", "most"), [(4096, 400), (65536, 40), (2 << 20, 3)])
    @pytest.mark.parametrize("transport", ["tcp", "unix"])
    def test_any_batch_comes_back(
        self, redis_server: RedisServer, rng: np.random.Generator, transport: str, page_size: int, most: int
    ) -> None:
        url = redis_server.url if transport == "tcp" else redis_server.unix_url
        store = RedisStore.open(spec_for(url, page_size=page_size), [])
        model: dict[int, bytes] = {}
        for count in (1, most, *rng.integers(1, most + 1, 4)):
            pages = rng.choice(2 * most, count, replace=False).astype(np.uint64)
            data = contents(rng, count, page_size)
            store.put_many(pages, data)
            model.update(zip(pages.tolist(), (row.tobytes() for row in data), strict=True))

            asked = rng.permutation(2 * most).astype(np.uint64)  # twice as many as a batch: some absent, some rewritten
            out = empty(len(asked), page_size)
            found = store.get_many(asked, out)
            assert found.tolist() == [page in model for page in asked.tolist()]
            for i in np.flatnonzero(found):
                assert out[i].tobytes() == model[int(asked[i])]
        store.close()

    def test_many_commands_ahead(self, store: RedisStore, rng: np.random.Generator) -> None:
        pages = rng.permutation(2000).astype(np.uint64)  # 63 commands: the window slides
        data = contents(rng, 2000)
        store.put_many(pages, data)
        out = empty(2000)
        assert store.get_many(pages, out).all()
        assert np.array_equal(out, data)

    def test_extreme_page_numbers(self, store: RedisStore, rng: np.random.Generator) -> None:
        pages, data = numbers(0, 2**32, 2**64 - 1, 0x0D0A0D0A0D0A0D0A), contents(rng, 4)
        store.put_many(pages, data)
        out = empty(4)
        assert store.get_many(pages, out).all()
        assert np.array_equal(out, data)

    def test_empty_batches(self, store: RedisStore) -> None:
        store.put_many(numbers(), empty(0))
        assert store.get_many(numbers(), empty(0)).shape == (0,)
        store.delete_many(numbers())

    def test_overwritten(self, store: RedisStore, rng: np.random.Generator) -> None:
        first, second, out = contents(rng, 3), contents(rng, 2), empty(3)
        store.put_many(numbers(1, 2, 3), first)
        store.put_many(numbers(3, 1), second)
        assert store.get_many(numbers(1, 2, 3), out).all()
        assert np.array_equal(out, [second[1], first[1], second[0]])

    def test_deleted(self, store: RedisStore, rng: np.random.Generator) -> None:
        pages = first_pages(600)
        store.put_many(pages, contents(rng, 600))
        store.delete_many(np.arange(1, 1200, dtype=np.uint64))  # half of them were never there
        assert np.flatnonzero(store.get_many(pages, empty(600))).tolist() == [0]

    def test_two_processes_see_the_same_pages(
        self, store: RedisStore, spec: StoreSpec, rng: np.random.Generator
    ) -> None:
        data, out = contents(rng, 1), empty(1)
        store.put_many(numbers(7), data)
        reader = RedisStore.open(spec, [])
        assert reader.get_many(numbers(7), out).all()
        assert np.array_equal(out, data)
        reader.close()

    def test_a_close_is_not_the_end(self, store: RedisStore, rng: np.random.Generator) -> None:
        store.put_many(numbers(7), contents(rng, 1))
        store.close()
        assert store.get_many(numbers(7), empty(1)).all()


class TestDamage:
    @pytest.mark.parametrize("value", [b"", b"short", bytes(4095), bytes(4097)])
    def test_a_value_of_another_length(
        self,
        store: RedisStore,
        redis_server: RedisServer,
        rng: np.random.Generator,
        value: bytes,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        pages, data = first_pages(200), contents(rng, 200)
        store.put_many(pages, data)
        redis_server.admin().set(key(150), value)
        out = empty(200)
        found = store.get_many(pages, out)
        others = pages != 150
        assert found[150] == Found.DAMAGED
        assert (found[others] == Found.THERE).all()
        assert np.array_equal(out[others], data[others])
        assert f"page 150 of region heap has {len(value)} bytes instead of 4096" in caplog.text

    def test_a_key_of_another_type_is_no_page(
        self, store: RedisStore, redis_server: RedisServer, rng: np.random.Generator
    ) -> None:
        redis_server.admin().rpush(key(5), b"x")
        assert store.get_many(numbers(5), empty(1)).tolist() == [False]
        store.put_many(numbers(5), contents(rng, 1))
        assert store.get_many(numbers(5), empty(1)).tolist() == [True]

    def test_interrupted_in_the_middle(
        self, store: RedisStore, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pages, data = first_pages(200), contents(rng, 200)
        store.put_many(pages, data)
        connection: Any = store._link._connection
        read = connection.read_response
        replies = 0

        def read_one_then_interrupt(**arguments: Any) -> Any:
            nonlocal replies
            replies += 1
            if replies == 2:
                raise KeyboardInterrupt
            return read(**arguments)

        with monkeypatch.context() as patched:
            patched.setattr(connection, "read_response", read_one_then_interrupt)
            with pytest.raises(KeyboardInterrupt):
                store.put_many(pages, data)
        out = empty(1)
        assert store.get_many(numbers(199), out).all()
        assert np.array_equal(out[0], data[199])


class TestRemove:
    @pytest.mark.parametrize(
        "region_id",
        [
            b"*" * 16,
            b"?" * 16,
            b"[a-z]" + b"[^a]" * 2 + b"xyz",
            b"*[]?\\*[]?\\*[]?\\*",
            b"abcdefghijklmno\\",
            b"\\" * 16,
            b"[" * 16,
            b"]^-\x00\n\r\xff :*dmh:ab",
        ],
    )
    def test_only_its_own_region(self, redis_server: RedisServer, rng: np.random.Generator, region_id: bytes) -> None:
        assert len(region_id) == 16
        own = spec_for(redis_server.unix_url, region_id=region_id)
        other = replace(own, region_id=b"axxxxxxxxxxxxxxx")
        near = replace(own, region_id=region_id[:-1] + bytes([region_id[-1] ^ 1]))
        pages, data, stores = first_pages(300), contents(rng, 300), []
        for spec in (own, other, near):
            stores.append(RedisStore.open(spec, []))
            stores[-1].put_many(pages, data)
        server = redis_server.admin()
        server.set("somebody else's", "x")
        RedisStore.remove(own)
        assert [store.get_many(pages, empty(300)).sum() for store in stores] == [0, 300, 300]
        assert server.dbsize() == 601

    def test_a_server_that_is_gone(self, redis_server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
        redis_server.stop()
        RedisStore.remove(spec_for(redis_server.unix_url))
        assert "pages of region heap were left behind" in caplog.text
        RedisStore.remove(spec_for("redis://h/not-a-number"))

    def test_also_the_marker_of_flush(self, start_redis: StartRedis) -> None:
        server = start_redis(appendonly="everysec")
        store = RedisStore.open(spec_for(server.unix_url), [])
        store.flush()
        RedisStore.remove(spec_for(server.unix_url))
        assert server.admin().dbsize() == 0


class TestFlush:
    def test_without_append_only_file(self, store: RedisStore, redis_server: RedisServer) -> None:
        store.flush()
        assert redis_server.admin().dbsize() == 0

    @pytest.mark.parametrize("appendfsync", ["always", "everysec"])
    def test_waits_for_the_append_only_file(
        self, start_redis: StartRedis, rng: np.random.Generator, appendfsync: str
    ) -> None:
        server = start_redis(appendonly=appendfsync)
        _need_waitaof(server)
        writer, flusher = (RedisStore.open(spec_for(server.unix_url), []) for _ in range(2))
        writer.put_many(numbers(1), contents(rng, 1))
        flusher.flush()
        assert server.admin().info("commandstats")["cmdstat_waitaof"]["calls"] >= 1

    def test_does_not_claim_what_did_not_happen(self, start_redis: StartRedis, rng: np.random.Generator) -> None:
        server = start_redis(appendonly="no")  # the server never syncs of its own accord
        _need_waitaof(server)
        writer, flusher = (RedisStore.open(spec_for(server.unix_url, timeout=0.5), []) for _ in range(2))
        writer.put_many(numbers(1), contents(rng, 1))
        with pytest.raises(StoreUnavailable, match="not on disk"):
            flusher.flush()


def _need_waitaof(server: RedisServer) -> None:
    try:
        server.admin().execute_command("WAITAOF", 0, 0, 1)
    except redis.ResponseError:
        pytest.skip("needs WAITAOF (Redis 7.2)")


def test_stats(store: RedisStore, redis_server: RedisServer) -> None:
    stats = store.stats()
    assert stats["address"] == redis_server.unix_url
    assert stats["server_version"] == redis_server.admin().info("server")["redis_version"]
    assert stats["used_memory"] > 0
    assert (stats["maxmemory"], stats["restarts"]) == (0, 0)

"""RedisStore with servers killed, frozen, full, locked, unsuitable or odd: which error, how soon, and what it says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import pytest
import redis
from store_pages import contents, empty, first_pages, numbers, spec_for
from store_servers import RedisServer, ScriptedServer, free_port

from dmh.errors import StoreError, StoreUnavailable
from dmh.store.redis import RedisStore
from dmh.store.redis_link import public_address

SECRET = "s3cr3t-word"
StartRedis = Callable[..., RedisServer]


def wait_until(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.001)


@pytest.fixture
def store(redis_server: RedisServer) -> Iterator[RedisStore]:
    store = RedisStore.open(spec_for(redis_server.unix_url), [])
    yield store
    store.close()


class TestServerTrouble:
    def test_killed_and_back_empty(
        self, store: RedisStore, redis_server: RedisServer, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
    ) -> None:
        store.put_many(numbers(1, 2), contents(rng, 2))
        redis_server.kill()
        for _ in range(2):  # the connection that broke, then a connection that cannot be made
            with pytest.raises(StoreUnavailable, match=r"unix:///.*redis\.sock"):
                store.get_many(numbers(1, 2), empty(2))
        assert store.stats()["unavailable"]
        redis_server.start()
        assert store.get_many(numbers(1, 2), empty(2)).tolist() == [False, False]
        assert store.stats()["restarts"] == 1
        assert "another process than before" in caplog.text

    def test_killed_and_back_with_its_pages(self, start_redis: StartRedis, rng: np.random.Generator) -> None:
        server = start_redis(appendonly="always")
        store = RedisStore.open(spec_for(server.url), [])
        data, out = contents(rng, 100), empty(100)
        store.put_many(first_pages(100), data)
        store.flush()
        server.kill()
        server.start()
        with pytest.raises(StoreUnavailable):  # the old connection; no hidden second try
            store.get_many(first_pages(100), out)
        assert store.get_many(first_pages(100), out).all()
        assert np.array_equal(out, data)
        assert store.stats()["restarts"] == 1

    def test_a_lost_connection_is_no_restart(self, store: RedisStore, redis_server: RedisServer) -> None:
        redis_server.admin().execute_command("CLIENT", "KILL", "TYPE", "normal")
        with pytest.raises(StoreUnavailable):
            store.get_many(numbers(1), empty(1))
        assert store.get_many(numbers(1), empty(1)).tolist() == [False]
        assert store.stats()["restarts"] == 0

    @pytest.mark.parametrize("count", [1, 1000])
    def test_frozen(self, redis_server: RedisServer, rng: np.random.Generator, count: int) -> None:
        store = RedisStore.open(spec_for(redis_server.unix_url, timeout=2.0), [])
        pages, first, second = first_pages(count), contents(rng, count), contents(rng, count)
        store.put_many(pages, first)
        redis_server.pause()
        for attempt in (lambda: store.get_many(pages, empty(count)), lambda: store.put_many(pages, second)):
            began = time.monotonic()
            with pytest.raises(StoreUnavailable):
                attempt()
            assert time.monotonic() - began < 1.5  # well below spec.timeout: room for the caller's next try
        redis_server.resume()
        # What was sent before the freeze is answered now, on a connection that nobody listens to any more.
        out = empty(count)
        assert store.get_many(pages, out).all()
        store.put_many(pages, second)
        assert store.get_many(pages, out).all()
        assert np.array_equal(out, second)
        assert store.stats()["restarts"] == 0
        store.close()

    def test_out_of_memory(self, start_redis: StartRedis, rng: np.random.Generator) -> None:
        server = start_redis(maxmemory=6 << 20)
        RedisStore.prepare(spec_for(server.unix_url))  # noeviction is the default
        store = RedisStore.open(spec_for(server.unix_url), [])
        data, acknowledged = contents(rng, 32), 0

        def fill() -> None:
            nonlocal acknowledged
            for first in range(0, 4096, 32):
                store.put_many(first_pages(32) + np.uint64(first), data)
                acknowledged = first + 32

        with pytest.raises(StoreUnavailable, match="used memory > 'maxmemory'"):
            fill()
        assert acknowledged > 0
        assert store.get_many(first_pages(acknowledged), empty(acknowledged)).all()
        server.admin().config_set("maxmemory", 0)
        store.put_many(first_pages(32) + np.uint64(acknowledged), data)

    def test_demoted(self, store: RedisStore, redis_server: RedisServer, rng: np.random.Generator) -> None:
        server = redis_server.admin()
        store.put_many(numbers(1), contents(rng, 1))
        server.config_set("replica-serve-stale-data", "yes")
        server.execute_command("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(StoreUnavailable, match="read only replica"):
            store.put_many(numbers(1), contents(rng, 1))
        server.config_set("replica-serve-stale-data", "no")
        with pytest.raises(StoreUnavailable, match="MASTER is down"):
            store.get_many(numbers(1), empty(1))
        server.execute_command("REPLICAOF", "NO", "ONE")
        assert store.get_many(numbers(1), empty(1)).all()

    def test_busy_with_a_script(self, store: RedisStore, redis_server: RedisServer, rng: np.random.Generator) -> None:
        server = redis_server.admin()
        server.config_set("busy-reply-threshold", 1)
        store.put_many(numbers(1), contents(rng, 1))

        def run_script() -> None:
            with suppress(redis.ResponseError):  # it is killed
                server.eval("while 1 do end", 0)

        runner = threading.Thread(target=run_script)
        runner.start()
        seen: list[str] = []

        def busy() -> bool:  # until the script runs, and for its first millisecond, requests still succeed
            try:
                store.get_many(numbers(1), empty(1))
            except StoreUnavailable as error:
                seen.append(str(error))
            return bool(seen)

        try:
            wait_until(busy, "a BUSY reply")
        finally:
            wait_until(lambda: _accepted(redis_server, "SCRIPT", "KILL"), "the end of the script")
            runner.join()
        assert "busy running a script" in seen[0]
        assert store.get_many(numbers(1), empty(1)).all()


def _accepted(server: RedisServer, *command: str) -> bool:
    try:
        return bool(server.admin().execute_command(*command))
    except redis.ResponseError:
        return False


class TestPrepare:
    def test_unreachable(self, redis_server: RedisServer) -> None:
        redis_server.stop()
        for url in (redis_server.url, redis_server.unix_url):
            secret_url = url.replace("://", f"://user:{SECRET}@")
            with pytest.raises(StoreUnavailable, match="start a Redis or Valkey server there") as info:
                RedisStore.prepare(spec_for(secret_url))
            assert public_address(url) in str(info.value)
            assert SECRET not in str(info.value)

    @pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl", "allkeys-random"])
    def test_a_server_that_forgets(self, start_redis: StartRedis, policy: str) -> None:
        server = start_redis(maxmemory=64 << 20, options={"maxmemory-policy": policy})
        with pytest.raises(
            StoreError, match=f"maxmemory-policy is {policy}; set maxmemory-policy to noeviction"
        ) as info:
            RedisStore.prepare(spec_for(server.unix_url))
        assert not isinstance(info.value, StoreUnavailable)
        server.admin().config_set("maxmemory", 0)
        RedisStore.prepare(spec_for(server.unix_url))
        server.admin().config_set("maxmemory", 64 << 20)
        server.admin().config_set("maxmemory-policy", "noeviction")
        RedisStore.prepare(spec_for(server.unix_url))

    def test_cluster_member(self, start_redis: StartRedis) -> None:
        # The bus would be on port + 10000, which is often beyond 65535.
        server = start_redis(options={"cluster-enabled": "yes", "cluster-port": str(free_port())})
        with pytest.raises(StoreError, match="part of a Redis Cluster"):
            RedisStore.prepare(spec_for(server.unix_url))

    def test_replica(self, redis_server: RedisServer) -> None:
        redis_server.admin().execute_command("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(StoreError, match=r"is a replica; name its primary, 127\.0\.0\.1:1"):
            RedisStore.prepare(spec_for(redis_server.unix_url))

    def test_a_user_without_config(self, redis_server: RedisServer, rng: np.random.Generator) -> None:
        allowed = ["+ping", "+info", "+mget", "+mset", "+unlink", "+scan", "+set", "+select"]
        redis_server.admin().execute_command("ACL", "SETUSER", "pager", "on", f">{SECRET}", "~dmh:*", *allowed)
        spec = spec_for(redis_server.url.replace("://", f"://pager:{SECRET}@"))
        RedisStore.prepare(spec)
        store = RedisStore.open(spec, [])
        store.put_many(numbers(1), contents(rng, 1))
        assert store.get_many(numbers(1), empty(1)).all()
        store.flush()
        RedisStore.remove(spec)
        assert not store.get_many(numbers(1), empty(1)).any()

    def test_a_user_without_info(self, redis_server: RedisServer) -> None:
        redis_server.admin().execute_command("ACL", "SETUSER", "pager", "on", f">{SECRET}", "~*", "+mget")
        with pytest.raises(StoreError, match=r"forbids a command: .*'info'") as info:
            RedisStore.prepare(spec_for(redis_server.url.replace("://", f"://pager:{SECRET}@")))
        assert not isinstance(info.value, StoreUnavailable)


class TestSecrets:
    @pytest.mark.parametrize("given", [None, SECRET])
    def test_wrong_password(self, start_redis: StartRedis, given: str | None, caplog: pytest.LogCaptureFixture) -> None:
        server = start_redis(requirepass="right")
        RedisStore.prepare(spec_for(server.url))
        url = server.url.replace(":right@", f":{given}@" if given else "")
        for attempt in (RedisStore.prepare, lambda spec: RedisStore.open(spec, [])):
            with pytest.raises(StoreError, match=f"redis://127.0.0.1:{server.port}/0") as info:
                attempt(spec_for(url))
            assert not isinstance(info.value, StoreUnavailable)
            error: BaseException | None = info.value
            while error is not None:  # everything that a traceback would show
                assert SECRET not in str(error)
                error = error.__cause__ or error.__context__
        RedisStore.remove(spec_for(url))
        assert "left behind" in caplog.text
        assert SECRET not in caplog.text

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("redis://h", "redis://h:6379/0"),
            (f"redis://u:{SECRET}@h:1/2", "redis://h:1/2"),
            (f"rediss://:{SECRET}@[::1]:7?db=3", "rediss://[::1]:7/3"),
            (f"redis://h/4?password={SECRET}&username=u", "redis://h:6379/4"),
            (f"redis://:{SECRET}@@h", "redis://h:6379/0"),
            (f"unix://u:{SECRET}@/run/r.sock?db=2", "unix:///run/r.sock?db=2"),
            (f"unix:///run/r.sock?password={SECRET}", "unix:///run/r.sock"),
        ],
    )
    def test_what_of_a_url_is_shown(self, url: str, shown: str) -> None:
        assert public_address(url) == shown

    @pytest.mark.parametrize(
        "url",
        [
            f"redis://:{SECRET}/x@h",
            f"redis://:12/{SECRET}@h",
            f"redis://u:1/{SECRET}@h",
            f"redis://:12#{SECRET}@h",
            f"redis://u:1#{SECRET}@h",
            f"redis://:12?{SECRET}@h",
            f"redis://[{SECRET}@h",
            f"redis://h:1/{SECRET}",
            f"redis://u:{SECRET}\u2100@h",
            f"unix://:{SECRET}/x@/run/r.sock",
            f"unix://{SECRET}",
            f"http://{SECRET}",
            f"redis://h?socket_timeout={SECRET}",
            f"redis://h?{SECRET}=1",
        ],
    )
    def test_a_url_that_cannot_be_understood_is_not_quoted(self, url: str) -> None:
        with pytest.raises(StoreError, match=r"store\.url") as info:
            RedisStore.prepare(spec_for(url))
        assert type(info.value) is StoreError
        assert SECRET not in str(info.value)
        assert info.value.__suppress_context__ or info.value.__context__ is None

    def test_the_url_cannot_lengthen_the_time_limits(self, redis_server: RedisServer) -> None:
        url = redis_server.url + "?socket_timeout=100&socket_connect_timeout=100&retry_on_timeout=yes&protocol=3"
        store = RedisStore.open(spec_for(url, timeout=2.0), [])
        redis_server.pause()
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            store.get_many(numbers(1), empty(1))
        assert time.monotonic() - began < 1.5

    def test_tls(self, start_redis: StartRedis, rng: np.random.Generator) -> None:
        server = start_redis(tls=True, requirepass="right")
        RedisStore.prepare(spec_for(server.url))
        store = RedisStore.open(spec_for(server.url), [])
        data, out = contents(rng, 100), empty(100)
        store.put_many(first_pages(100), data)
        assert store.get_many(first_pages(100), out).all()
        assert np.array_equal(out, data)
        with pytest.raises(StoreError, match="certificate verify failed") as info:
            RedisStore.prepare(spec_for(server.url.split("?")[0]))
        assert not isinstance(info.value, StoreUnavailable)


@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        (b"-LOADING Redis is loading the dataset in memory\r\n", StoreUnavailable, "loading the dataset"),
        (b"-MISCONF Redis is configured to save RDB snapshots\r\n", StoreUnavailable, "MISCONF Redis is configured"),
        (b"-NOREPLICAS Not enough good replicas to write.\r\n", StoreUnavailable, "Not enough good replicas"),
        (b"-CLUSTERDOWN The cluster is down\r\n", StoreUnavailable, "cluster is down"),
        (b"-NOAUTH Authentication required.\r\n", StoreError, "Authentication required"),
        (b"-NOPERM no permission\r\n", StoreError, "no permission"),
        (b"-WRONGTYPE Operation against a key\r\n", StoreError, "WRONGTYPE Operation"),
        (b"-ERR unknown command 'MGET'\r\n", StoreError, "unknown command"),
        (b"-MOVED 1 127.0.0.1:7000\r\n", StoreError, "127.0.0.1:7000"),
        (b"HTTP/1.1 400 Bad Request\r\n", StoreError, "Protocol error"),
        (b"*1\r\n$1\r\nx\r\n", StoreError, "one value for each key"),
        (b"*3\r\n$-1\r\n$-1\r\n$-1\r\n", StoreError, "one value for each key"),
        (b"+OK\r\n", StoreError, "one value for each key"),
        (b"*2\r\n$4096\r\nhalf a pa", StoreUnavailable, "closed by server"),
        (b"", StoreUnavailable, "closed by server"),
    ],
)
def test_rare_replies(reply: bytes, kind: type[StoreError], words: str) -> None:
    server = ScriptedServer(reply)
    store = RedisStore.open(spec_for(server.url), [])
    with pytest.raises(StoreError, match=words) as info:
        store.get_many(numbers(1, 2), empty(2))
    assert type(info.value) is kind
    assert server.url in str(info.value)
    assert info.value.region == "heap"
    store.close()
    server.close()


def test_a_server_that_answers_in_drips() -> None:
    """The socket is never silent for long, so its time-out alone would let the request go on and on."""
    server = ScriptedServer(100 * (b"*32\r\n" + 32 * b"$-1\r\n"), drip=64)
    store = RedisStore.open(spec_for(server.url, timeout=1.0), [])
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="request not finished after"):
        store.get_many(first_pages(3200), empty(3200))
    assert time.monotonic() - began < 2.0  # the whole reply would take 2.6 s
    store.close()
    server.close()

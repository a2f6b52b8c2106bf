"""The native reader of a Redis server's pages, over a real socket: replies in every form and cut in every place.

What the pages of a real server are, and what its troubles lead to, is in `test_redis_store.py` and
`test_redis_store_trouble.py`.
"""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from store_pages import contents, empty, first_pages, numbers, spec_for
from store_servers import RedisServer

from dmh.errors import StoreError, StoreUnavailable
from dmh.native import ffi, lib
from dmh.store.base import Found
from dmh.store.redis import RedisStore

SIZE = 4096
GREETINGS = {b"CLIENT": b"+OK\r\n", b"PING": b"+PONG\r\n", b"INFO": b"$11\r\nrun_id:abc\n\r\n"}


class Server:
    """Answers what a connection begins with, and then each MGET with the next reply of a list, piece by piece."""

    def __init__(self) -> None:
        self.replies: list[list[bytes]] = []
        self.commands: list[bytes] = []
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # ends accept
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._converse(connection)

    def _converse(self, connection: socket.socket) -> None:
        try:
            while command := connection.recv(1 << 16):
                answer = next((answer for name, answer in GREETINGS.items() if name in command), None)
                if answer is not None:
                    connection.sendall(answer)
                    continue
                # One request's commands may arrive together: each has its reply in the list.
                self.commands += [b"*" + part for part in command.split(b"*")[1:] if b"MGET" in part]
                while self.commands and self.replies:
                    self.commands.pop(0)
                    for piece in self.replies.pop(0):
                        if piece == b"hang up":
                            return
                        connection.sendall(piece)
                        _until_read(connection)
        except OSError:
            pass


def _until_read(connection: socket.socket) -> None:
    """Until the peer's kernel has acknowledged every byte: so that pieces are received as pieces, mostly."""
    for _ in range(20):
        if int.from_bytes(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28)[24:28], "little") == 0:
            return
        time.sleep(0)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def value(content: bytes | None) -> bytes:
    return b"$-1\r\n" if content is None else b"$%d\r\n%b\r\n" % (len(content), content)


def reply(*contents: bytes | None) -> bytes:
    return b"*%d\r\n" % len(contents) + b"".join(value(content) for content in contents)


def cut(whole: bytes, *places: int) -> list[bytes]:
    ends = [0, *places, len(whole)]
    return [whole[a:b] for a, b in itertools.pairwise(ends) if a < b]


def open_store(server: Server, **settings: float) -> RedisStore:
    return RedisStore.open(spec_for(server.url, **settings), [])


def test_native_code_reads(redis_server: RedisServer, rng: np.random.Generator) -> None:
    """Not redis-py, which would do as well, only slower: nothing else here would tell."""
    store = RedisStore.open(spec_for(redis_server.unix_url), [])
    pages, data = first_pages(100), contents(rng, 100)
    store.put_many(pages, data)

    def refuse(**arguments: object) -> None:
        raise AssertionError("redis-py was asked to read")

    store._link._connection.read_response = refuse  # type: ignore[method-assign,assignment]
    out = empty(100)
    assert store.get_many(pages, out).all()
    assert np.array_equal(out, data)
    store.close()


def test_cut_anywhere(server: Server, rng: np.random.Generator) -> None:
    """Every form of a value, and the reply cut at every place near the beginning and the end of each."""
    data = contents(rng, 2)
    parts = [b"*4\r\n", value(data[0].tobytes()), value(None), value(b"short"), value(data[1].tobytes())]
    whole = b"".join(parts)
    starts = np.cumsum([len(part) for part in parts])
    places = sorted({p for start in starts for p in range(start - 5, start + 12) if 0 < p < len(whole)})
    store = open_store(server)
    for place in places:
        server.replies = [cut(whole, place)]
        out = empty(4)
        found = store.get_many(first_pages(4), out)
        assert found.tolist() == [Found.THERE, Found.MISSING, Found.DAMAGED, Found.THERE], place
        assert np.array_equal(out[[0, 3]], data)
    assert server.connections == 1
    store.close()


def test_byte_by_byte(server: Server, rng: np.random.Generator) -> None:
    content = contents(rng, 1)[0].tobytes()
    whole = reply(None, content)
    server.replies = [cut(whole, *range(1, 40), *range(len(whole) - 20, len(whole)))]
    store, out = open_store(server), empty(2)
    assert store.get_many(first_pages(2), out).tolist() == [Found.MISSING, Found.THERE]
    assert out[1].tobytes() == content
    store.close()


@pytest.mark.parametrize("length", [0, 1, 4095, 4097, 300_000])
def test_a_value_of_another_length_in_between(
    server: Server, rng: np.random.Generator, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = contents(rng, 2)
    server.replies = [[reply(data[0].tobytes(), bytes(length), data[1].tobytes())]]
    store, out = open_store(server), empty(3)
    assert store.get_many(first_pages(3), out).tolist() == [Found.THERE, Found.DAMAGED, Found.THERE]
    assert np.array_equal(out[[0, 2]], data)
    assert f"page 1 of region heap has {length} bytes instead of 4096" in caplog.text
    store.close()


def test_an_error_behind_other_replies(server: Server, rng: np.random.Generator) -> None:
    """Its first bytes have been received together with the reply before it."""
    row = contents(rng, 1)[0].tobytes()
    good = reply(*[row] * 32)
    server.replies = [[good], [reply(*[None] * 32) + b"-LOADING Redis is load"], [b"ing\r\n"], [good], [good]]
    store = open_store(server)
    with pytest.raises(StoreUnavailable, match="Redis is loading"):
        store.get_many(first_pages(200), empty(200))
    store.close()


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        ([b"*2\r\n$4096\r\n", b"hang up"], StoreUnavailable, "closed by server"),
        ([b"*2", b"hang up"], StoreUnavailable, "closed by server"),
        ([b"*2\r\n:1\r\n:2\r\n"], StoreError, "malformed"),
        ([b"*2\r\n$-2\r\n$-1\r\n"], StoreError, "malformed"),
        ([b"*2\r\n$99999999999999999999\r\n"], StoreError, "malformed"),
        ([b"*2\r\n$\r\n$-1\r\n"], StoreError, "malformed"),
        ([b"*2\r\n$1\r\nxyz"], StoreError, "malformed"),
        ([b"*2\r\n$-1\r\n$-1\r\n+more\r\n"], StoreError, "malformed"),
        ([b"$-1\r\n"], StoreError, "one value for each key"),
        ([b"*-1\r\n"], StoreError, "one value for each key"),
    ],
)
def test_what_is_no_answer(server: Server, answer: list[bytes], kind: type[StoreError], words: str) -> None:
    server.replies = [answer]
    store = open_store(server)
    with pytest.raises(StoreError, match=words) as info:
        store.get_many(numbers(1, 2), empty(2))
    assert type(info.value) is kind
    # The connection has been given up, with whatever is still to come over it.
    server.replies = [[reply(None, None)]]
    assert store.get_many(numbers(1, 2), empty(2)).tolist() == [Found.MISSING, Found.MISSING]
    assert server.connections == 2
    store.close()


@pytest.mark.parametrize(("pages", "words"), [(2, "request not finished"), (3200, "Timeout reading")])
def test_silence_ends_a_request(server: Server, pages: int, words: str) -> None:
    server.replies = [[b"*%d\r\n$4096\r\nhalf a pa" % min(pages, 32)]]
    store = open_store(server, timeout=4.0)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match=words):
        store.get_many(first_pages(pages), empty(pages))
    assert 0.2 < time.monotonic() - began < 0.9  # of 3200 pages the whole request might take 1 s
    store.close()


def test_more_replies_than_the_socket_holds(redis_server: RedisServer, rng: np.random.Generator) -> None:
    """A few hundred MiB of what is read: neither side waits for the other for good."""
    store = RedisStore.open(spec_for(redis_server.unix_url, page_size=1 << 20), [])
    data = contents(rng, 20, 1 << 20)
    store.put_many(first_pages(20), data)
    for _ in range(10):
        out = empty(20, 1 << 20)
        assert store.get_many(first_pages(20), out).all()
        assert np.array_equal(out, data)
    store.close()


def test_a_value_at_the_end_of_the_receive_buffer(rng: np.random.Generator) -> None:
    """The whole reply is there before it is asked for, so what is received at a time is known: a buffer full."""
    page, full = contents(rng, 1), 128 << 10
    for left in range(24):  # bytes of the second value that still fit
        begin = b"*2\r\n$%d\r\n" % (full - 100)
        length = full - left - len(begin) - 2
        begin = begin.replace(b"%d" % (full - 100), b"%d" % length)
        server, client = socket.socketpair()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        with server, client:
            server.settimeout(10)
            server.sendall(begin + bytes(length) + b"\r\n" + value(page[0].tobytes()))
            reader = ffi.gc(lib.dmh_redis_new(b"p", 1, SIZE, 2, 4), lib.dmh_redis_free)
            reader.fd, reader.silence_ms, reader.connect_ms, reader.most_ms = client.fileno(), 1000, 1000, 1000
            reader.slowest = 1000
            out, found, lengths = empty(2), np.zeros(2, np.uint8), np.zeros(2, np.uint64)
            result = lib.dmh_redis_get(
                reader, ffi.from_buffer("uint64_t[]", numbers(1, 2)), 2, ffi.from_buffer("uint8_t[]", out),
                ffi.from_buffer("uint8_t[]", found), ffi.from_buffer("uint64_t[]", lengths),
            )  # fmt: skip
            assert (result, found.tolist(), int(lengths[0])) == (0, [Found.DAMAGED, Found.THERE], length), left
            assert np.array_equal(out[1], page[0])


def test_a_connection_that_native_code_has_given_up_is_not_used_again(
    redis_server: RedisServer, rng: np.random.Generator
) -> None:
    """A reply may still come over it, which the next request would take for its own."""
    store = RedisStore.open(spec_for(redis_server.unix_url), [])
    data, out = contents(rng, 2), empty(1)
    store.put_many(first_pages(2), data)
    link, reader = store._link, store.remote()
    link._connection.send_packed_command(link.pack("MGET", *store._keys(numbers(1))), check_health=False)
    reader.fd, reader.broken = -1, 1  # as in a resolver
    assert store.get_many(numbers(0), out).all()
    assert np.array_equal(out[0], data[0])
    assert reader.fd >= 0
    store.close()


def test_no_reader_for_a_prefix_that_is_too_long() -> None:
    make: Callable[..., object] = lib.dmh_redis_new
    assert not make(bytes(100), 100, SIZE, 32, 4)

"""One process's connection to one Redis or Valkey server: requests and replies, time limits, the sorting of errors.

Owns connecting (and noticing that the server is another one than before), pipelining, and the decision whether what
went wrong is worth another try.  Owns no key and no page (`redis.py` does), and no back-off: a request that fails drops
the connection and raises; the next request connects again.  Used by `redis.py`.

Pages come in over the same connection past redis-py, where that is a plain socket: native code reads them straight into
their rows (``dmh/native/dmh_redis.c``).  What is no page it leaves to redis-py's parser, so that whatever a server may
say has one meaning here.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import ssl
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, Protocol, cast
from urllib.parse import parse_qs, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from dmh.errors import StoreError, StoreUnavailable
from dmh.native import ffi

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 0.25  # seconds
SLOWEST_LINK = 16 << 20  # bytes a second: a request may take 0.25 s and what its bytes take at this speed
WINDOW = 4  # commands sent ahead of the reply that is being waited for
READ_BYTES = 1 << 20  # a receive buffer larger than redis-py's 64 KiB: 42 instead of 60 us a page of 64 KiB

REFUSALS = (redis.exceptions.AuthenticationError, redis.exceptions.AuthorizationError)  # both are ConnectionErrors
PASSING_KINDS = (
    redis.exceptions.ConnectionError,  # LOADING and "max number of clients reached" are among its subclasses
    redis.exceptions.TimeoutError,
    redis.exceptions.ReadOnlyError,  # a primary that was demoted, or is about to be replaced
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ClusterDownError,  # MASTERDOWN is a subclass
    redis.exceptions.TryAgainError,
    OSError,
)
# First words of passing replies for which redis-py, or redis-py 5, has no class.
PASSING_WORDS = ("BUSY", "MISCONF", "NOREPLICAS", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN")


class _Connection(Protocol):
    """The part of redis-py's connection that is used here (it has no types of its own)."""

    def connect(self) -> None: ...
    def disconnect(self) -> None: ...
    def pack_command(self, *args: bytes | str | int) -> list[bytes]: ...
    def send_packed_command(self, command: Sequence[bytes | memoryview], check_health: bool) -> None: ...
    def read_response(self, disable_decoding: bool) -> Any: ...


class RedisLink:
    """A connection that is made when it is first needed.  Not shared between threads."""

    def __init__(self, url: str, *, region: str, timeout: float, largest_command: int) -> None:
        self.address = public_address(url)
        self.run_id: str | None = None
        self.restarts = 0  # times a new connection found another run_id than the one before it
        self._region = region
        self._timeout = timeout
        self._client_id: int | None = None
        self._reader: Any = None  # native; see lend_to
        self._live = False  # _live: connected, and no reply of an earlier request is still to come
        self.silence = min(CONNECT_TIMEOUT + largest_command / SLOWEST_LINK, timeout / 4)  # longest wait for more bytes
        try:
            pool = redis.ConnectionPool.from_url(url)
            # Set afterwards, because options in the URL win over arguments of from_url: what bounds a request is ours.
            pool.connection_kwargs.update(
                protocol=2,
                retry=Retry(NoBackoff(), 0),
                decode_responses=False,
                socket_connect_timeout=min(CONNECT_TIMEOUT, self.silence),
                socket_timeout=self.silence,
                socket_read_size=READ_BYTES,
            )
            self._connection = cast(_Connection, pool.make_connection())
        except (ValueError, TypeError, redis.RedisError):
            # Not passed on: redis-py's words may quote an option's value.
            raise StoreError(
                f"store.url ({self.address}) has an option that redis-py does not take; "
                "the documentation of redis.Redis.from_url has those it does",
                region=region,
            ) from None

    def pack(self, *command: bytes | str | int) -> Sequence[bytes]:
        return self._connection.pack_command(*command)

    def call(self, *command: bytes | str | int) -> Any:
        replies: list[Any] = []
        self.request([self.pack(*command)], replies.append, 0)
        return replies[0]

    def info(self) -> dict[str, str]:
        return _fields(self.call("INFO"))

    def lend_to(self, reader: Any) -> None:
        """Let this `struct dmh_redis` read over the connection, whenever there is one that it can use."""
        reader.silence_ms = max(1, round(self.silence * 1000))
        reader.connect_ms = round(CONNECT_TIMEOUT * 1000)
        reader.slowest = SLOWEST_LINK // 1000
        reader.most_ms = round(self._timeout * 500)
        self._reader = reader
        self._lend()

    def read(self, reader: Any, get: Callable[[], int], size: int) -> bool:
        """Have the native reader `get` pages over a live connection; connects if need be.

        Args:
            reader: the one that the connection was lent to.
            get: what it does, with a result as `dmh_redis_get` has.
            size: bytes that will be moved in all, for the time limit.

        Returns:
            False where it cannot use this connection.

        Raises:
            StoreError: as `request` does.
        """
        try:
            self._ensure_live()
            if reader.fd < 0:
                return False
            result = get()
            if result < 0:
                raise self._reading_failed(-result, size)
            if result > 0:
                self._parser_feed()(bytes(ffi.buffer(reader.buffer + reader.at, reader.have - reader.at)))
                self._connection.read_response(disable_decoding=True)
                raise self.refusal("answered MGET with something else than one value for each key")
        except BaseException as error:
            self._give_up(error)
            raise
        return True

    def _limit(self, size: int) -> float:
        """Seconds that a request may take which moves so many bytes; the reader's `end_of` is the same."""
        return max(self.silence, min(CONNECT_TIMEOUT + size / SLOWEST_LINK, self._timeout / 2))

    def _reading_failed(self, error: int, size: int) -> redis.RedisError:
        """An errno of the native reader, as redis-py would have put it."""
        if error == errno.ETIME:
            return redis.TimeoutError(f"request not finished after {self._limit(size):.2f} s")
        if error == errno.ETIMEDOUT:
            return redis.TimeoutError("Timeout reading from socket")
        if error == errno.ENOTCONN:
            return redis.ConnectionError("Connection closed by server.")
        if error == errno.EBADMSG:
            return redis.exceptions.InvalidResponse("Protocol Error: a reply to MGET is malformed")
        return redis.ConnectionError(f"Error {error} while reading from socket: {os.strerror(error)}")

    def request(self, commands: Iterable[Sequence[bytes | memoryview]], take: Callable[[Any], None], size: int) -> None:
        """Send commands, at most WINDOW ahead, and hand each reply to `take` in the commands' order.

        Args:
            commands: packed commands; the next is asked for when the one before has been handed to the kernel.
            take: called once a command with its reply; what it raises ends the request.
            size: bytes that will be moved in all, for the time limit.
        """
        limit = self._limit(size)
        deadline = monotonic() + limit
        waiting = 0

        def receive() -> None:
            # The socket's time-out bounds silence; a server that answers in drips is caught here, between replies.
            if monotonic() > deadline:
                raise redis.TimeoutError(f"request not finished after {limit:.2f} s")
            take(self._connection.read_response(disable_decoding=True))

        try:
            self._ensure_live()
            for command in commands:
                if waiting == WINDOW:
                    receive()
                    waiting -= 1
                self._connection.send_packed_command(command, check_health=False)
                waiting += 1
            for _ in range(waiting):
                receive()
        except BaseException as error:
            self._give_up(error)
            raise

    def _give_up(self, error: BaseException) -> None:
        """Drop the connection: replies may still be on their way, and the next request must not take them for its
        own.  Raises a StoreError for an error of the connection or the server.
        """
        self.close()
        if isinstance(error, redis.RedisError | OSError):
            raise self._sorted(error) from error

    def close(self) -> None:
        self._live = False
        if self._reader is not None:
            self._reader.fd = -1
        with suppress(redis.RedisError, OSError):
            self._connection.disconnect()

    def unavailable(self, words: str) -> StoreUnavailable:
        return StoreUnavailable(f"the page store {self.address} is unavailable: {words}", region=self._region)

    def refusal(self, words: str) -> StoreError:
        return StoreError(f"the page store {self.address} {words}", region=self._region)

    def _connect(self) -> None:
        self._connection.connect()
        if self._client_id is not None:
            # What the connection before this one had sent may still be on its way, and overtake what we write next.
            self._ask_if_allowed("CLIENT", "KILL", "ID", self._client_id)
        self._client_id = self._ask_if_allowed("CLIENT", "ID")
        self._connection.send_packed_command(self.pack("INFO", "server"), check_health=False)
        run_id = _fields(self._connection.read_response(disable_decoding=True)).get("run_id")
        if self.run_id not in (None, run_id):
            # Restarted, or failed over.  It may have its pages from an append-only file, so this alone is no error.
            self.restarts += 1
            log.warning("the page store %s is another process than before (run_id %s)", self.address, run_id)
        self.run_id, self._live = run_id, True
        self._lend()

    def _ensure_live(self) -> None:
        if self._live and self._reader is not None and self._reader.broken:
            self.close()
        if not self._live:
            self._connect()

    def _lend(self) -> None:
        """Let the reader use the connection, if that is a plain socket whose bytes can be handed to the parser."""
        if self._reader is None:
            return
        sock = getattr(self._connection, "_sock", None)
        usable = self._live and type(sock) is socket.socket and self._parser_feed() is not None
        self._reader.fd, self._reader.broken = (sock.fileno() if usable and sock else -1), False

    def _parser_feed(self) -> Any:
        """How hiredis takes bytes that somebody else has received; None where redis-py parses without it."""
        return getattr(getattr(getattr(self._connection, "_parser", None), "_reader", None), "feed", None)

    def _ask_if_allowed(self, *command: bytes | str | int) -> int | None:
        """The answer, if it is a number; None where this user may not ask, or there is nothing to tell."""
        self._connection.send_packed_command(self.pack(*command), check_health=False)
        try:
            answer = self._connection.read_response(disable_decoding=True)
        except redis.ResponseError:
            return None
        return answer if isinstance(answer, int) else None

    def _sorted(self, error: redis.RedisError | OSError) -> StoreError:
        words = str(error) or type(error).__name__
        if isinstance(error, REFUSALS) or isinstance(error.__context__, ssl.SSLCertVerificationError):
            return self.refusal(f"cannot be used: {words}; check user, password and certificates in store.url")
        if isinstance(error, redis.exceptions.NoPermissionError):
            return self.refusal(f"forbids a command: {words}; allow MGET MSET UNLINK SCAN SET INFO PING WAITAOF")
        if isinstance(error, PASSING_KINDS) or words.split(" ", 1)[0] in PASSING_WORDS:
            return self.unavailable(words)
        return self.refusal(f"answered with an error: {words}")


def public_address(url: str) -> str:
    """The URL without user, password and options: the only form of it that may appear in a message.

    URLs in which an unescaped character of a password could pass for a host, port, path or option are refused.
    """
    try:
        parts = urlsplit(url)
        unix = parts.scheme == "unix"
        host, port = parts.hostname or "", parts.port
        database = int(parse_qs(parts.query).get("db", ["" if unix else parts.path.strip("/")])[0] or 0)
        if unix:
            sound = (not parts.netloc or parts.netloc.endswith("@")) and parts.path.startswith("/")
        else:
            sound = parts.scheme in ("redis", "rediss") and host != ""
        sound = sound and parts.fragment == ""
    except ValueError:
        sound = False
    if not sound:
        # The parser's own words may quote a piece of the password, so they are not passed on.
        raise StoreError(
            "store.url cannot be understood; write redis://[user:password@]host[:port][/database], rediss://... or "
            "unix://[user:password@]/path/to/socket[?db=number], with special characters in the password as %xx"
        )
    if unix:
        return f"unix://{parts.path}" + (f"?db={database}" if database else "")
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port or 6379}/{database}"


def _fields(info: bytes) -> dict[str, str]:
    """INFO's reply, ``name:value`` a line with comments and blank lines between."""
    lines = info.decode("utf-8", "replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))

"""Real store servers for tests: on free ports, in directories of their own, to be killed, paused and started again.

Owns each server's process and directory; the fixtures in conftest.py own their lifetime.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis

READY_DEADLINE = 20.0  # seconds
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


def require_program(name: str) -> str:
    """The program's path.  Skips the test where it is missing, except on CI, which has to have everything."""
    path = shutil.which(name)
    if path is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"needs {name}")
        pytest.skip(f"needs {name}")
    return path


class RedisServer:
    """One redis-server on 127.0.0.1 and on a Unix socket, without persistence unless `appendonly` is set.

    DMH_REDIS_SERVER in the environment names another server program (another version, or valkey-server).

    Args:
        appendonly: keep an append-only file, with this appendfsync ("always", "everysec", "no").
        maxmemory: bytes.
        requirepass: password of the default user.
        tls: serve TLS, with a certificate of its own, on the port; the Unix socket stays plain.
        options: further configuration, name -> value.
    """

    def __init__(
        self,
        *,
        appendonly: str | None = None,
        maxmemory: int = 0,
        requirepass: str | None = None,
        tls: bool = False,
        options: dict[str, str] | None = None,
    ) -> None:
        self._program = require_program(os.environ.get("DMH_REDIS_SERVER", "redis-server"))
        # Not pytest's tmp_path: a Unix socket's path must stay below 108 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="dmh-redis-"))
        self.socket_path = self.directory / "redis.sock"
        self.port = free_port()
        self.requirepass = requirepass
        self.tls = tls
        self._process: subprocess.Popen[bytes] | None = None
        self._options = {
            "bind": "127.0.0.1",
            "port": "0" if tls else str(self.port),
            "unixsocket": str(self.socket_path),
            "dir": str(self.directory),
            "logfile": str(self.directory / "log"),
            "save": "",
            "appendonly": "yes" if appendonly else "no",
            "appendfsync": appendonly or "everysec",
            "maxmemory": str(maxmemory),
            **({"requirepass": requirepass} if requirepass else {}),
            **(self._tls_options() if tls else {}),
            **(options or {}),
        }

    @property
    def url(self) -> str:
        user = f":{self.requirepass}@" if self.requirepass else ""
        if self.tls:
            return f"rediss://{user}127.0.0.1:{self.port}?ssl_ca_certs={self.directory / 'cert.pem'}"
        return f"redis://{user}127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        user = f":{self.requirepass}@" if self.requirepass else ""
        return f"unix://{user}{self.socket_path}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def start(self) -> None:
        """Start, or start again on the same port and directory; returns when it answers."""
        assert self._process is None, "the server is running already"
        arguments = [part for name, value in self._options.items() for part in (f"--{name}", value)]
        self._process = subprocess.Popen(
            [self._program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            preexec_fn=_die_with_parent,
        )
        deadline = time.monotonic() + READY_DEADLINE
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                log = (self.directory / "log").read_text(errors="replace")
                self.kill()
                if "Failed finding TLS support" in log:
                    pytest.skip("needs a redis-server that was built with TLS")
                raise RuntimeError(f"{self._program} did not become ready:\n{log}")
            time.sleep(0.002)  # between two PINGs: there is nothing to wait on until it listens

    def stop(self) -> None:
        """End in an orderly way, as an operator would."""
        assert self._process is not None
        self._process.terminate()
        self._process.wait(READY_DEADLINE)
        self._process = None

    def kill(self) -> None:
        """SIGKILL, which also ends a paused server."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(READY_DEADLINE)
        self._process = None

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nobody answers.  Returns when the whole process stands still."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        if self._process is not None:
            self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def admin(self) -> Any:  # redis-py's client is typed by halves
        """A client of its own, to look and meddle behind the store's back."""
        return redis.Redis(unix_socket_path=str(self.socket_path), password=self.requirepass, protocol=2)

    def _answers(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(1)
                probe.connect(str(self.socket_path))
                probe.sendall(b"PING\r\n")
                # -NOAUTH comes from a server that is up and wants a password; -LOADING from one that is not up yet.
                return probe.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False

    def _tls_options(self) -> dict[str, str]:
        cert, key = self.directory / "cert.pem", self.directory / "key.pem"
        request = (
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=dmh-test "
            f"-addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {cert}"
        )
        subprocess.run([require_program("openssl"), *request.split()], check=True, capture_output=True)
        return {
            "tls-port": str(self.port),
            "tls-cert-file": str(cert),
            "tls-key-file": str(key),
            "tls-auth-clients": "no",
        }


class ScriptedServer:
    """Speaks just enough Redis to be connected to, answers the first other command with `reply`, and hangs up.

    Args:
        reply: bytes, well-formed or not.
        drip: send only so many of them at a time, every 10 ms.
    """

    def __init__(self, reply: bytes, drip: int | None = None) -> None:
        self._reply = reply
        self._drip = drip
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # ends accept
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while not self._closing.is_set():
            with suppress(OSError):  # the client hung up, or the listener was shut down
                connection, _ = self._listener.accept()
                with connection:
                    self._converse(connection)

    def _converse(self, connection: socket.socket) -> None:
        greetings = {b"CLIENT": b"+OK\r\n", b"PING": b"+PONG\r\n", b"INFO": b"$11\r\nrun_id:abc\n\r\n"}
        while command := connection.recv(1 << 16):
            answer = next((answer for name, answer in greetings.items() if name in command), None)
            if answer is None:
                break
            connection.sendall(answer)
        step = self._drip or len(self._reply) or 1
        for start in range(0, len(self._reply), step):
            connection.sendall(self._reply[start : start + step])
            if self._drip and self._closing.wait(0.01):
                break


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _die_with_parent() -> None:
    # pytest-timeout ends a hung run by os._exit, which no teardown survives; the kernel then ends the server.
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

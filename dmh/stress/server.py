"""A Redis or Valkey server of the run's own, to be killed: on a Unix socket in a directory of its own.

With an append-only file, because a server that is killed must have what it has acknowledged.  `appendfsync no` writes
before every answer all the same, and a killed process loses nothing that it has written; only a machine would.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from dmh.errors import StoreError
from dmh.native import lib

READY_SECONDS = 20.0


class Server:
    """One server.  A context manager: leaving it ends the server and removes its files."""

    def __init__(self) -> None:
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        if program is None:
            raise StoreError("--store redis needs redis-server or valkey-server: apt install redis-server")
        self._program = program
        # Not below a long directory: a Unix socket's path must stay below 108 bytes.
        self._directory = Path(tempfile.mkdtemp(prefix="dmh-stress-", dir="/var/tmp"))
        self._socket = self._directory / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """For store.url."""
        return f"unix://{self._socket}"

    def __enter__(self) -> Server:
        try:
            self.start()
            self._wait()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def start(self) -> None:
        """Start it, or start it again with what it had stored; does not wait until it answers."""
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "dir": str(self._directory),
            "logfile": str(self._directory / "log"),
            "save": "",
            "appendonly": "yes",
            "appendfsync": "no",
            "auto-aof-rewrite-min-size": "256mb",
        }
        self._process = subprocess.Popen(
            [self._program, *(part for name, value in options.items() for part in (f"--{name}", value))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            preexec_fn=lib.dmh_die_with_parent,
        )

    def _wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(self._socket))
                return
            time.sleep(0.01)
        raise StoreError(
            f"{self._program} did not start: {(self._directory / 'log').read_text(errors='replace')[-500:]}"
        )

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Connections stay open, and nobody answers."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """The end of a pause."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it and remove what it stored."""
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

"""An application's connection to a service: finding it, speaking to it, and starting one of its own.

Owns the control socket's client end and, for `dmh.open`, the launcher process behind it.  Does not own the mapping
(`dmh.region.mapping`) nor the thread that notices a launcher's end (`dmh.region.guardian`).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

from dmh import errors
from dmh.config import Config
from dmh.errors import DmhError, ServiceError
from dmh.region.guardian import Guardian
from dmh.service.channel import Channel, Message
from dmh.service.paths import SOCKET_VARIABLE, control_socket, running_services, service_directory
from dmh.service.placement import ONE_THREAD

START_SECONDS = 90.0


def find_socket(name: str | None) -> Path:
    """The control socket of the service `name`, or, without a name, of the one this program runs under."""
    if name is None:
        if SOCKET_VARIABLE in os.environ:
            return Path(os.environ[SOCKET_VARIABLE])
        running = running_services()
        if len(running) == 1:
            return control_socket(service_directory(running[0]))
        what = f"several services are running ({', '.join(running)}): name one" if running else "no service is running"
        raise ServiceError(
            f"there is no service to join: {SOCKET_VARIABLE} is not set, and {what}.  Start the program with `dmh "
            "run -c FILE -- ...`, or a service "
            "with `dmh serve -c FILE`, or use dmh.open(FILE)"
        )
    return control_socket(service_directory(name))


def connect(path: Path) -> Channel:
    """A connection to the service at a control socket."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(str(path))
    except OSError as error:
        sock.close()
        raise ServiceError(
            f"no service answers at {path} ({error.strerror}): it has ended, or has another name; `dmh stats` "
            "lists those that run"
        ) from error
    return Channel(sock)


class Connection:
    """A channel that several threads may use: one request at a time, errors raised as what they were.

    With a `guardian` it outlives the launcher: a request that its end has cut off is made again to the launcher that
    takes over.
    """

    def __init__(self, path: Path, launcher: subprocess.Popen[bytes] | None = None) -> None:
        self.path = path
        self.channel = connect(path)
        self.guardian: Guardian | None = None
        self._launcher = launcher
        self._lock = threading.Lock()

    def request(
        self, message: Message, descriptors: tuple[int, ...] = (), *, patient: bool = True
    ) -> tuple[Message, list[int]]:
        """Ask and wait; raises the error that the answer carries.  Without `patient` a launcher that is gone is an
        error at once.
        """
        with self._lock:
            while True:
                try:
                    answer, received = self.channel.request(message, descriptors)
                    break
                except ServiceError:
                    successor = self.guardian.rejoin() if self.guardian and patient else None
                    if successor is None:
                        raise
                    self.channel.close()
                    self.channel = successor
        if "error" in answer:
            kind = getattr(errors, str(answer.get("kind")), ServiceError)
            raise (kind if isinstance(kind, type) and issubclass(kind, DmhError) else ServiceError)(answer["error"])
        return answer, received

    def tell(self, message: Message) -> bool:
        """Send something that has no answer.  False, try later: another thread is in a request, or the launcher is
        gone.
        """
        if not self._lock.acquire(blocking=False):
            return False
        try:
            self.channel.send(message)
        except ServiceError:
            return False
        finally:
            self._lock.release()
        return True

    def renew(self) -> None:
        """In a forked child: a connection of its own.  The one it has inherited is its parent's."""
        self.channel.close()
        self._lock = threading.Lock()
        self._launcher = self.guardian = None
        self.channel = connect(self.path)

    def close(self, patience: float | None = None) -> bool:
        """Hang up; a launcher that was started for this connection ends, and is waited for.

        False where it has not within `patience` seconds; it is killed then.
        """
        self.channel.close()
        if self._launcher is None:
            return True
        try:
            self._launcher.wait(patience)
        except subprocess.TimeoutExpired:
            self._launcher.kill()
            self._launcher.wait()
            return False
        return True


def start_service(config: Config, log: IO[bytes] | None = None) -> Connection:
    """A service of this process's own: a launcher process that ends with the connection.

    What its processes have to say goes to `log`, or to this process's standard error.
    """
    ready_read, ready_write = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dmh.service", "--ready-fd", str(ready_write), "--parent", str(os.getpid())],
            stdin=subprocess.PIPE,
            stderr=log,
            pass_fds=[ready_write],
            env=os.environ | ONE_THREAD,
            process_group=0,  # a terminal's Ctrl-C is for the program; the service ends with it
        )
    finally:
        os.close(ready_write)
    assert process.stdin is not None
    try:
        with process.stdin as settings, open(ready_read, "rb") as ready:
            settings.write(config.to_wire().encode())
            settings.close()
            line = ready.readline().decode()
    except BaseException:  # Ctrl-C while it starts, as likely as not
        process.terminate()
        process.wait()
        raise
    if not line.startswith("ready "):
        process.wait()
        kind, _, text = line.partition(" ")
        raise getattr(errors, kind, ServiceError)(
            text.strip().replace("\x1f", "\n") or "the service ended while it was starting; see its message above"
        )
    return Connection(Path(line[6:].rstrip("\n")), process)


def stop_service(name: str | None) -> None:
    """Tell a running service to stop, and wait until it has."""
    channel = connect(find_socket(name))
    channel.request({"op": "stop"})
    channel.close()


def service_stats(name: str | None) -> dict[str, Any]:
    """The figures of a running service."""
    channel = connect(find_socket(name))
    try:
        answer, _ = channel.request({"op": "stats"})
    finally:
        channel.close()
    stats: dict[str, Any] = answer["stats"]
    return stats

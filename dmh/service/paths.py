"""Where a service's sockets are: a directory of mode 0700, found again by the service's name.

Owns the directory's creation, its check, its lock and the sign of life in it.  One service a name: the launcher holds
the lock for its life, so what a killed service left behind is recognised and cleared.  The sign of life (`alive`) is
held by the launcher and by every worker: whoever can lock it alone knows that nothing of the service is left.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from dmh.errors import ServiceError

SOCKET_VARIABLE = "DMH_SOCKET"
"""Environment variable that names the control socket inside `dmh run`."""


def base_directory() -> Path:
    """The user's directory for services: under XDG_RUNTIME_DIR, else in /tmp."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK):
        return Path(runtime) / "dmh"
    return Path("/tmp") / f"dmh-{os.getuid()}"


def service_directory(name: str) -> Path:
    """Where the service of this name has its sockets, whether or not it runs."""
    return base_directory() / name


def control_socket(directory: Path) -> Path:
    """The control socket in a service's directory."""
    return directory / "control.sock"


def adoption_socket(directory: Path) -> Path:
    """Where a launcher that takes over meets the workers of a dead one."""
    return directory / "adopt.sock"


def ledger_file(directory: Path) -> Path:
    """Where the launcher writes down what its programs hold."""
    return directory / "ledger"


def alive_file(directory: Path) -> Path:
    """The file that every process of a service holds a shared lock on."""
    return directory / "alive"


def hold_alive(directory: Path) -> int:
    """Show that this process, of the service in `directory`, lives: a shared lock that its end gives up, however it
    ends.  Called once by the launcher and by every worker; returns the descriptor, which is not inherited.

    Programs look whether anybody holds it (`dmh_guardian_start`) when their connection has ended.
    """
    fd = os.open(alive_file(directory), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


def running_services() -> list[str]:
    """Names of this user's services that have a control socket."""
    base = base_directory()
    return sorted(path.parent.name for path in base.glob("*/control.sock")) if base.is_dir() else []


class ServiceDirectory:
    """The directory of a service that is being started, or taken over, locked against a second one of the same name."""

    def __init__(self, name: str, *, adopt: bool = False) -> None:
        base = base_directory()
        self.path = service_directory(name)
        if adopt and not self.path.is_dir():
            raise ServiceError(f"there is no service named {name!r} to take over; `dmh stats` lists those that run")
        for directory in (base, self.path):
            _make(directory)
            check_private(directory)
        check_length(self.path)
        try:
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise _unusable(self.path / "lock", error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            if adopt:
                raise ServiceError(
                    f"the service {name!r} has a launcher that lives: there is nothing to take over"
                ) from None
            raise ServiceError(
                f"a service named {name!r} is already running: stop it, join it (dmh.attach({name!r})), or give "
                "this one another "
                f"name (region.name, or --set region.name=...)"
            ) from None
        if not adopt:
            self._clear()

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.name != "lock":
                entry.unlink()

    def remove(self) -> None:
        """Delete the directory and give up the name."""
        self._clear()
        (self.path / "lock").unlink(missing_ok=True)
        self.path.rmdir()
        os.close(self._lock)


def _make(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise _unusable(directory, error) from error


def _unusable(path: Path, error: OSError) -> ServiceError:
    return ServiceError(
        f"{path} cannot be made: {error.strerror}; make room, or set XDG_RUNTIME_DIR to a directory of yours"
    )


def check_length(directory: Path) -> None:
    """Refuse a directory whose sockets would have too long a name."""
    # A Unix socket's address holds 107 bytes; the longest name in the directory is resolver-NN.sock.
    if len(os.fsencode(directory)) > 85:
        raise ServiceError(f"{directory} is too long for a socket's address: choose a shorter region.name")


def check_private(directory: Path) -> None:
    """Refuse a directory that somebody else made or may enter: /tmp is everybody's."""
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ServiceError(
            f"{directory} is not a directory of mode 0700 that belongs to you: remove it, or set XDG_RUNTIME_DIR "
            "to one that is"
        )

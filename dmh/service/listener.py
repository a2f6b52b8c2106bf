"""The control socket: where programs connect.

Owns the listening socket, and a descriptor in reserve: a process that has used up its descriptors cannot even turn a
connection away, and would find it waiting again and again.  Used by the launcher.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from pathlib import Path

from dmh.service.channel import Channel

log = logging.getLogger("dmh")


class Listener:
    """A listening Unix socket that is never blocked by a full descriptor table."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Under its name it listens from the first moment on; a dead launcher's gives way to it.
        new = path.with_name(path.name + "+")
        new.unlink(missing_ok=True)
        self._socket.bind(str(new))
        self._socket.listen(64)
        new.rename(path)
        self._socket.setblocking(False)
        self._reserve = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def fileno(self) -> int:
        """For selectors."""
        return self._socket.fileno()

    def accept(self) -> Channel | None:
        """The next connection; None where there is none (any more), or no descriptor for it."""
        try:
            return Channel(self._socket.accept()[0])
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        log.error(
            "a connection is turned away: this service has used up its descriptors; start it with more `ulimit -n`"
        )
        os.close(self._reserve)
        try:
            self._socket.accept()[0].close()
        except OSError:
            pass  # it has gone by itself, or the whole machine has none left
        finally:
            self._reserve = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        return None

    def close(self) -> None:
        """Nobody can connect any more."""
        self._socket.close()
        os.close(self._reserve)

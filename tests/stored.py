"""What a region's store holds, seen and changed from outside dmh, as somebody with access to the store could.

Owns the ways into each kind of store; a page here is as many bytes as the store was given for it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from store_servers import RedisServer


class StoredPages:
    """The pages of one region in a file, also one that is shared memory.

    Args:
        fd: the page file.
        size: bytes a page takes there.
    """

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self.size = size

    def read(self, page: int) -> bytes:
        return os.pread(self._fd, self.size, page * self.size)

    def write(self, page: int, content: bytes) -> None:
        os.pwrite(self._fd, content, page * self.size)

    def cut(self, page: int) -> None:
        """Leave only the first half of this page (and nothing after it, in a file)."""
        os.ftruncate(self._fd, page * self.size + self.size // 2)

    def everything(self) -> bytes:
        return os.pread(self._fd, os.fstat(self._fd).st_size, 0)

    def close(self) -> None:
        os.close(self._fd)


class StoredInRedis(StoredPages):
    """The pages of the one region that a server has."""

    def __init__(self, server: RedisServer, size: int) -> None:
        self._admin: Any = server.admin()
        self.size = size

    def _key(self, page: int) -> bytes:
        (prefix,) = {key[:21] for key in self._admin.scan_iter(b"dmh:*")}
        return bytes(prefix) + page.to_bytes(8, "big")

    def read(self, page: int) -> bytes:
        return bytes(self._admin.get(self._key(page)))

    def write(self, page: int, content: bytes) -> None:
        self._admin.set(self._key(page), content)

    def cut(self, page: int) -> None:
        self.write(page, self.read(page)[: self.size // 2])

    def everything(self) -> bytes:
        return b"".join(self._admin.mget(self._admin.keys(b"dmh:*")))

    def close(self) -> None:
        self._admin.close()


def memory_of(process: int, name: str) -> int:
    """A descriptor of a process's memfd of this name."""
    for link in Path(f"/proc/{process}/fd").iterdir():
        if os.readlink(link).startswith(f"/memfd:{name} "):
            return os.open(link, os.O_RDWR | os.O_CLOEXEC)
    raise AssertionError(f"process {process} has no memfd named {name}")

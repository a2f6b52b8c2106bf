"""``file:PATH`` - a sparse page file on a local disk, and its index beside it (``PATH.index``).

Owns where the files live, their lock and their removal; what is in them is `dmh.store.paged_file`.  A page file
belongs to one service at a time: the launcher holds an exclusive lock on it, and starts with it empty, because pages
mean nothing without the table of the region that wrote them.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from urllib.parse import urlsplit

from dmh.errors import StoreError
from dmh.store.base import StoreSpec
from dmh.store.paged_file import PagedFile


def path_of(url: str) -> Path:
    """The page file that a ``file:`` URL names; the configuration has made its path absolute."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise StoreError(f"{url}: a file: URL names no host; write file:///path or file:path")
    if not parts.path or parts.path.endswith("/"):
        raise StoreError(f"{url}: names no file")
    return Path(parts.path).absolute()


def _index_of(path: Path) -> Path:
    return path.with_name(path.name + ".index")


class FileStore(PagedFile):
    """A store in the local file system."""

    @classmethod
    def prepare(cls, spec: StoreSpec) -> list[int]:
        path = path_of(spec.url)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        opened: list[int] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            cls._check_room(path, spec)
            for name, size in ((path, spec.pages * spec.page_size), (_index_of(path), spec.pages * 8)):
                fd = os.open(name, flags, 0o600)
                opened.append(fd)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise StoreError(
                        f"{name} is in use by another service: give this one a store.url of its own", region=spec.region
                    ) from None
                os.ftruncate(fd, 0)
                os.ftruncate(fd, size)
        except (OSError, StoreError) as error:
            for fd in opened:
                os.close(fd)
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{path} cannot be used as a page file: {error.strerror}", region=spec.region) from error
        return opened

    @staticmethod
    def _check_room(path: Path, spec: StoreSpec) -> None:
        disk = os.statvfs(path.parent)
        needed, free = spec.pages * spec.page_size, disk.f_bavail * disk.f_frsize
        if needed > free:
            raise StoreError(
                f"the disk of {path} has {free / 2**30:.1f} GiB free, and a region of {needed / 2**30:.1f} GiB may "
                "fill all of it: "
                f"make region.size smaller, or put store.url on a larger disk",
                region=spec.region,
            )

    @classmethod
    def remove(cls, spec: StoreSpec) -> None:
        path = path_of(spec.url)
        path.unlink(missing_ok=True)
        _index_of(path).unlink(missing_ok=True)

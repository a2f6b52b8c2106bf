"""``file:PATH`` - a sparse page file on a local disk.

Owns where the file lives, its lock, its mark and its removal; what is in it is `dmh.store.paged_file`.  A page file
belongs to one service at a time: the launcher holds an exclusive lock on it, and starts with it empty, because pages
mean nothing without the table of the region that wrote them.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from urllib.parse import urlsplit

from dmh.config import about
from dmh.errors import StoreError
from dmh.store.base import StoreSpec
from dmh.store.paged_file import PagedFile, make_index


def path_of(url: str) -> Path:
    """The page file that a ``file:`` URL names; the configuration has made its path absolute."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise StoreError(f"{url}: a file: URL names no host; write file:///path or file:path")
    if not parts.path or parts.path.endswith("/"):
        raise StoreError(f"{url}: names no file")
    return Path(parts.path).absolute()


MARK = b"dmh page file 2\n"
"""The end of every page file, by which what a killed service left behind is told from somebody else's file."""


def _is_strange(fd: int) -> bool:
    """This file must not be written over: it is neither new nor what a service has left."""
    size = os.fstat(fd).st_size
    return size > 0 and os.pread(fd, len(MARK), max(size - len(MARK), 0)) != MARK


class FileStore(PagedFile):
    """A store in the local file system."""

    @classmethod
    def prepare(cls, spec: StoreSpec) -> list[int]:
        path = path_of(spec.url)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = -1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            cls._check_room(path, spec)
            new = not path.exists()
            fd = os.open(path, flags, 0o600)
            cls._claim(path, fd, spec)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
                if new:
                    path.unlink(missing_ok=True)
            raise StoreError(f"{path} cannot be used as a page file: {error.strerror}", region=spec.region) from error
        except StoreError:
            if fd >= 0:
                os.close(fd)
            raise
        return [fd, make_index(spec)]

    @staticmethod
    def _claim(path: Path, fd: int, spec: StoreSpec) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"{path} is in use by another service: give this one a store.url of its own", region=spec.region
            ) from None
        if _is_strange(fd):
            raise StoreError(
                f"{path} exists and is not a page file of dmh: nothing of it was touched; give store.url a name of its "
                "own",
                region=spec.region,
            )
        os.ftruncate(fd, 0)
        os.ftruncate(fd, spec.pages * spec.page_size)
        os.pwrite(fd, MARK, spec.pages * spec.page_size)

    @staticmethod
    def _check_room(path: Path, spec: StoreSpec) -> None:
        disk = os.statvfs(path.parent)
        needed, free = spec.pages * spec.page_size, disk.f_bavail * disk.f_frsize
        if needed > free:
            missing = needed - free
            raise StoreError(
                f"the disk of {path} has {about(free)} free, and a region of {about(needed)} may fill all of it: "
                f"{about(missing)} ({missing:,} bytes) missing; make region.size smaller, or put store.url on a larger "
                "disk",
                region=spec.region,
            )

    @classmethod
    def remove(cls, spec: StoreSpec) -> None:
        path_of(spec.url).unlink(missing_ok=True)

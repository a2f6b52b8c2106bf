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

from dmh.config import about
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


MARK = b"dmh page index 1"
"""The end of every index, by which what a killed service left behind is told from somebody else's file."""


def _strangers(path: Path, pages_fd: int, index_fd: int) -> Path | None:
    """Which of the two files must not be written over: neither where they are new, or what a service has left."""
    size = os.fstat(index_fd).st_size
    if size and os.pread(index_fd, len(MARK), max(size - len(MARK), 0)) != MARK:
        return _index_of(path)
    return path if not size and os.fstat(pages_fd).st_size else None


def _index_of(path: Path) -> Path:
    return path.with_name(path.name + ".index")


class FileStore(PagedFile):
    """A store in the local file system."""

    @classmethod
    def prepare(cls, spec: StoreSpec) -> list[int]:
        path = path_of(spec.url)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        opened: list[int] = []
        made: list[Path] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            cls._check_room(path, spec)
            for name in (path, _index_of(path)):
                new = not name.exists()
                fd = os.open(name, flags, 0o600)
                opened.append(fd)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise StoreError(
                        f"{name} is in use by another service: give this one a store.url of its own", region=spec.region
                    ) from None
                if new:
                    made.append(name)
            if strange := _strangers(path, *opened):
                raise StoreError(
                    f"{strange} exists and is not a page file of dmh: nothing of it was touched; give store.url a name "
                    "of its own",
                    region=spec.region,
                )
            for fd, size in zip(opened, (spec.pages * spec.page_size, spec.pages * 8), strict=True):
                os.ftruncate(fd, 0)
                os.ftruncate(fd, size)
            os.pwrite(opened[1], MARK, spec.pages * 8)
        except (OSError, StoreError) as error:
            for fd in opened:
                os.close(fd)
            for name in made:
                name.unlink(missing_ok=True)
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{path} cannot be used as a page file: {error.strerror}", region=spec.region) from error
        return opened

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
        path = path_of(spec.url)
        path.unlink(missing_ok=True)
        _index_of(path).unlink(missing_ok=True)

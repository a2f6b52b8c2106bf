"""An application's mapping of a region: made safe, registered, handed over, and taken down so that a stale array
cannot read zeros.

Owns the address range and the process's userfaultfd.  Does not own arrays (`dmh.region.region`).
"""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

from dmh.errors import KernelError
from dmh.native import check, ffi, lib

log = logging.getLogger("dmh")

BIRTH_PAGE = 4096
"""Bytes behind a followed mapping: see dmh_fork.c."""


class Mapping:
    """One process's view of one region, from `register` to `close`.

    Attributes:
        base: address of the first byte.
        size: bytes.
        uffd: this process's userfaultfd.
        follows: forked children share the region.
        sealed: it stays until the process ends.
        writes: it can be written through.  One that is only read is sealed where the kernel can, because whoever holds
            it could make it writable with mprotect.  A descriptor opened for reading would rule that out too, but
            userfaultfd watches no mapping that cannot be made writable (EPERM).
    """

    def __init__(
        self, region_fd: int, size: int, page_size: int, *, seal: bool, fork: str, writable: bool = True
    ) -> None:
        self.size = size
        self._pointer: Any = lib.dmh_map_region(region_fd, size, max(page_size, 1 << 21), writable)
        if self._pointer == ffi.NULL:
            raise KernelError(
                f"{size / 2**30:.1f} GiB of address space cannot be mapped ({os.strerror(ffi.errno)}): make "
                "region.size smaller, or raise "
                "`ulimit -v`"
            )
        self.base = int(ffi.cast("uintptr_t", self._pointer))
        self.sealed = False
        how, features = ffi.new("int *"), ffi.new("uint64_t *")
        try:
            self.uffd, self.follows = _open_userfaultfd(how, features, fork)
            if self.follows:
                check(lib.dmh_birth_page(self._pointer, size), "making a page for children to announce themselves by")
            whole = size + (BIRTH_PAGE if self.follows else 0)
            check(lib.dmh_uffd_register(self.uffd, self._pointer, whole), "registering the region with userfaultfd")
        except OSError as error:
            lib.dmh_unmap(self._pointer, size)
            raise KernelError(f"{error}; `dmh serve` or `dmh run` on this machine says what to change") from error
        if how[0] == lib.DMH_UFFD_USER_ONLY:
            log.warning(
                "dmh: only user-mode faults can be watched here: system calls on absent pages "
                "(file.readinto(array), os.write) fail with "
                "EFAULT; to mend it, `chmod a+rw /dev/userfaultfd` as root"
            )
        if seal or not writable:
            self.sealed = lib.dmh_seal_mapping(self._pointer, size) == 0
        self.writes = writable or not self.sealed

    def serve_children(self) -> None:
        """The service knows this mapping: from now on forked children may inherit it, where forks are followed."""
        if self.follows:
            check(lib.dmh_follow_forks(self._pointer, self.size), "letting children inherit the region")

    def be_born(self) -> None:
        """In a forked child, before anything else: wait until the service knows of it."""
        check(lib.dmh_be_born(self._pointer, self.size), "announcing a forked child")

    def replace_uffd(self, uffd: int) -> None:
        """In a forked child: this is its own userfaultfd; the one it has inherited is its parent's."""
        os.close(self.uffd)
        self.uffd = uffd

    def abandon(self) -> None:
        """In a forked child that the service does not know: it must not touch the region, where it would read, and
        make, zeros.
        """
        if self.sealed:
            os.write(2, b"dmh: a forked child cannot share the region, whose mapping is sealed: ending it\n")
            os.kill(os.getpid(), signal.SIGKILL)
        self.close()

    def buffer(self, offset: int, size: int) -> memoryview:
        """The bytes offset .. offset + size - 1; they stay valid until `close`."""
        return memoryview(ffi.buffer(self._pointer + offset, size)).cast("B")

    def pointer(self, offset: int) -> Any:
        """A C pointer into the region."""
        return self._pointer + offset

    def close(self) -> None:
        """Take the mapping down.  An address in it raises SIGSEGV afterwards; a sealed mapping stays, frozen, until
        the process ends.
        """
        if self.sealed:
            return  # its userfaultfd stays open with it: closing it would turn absent pages into zeros
        lib.dmh_guard_mapping(self._pointer, self.size + (BIRTH_PAGE if self.follows else 0))
        os.close(self.uffd)


def _open_userfaultfd(how: Any, features: Any, fork: str) -> tuple[int, bool]:
    """A userfaultfd, and whether it follows forks."""
    if fork != "none":
        fd = lib.dmh_uffd_open_following(how, features)
        if fd >= 0:
            return fd, True
        if fork == "follow":
            raise KernelError(
                f"forks cannot be followed here ({os.strerror(-fd)}), and region.fork is follow: give the program "
                "CAP_SYS_PTRACE, or set region.fork to auto or none"
            )
    return check(lib.dmh_uffd_open(how, features), "opening a userfaultfd"), False

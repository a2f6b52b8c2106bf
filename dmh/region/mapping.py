"""An application's mapping of a region: made safe, registered, handed over, and taken down so that a stale array
cannot read zeros.

Owns the address range and the process's userfaultfd.  Does not own arrays (`dmh.region.region`).
"""

from __future__ import annotations

import logging
import os
from typing import Any

from dmh.errors import KernelError
from dmh.native import check, ffi, lib

log = logging.getLogger("dmh")


class Mapping:
    """One process's view of one region, from `register` to `close`.

    Attributes:
        base: address of the first byte.
        size: bytes.
    """

    def __init__(self, region_fd: int, size: int, page_size: int, *, seal: bool) -> None:
        self.size = size
        self._pointer: Any = lib.dmh_map_region(region_fd, size, max(page_size, 1 << 21), 1, 0)
        if self._pointer == ffi.NULL:
            raise KernelError(
                f"{size / 2**30:.1f} GiB of address space cannot be mapped ({os.strerror(ffi.errno)}): make "
                "region.size smaller, or raise "
                "`ulimit -v`"
            )
        self.base = int(ffi.cast("uintptr_t", self._pointer))
        self._sealed = False
        how, features = ffi.new("int *"), ffi.new("uint64_t *")
        try:
            self.uffd = check(lib.dmh_uffd_open(how, features), "opening a userfaultfd")
            check(lib.dmh_uffd_register(self.uffd, self._pointer, size), "registering the region with userfaultfd")
        except OSError as error:
            lib.dmh_unmap(self._pointer, size)
            raise KernelError(f"{error}; `dmh serve` or `dmh run` on this machine says what to change") from error
        if how[0] == lib.DMH_UFFD_USER_ONLY:
            log.warning(
                "dmh: only user-mode faults can be watched here: system calls on absent pages "
                "(file.readinto(array), os.write) fail with "
                "EFAULT; to mend it, `chmod a+rw /dev/userfaultfd` as root"
            )
        if seal:
            self._sealed = lib.dmh_seal_mapping(self._pointer, size) == 0

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
        if self._sealed:
            return  # its userfaultfd stays open with it: closing it would turn absent pages into zeros
        lib.dmh_guard_mapping(self._pointer, self.size)
        os.close(self.uffd)

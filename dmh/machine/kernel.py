"""Kernel features, each found out by using it: version numbers say little about a kernel that distributions patch.

Owns the probes.  Called by the start-up checks and by `dmh doctor`.  A probe leaves nothing behind.
"""

from __future__ import annotations

import errno
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dmh.native import ffi, lib

FEATURES = {
    "missing pages of shared memory": 1 << 5,
    "the faulting thread's id": 1 << 8,
    "poisoned pages": 1 << 14,
}
"""Feature of userfaultfd -> its bit in UFFDIO_API."""
EVENT_FORK = 1 << 1
SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


@dataclass(frozen=True, slots=True)
class Userfaultfd:
    """What this user may open.

    Attributes:
        errors: way ("device", "syscall", "user") -> 0 where it can be opened, else the errno.
        how: the way that dmh takes, "" where there is none that will do.
        features: bits that the kernel offers.
        fork_error: 0 where forks may be followed, else the errno.
    """

    errors: dict[str, int]
    how: str
    features: int
    fork_error: int

    @property
    def kernel_faults(self) -> bool:
        """System calls on absent pages wait for them, as ordinary code does."""
        return self.how in ("device", "syscall")

    @property
    def error(self) -> int:
        """Why none can be opened."""
        return next((e for e in self.errors.values() if e in (errno.EPERM, errno.EACCES)), self.errors["user"])

    @property
    def lacking(self) -> list[str]:
        """What dmh cannot do without and this kernel does not have."""
        return [name for name in list(FEATURES)[:2] if not self.features & FEATURES[name]]


def userfaultfd() -> Userfaultfd:
    """Try every way, in the order in which dmh takes them."""
    ways = {"device": lib.DMH_UFFD_DEVICE, "syscall": lib.DMH_UFFD_SYSCALL, "user": lib.DMH_UFFD_USER_ONLY}
    features = ffi.new("uint64_t *")
    errors = {way: -min(lib.dmh_probe_uffd(kind, 0, features), 0) for way, kind in ways.items()}
    how = next((way for way, error in errors.items() if not error), "")
    fork = -min(lib.dmh_probe_uffd(ways[how], EVENT_FORK, features), 0) if how else errno.EPERM
    return Userfaultfd(errors, how, int(features[0]), fork)


def capture_error(page_size: int) -> int:
    """0 where pages can be captured atomically; an errno, or EILSEQ where the wrong bytes came out."""
    return -min(lib.dmh_probe_capture(page_size), 0)


def forced_huge_pages() -> bool:
    """Are huge pages forced on shared memory?  Punching destroys data then."""
    return "[force]" in huge_pages()


def huge_pages() -> str:
    """The setting for shared memory, as the kernel writes it; "" on a kernel without huge pages."""
    try:
        return SHMEM_ENABLED.read_text().strip()
    except OSError:
        return ""


def mseal_error() -> int:
    """0 where a mapping can be sealed."""
    return -min(lib.dmh_probe_mseal(), 0)


def nowait_error(directory: Path) -> int:
    """0 where reads from files in this directory can be told not to block (RWF_NOWAIT)."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(4096))
            file.flush()
            os.preadv(file.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return 0  # it would have had to wait, and did not
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def capabilities(proc: Path = Path("/proc")) -> frozenset[str]:
    """Of the capabilities that make a difference to dmh, those that this process has."""
    bits = {"CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21, "CAP_SYS_NICE": 23, "CAP_SYS_RESOURCE": 24}
    for line in (proc / "self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            effective = int(line.split()[1], 16)
            return frozenset(name for name, bit in bits.items() if effective >> bit & 1)
    return frozenset()

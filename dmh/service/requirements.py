"""What a service needs of this machine before it starts: refused here, with what is missing, rather than met later.

Owns the checks and their messages; called once by the launcher, before it has made anything.  Does not own the store's
own needs (`Store.prepare` says them).
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from dmh.config import Config
from dmh.errors import KernelError, ServiceError
from dmh.native import ffi, lib

log = logging.getLogger("dmh")


def check(config: Config) -> None:
    """Refuse a machine, a user or a limit that the service of `config` could not live with.

    Raises:
        KernelError: the kernel lacks, or refuses this user, something.
        ServiceError: this machine has not what the configuration asks for.
    """
    probe_kernel(config.region.page_size)
    check_memory(config.memory.limit)


def probe_kernel(page_size: int) -> None:
    """Refuse a kernel, or a user, that dmh cannot work with; says what is missing and how to get it."""
    how, features = ffi.new("int *"), ffi.new("uint64_t *")
    fd = lib.dmh_uffd_open(how, features)
    if fd < 0:
        if -fd in (1, 13):  # EPERM, EACCES
            raise KernelError(
                "this user may not use userfaultfd: as root, `chmod a+rw /dev/userfaultfd` or `sysctl "
                "vm.unprivileged_userfaultfd=1`, or "
                "run dmh with CAP_SYS_PTRACE"
            )
        raise KernelError(
            f"this kernel has no userfaultfd that can watch shared memory ({os.strerror(-fd)}): Linux 5.7 or newer "
            "is needed, built with "
            "CONFIG_USERFAULTFD"
        )
    os.close(fd)
    if how[0] == lib.DMH_UFFD_USER_ONLY:
        log.warning(
            "only user-mode faults can be watched: system calls on absent pages (file.readinto(array), os.write, "
            "recv_into) fail with EFAULT "
            "instead of waiting.  To mend it: `chmod a+rw /dev/userfaultfd` or `sysctl "
            "vm.unprivileged_userfaultfd=1` as root"
        )
    result = lib.dmh_probe_capture(page_size)
    if result < 0:
        raise KernelError(
            "this kernel cannot capture pages atomically (splice from a memfd, then punch: "
            f"{os.strerror(-result)}); dmh would lose writes here"
        )
    with contextlib.suppress(OSError):
        enabled = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text()
        if "[force]" in enabled:
            raise KernelError(
                "transparent huge pages are forced for shared memory, which destroys data when pages are punched: "
                "write `never` or `advise` to "
                "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
            )


def check_memory(limit: int) -> None:
    """Refuse a limit that this machine's memory cannot hold: the kernel would kill somebody later."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemTotal:") and limit > (total := int(line.split()[1]) * 1024):
                raise ServiceError(
                    f"memory.limit is {limit / 2**30:.1f} GiB, and this machine has {total / 2**30:.1f} GiB of "
                    "memory in all: lower it"
                )

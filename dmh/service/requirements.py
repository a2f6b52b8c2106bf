"""What a service needs of this machine before it starts: refused here, with the number that is missing, rather than met
later by somebody whom the kernel kills or turns away.

Owns the needs, their reasons and their messages; the launcher checks them once, before it has made anything, and
`dmh doctor -c FILE` shows the same.  What there is comes from `dmh.machine`.  Does not own the store's own needs
(`Store.prepare` says them).
"""

from __future__ import annotations

import errno
import logging
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass

from dmh.config import Config, Limits, about, format_size
from dmh.errors import KernelError, ServiceError
from dmh.machine import kernel, limits, memory
from dmh.native import lib

log = logging.getLogger("dmh")

MIB = 1 << 20
PROCESS_BYTES = 24 * MIB
"""Private memory of one of the service's processes: interpreter, NumPy, ZeroMQ (18 to 26 MiB measured)."""
PROCESS_SPACE = 512 * MIB
"""Address space of a worker besides the region and its tables (330 MiB measured; allocators reserve in large steps)."""
TABLE_BYTES = 30
"""Per page of the region: word, checksum, copy state, pins; the monitor's note of it; the index of a page file."""
RING_BYTES = MIB
"""Per worker: its arrival ring, counters and lane in the shared table."""
THREADS = 5
"""Of each worker: its own, the control channel's, ZeroMQ's."""
LAUNCHER_DESCRIPTORS = 32
"""Region, table, victim buffer, pipe, lock, sockets, the store's; the rest is for starting a worker."""
PROGRAM_DESCRIPTORS = 3
"""In the launcher: the connection, the program's userfaultfd, its pidfd."""
USERFAULTFD_MEND = (
    "as root, `chmod a+rw /dev/userfaultfd` or `sysctl vm.unprivileged_userfaultfd=1`, or run dmh with CAP_SYS_PTRACE"
)


@dataclass(frozen=True, slots=True)
class Need:
    """Something that a configuration needs so much of.

    Attributes:
        what: in a word or two.
        needed: so much.
        available: so much is there; `limits.UNLIMITED` for no bound.
        of: what the needed amount is made of.
        bound: what sets the available amount, as in "8 MiB ...".
        mend: what to do where it does not suffice.
        unit: what is counted; "" for bytes.
    """

    what: str
    needed: int
    available: int
    of: str
    bound: str
    mend: str
    unit: str = ""

    @property
    def missing(self) -> int:
        """0 where there is enough."""
        return max(self.needed - self.available, 0)

    def show(self, amount: int) -> str:
        """An amount with its unit."""
        return f"{amount:,} {self.unit}" if self.unit else about(amount)

    def summary(self) -> str:
        """What is needed of what there is, for people."""
        needed = self.show(self.needed)
        return (
            f"{needed} of {self.show(self.available)}" if self.available < limits.UNLIMITED else f"{needed}, no bound"
        )

    def refusal(self) -> str:
        """The message for a start that cannot be."""
        exact = "" if self.unit else f" ({self.missing:,} bytes)"
        return (
            f"{self.what}: {self.show(self.needed)} needed ({self.of}), {self.show(self.available)} {self.bound}: "
            f"{self.show(self.missing)}{exact} missing; {self.mend}"
        )


def check(config: Config) -> int:
    """Refuse a machine, a user or a limit that the service of `config` could not live with.

    Returns:
        How many programs at a time the service has descriptors for.

    Raises:
        KernelError: the kernel lacks, or refuses this user, something.
        ServiceError: this machine has not what the configuration asks for.
    """
    check_kernel(config.region.page_size)
    if lacking := [need.refusal() for need in needs(config) if need.missing]:
        raise ServiceError("\n".join(lacking))
    check_pipe()
    return most_programs(config.workers.resolvers)


def check_kernel(page_size: int) -> None:
    """Refuse a kernel, or a user, that dmh cannot work with; warn of one that it can only half work with."""
    found = kernel.userfaultfd()
    for problem, mend in kernel_problems(found, page_size):
        raise KernelError(f"{problem}: {mend}")
    if not found.kernel_faults:
        log.warning(
            "only user-mode faults can be watched: system calls on absent pages (file.readinto(array), os.write, "
            "recv_into) fail with EFAULT instead of waiting.  To mend it: %s",
            USERFAULTFD_MEND,
        )


def check_pipe() -> None:
    """Refuse a user who gets no pipe at all; the smallest that the kernel makes will do."""
    try:
        limits.pipe_bytes(1)
    except OSError as error:
        hard = limits.setting("fs/pipe-user-pages-hard")
        raise ServiceError(
            f"no pipe can be made to capture pages with, one page of it would do ({error.strerror}): this user's pipes "
            f"are used up (fs.pipe-user-pages-hard is {hard} pages); end what holds them, or raise it"
        ) from error


def kernel_problems(found: kernel.Userfaultfd, page_size: int) -> Iterator[tuple[str, str]]:
    """What of the kernel, or of this user's rights, makes dmh impossible here, and the mend of each."""
    if not found.how and found.error in (errno.EPERM, errno.EACCES):
        yield "this user may not use userfaultfd", USERFAULTFD_MEND
    elif not found.how or found.lacking:
        lacking = ", ".join(found.lacking) or os.strerror(found.error)
        yield (
            f"this kernel has no userfaultfd that can watch shared memory ({lacking})",
            "Linux 5.7 or newer is needed, built with CONFIG_USERFAULTFD",
        )
    if error := kernel.capture_error(page_size):
        yield (
            f"this kernel cannot capture pages atomically (splice from a memfd, then punch: {os.strerror(error)})",
            "another kernel is needed; dmh would lose writes on this one",
        )
    if kernel.forced_huge_pages():
        yield (
            "transparent huge pages are forced for shared memory, which destroys data when pages are punched",
            f"write `never` or `advise` to {kernel.SHMEM_ENABLED}",
        )


def needs(config: Config) -> list[Need]:
    """What the service of `config` needs, beside what this process has at this moment."""
    wanted = [_memory(config), _address_space(config), _file_size(config), _descriptors(config), _tasks(config)]
    return [need for need in wanted if need]


def most_programs(resolvers: int) -> int:
    """How many programs at a time the launcher has descriptors for; the native tables hold no more either."""
    free = limits.soft(resource.RLIMIT_NOFILE) - _service_descriptors(resolvers)
    return min(free // PROGRAM_DESCRIPTORS, lib.DMH_MAX_VIEWS - 1)


def _memory(config: Config) -> Need | None:
    """All of it at once: it is the kernel's OOM killer who says no later, and not to the right process."""
    rooms = memory.rooms()
    if not rooms:
        return None
    limit, processes = config.memory.limit, config.workers.resolvers + 3
    own = processes * (PROCESS_BYTES + RING_BYTES)
    return Need(
        "memory",
        limit + own,
        rooms[0].bytes,
        f"memory.limit is {format_size(limit)}, and the service's {processes} processes take some {about(own)}",
        rooms[0].bound,
        "lower memory.limit, or make room",
    )


def _address_space(config: Config) -> Need:
    """Every process of the service that pages maps the whole region, as does every program."""
    size, page_size = config.region.size, config.region.page_size
    tables = size // page_size * TABLE_BYTES + (config.workers.resolvers + 2) * RING_BYTES
    buffer = Limits.of(config).buffer * page_size
    return Need(
        "address space",
        size + page_size + tables + buffer + PROCESS_SPACE,
        limits.soft(resource.RLIMIT_AS),
        f"region.size is {format_size(size)}; its tables, the victim buffer and the process itself take "
        f"{about(tables + buffer + PROCESS_SPACE)}",
        "allowed to a process (`ulimit -v`)",
        "raise `ulimit -v`, or make region.size smaller",
    )


def _file_size(config: Config) -> Need:
    """The region is a file in memory, and bound by the same limit as a page file."""
    return Need(
        "file size",
        config.region.size,
        limits.soft(resource.RLIMIT_FSIZE),
        "region.size; the kernel counts the region's memory as a file",
        "allowed to a file (`ulimit -f`)",
        "raise `ulimit -f`, or make region.size smaller",
    )


def _descriptors(config: Config) -> Need:
    resolvers = config.workers.resolvers
    allowed, most = limits.soft(resource.RLIMIT_NOFILE), limits.hard(resource.RLIMIT_NOFILE)
    needed = _service_descriptors(resolvers) + PROGRAM_DESCRIPTORS
    mend = f"`ulimit -n {needed}`" if needed <= most else "raise the hard limit (`ulimit -Hn`, as root)"
    return Need(
        "descriptors",
        needed,
        allowed,
        f"in the launcher, with {resolvers} resolvers and one program; each further program takes "
        f"{PROGRAM_DESCRIPTORS}",
        "allowed to a process (`ulimit -n`)",
        f"{mend}, or fewer workers.resolvers",
        unit="descriptors",
    )


def _service_descriptors(resolvers: int) -> int:
    """Of the launcher, the process that has most: a channel and a pidfd for each worker."""
    return limits.open_descriptors() + LAUNCHER_DESCRIPTORS + 2 * (resolvers + 2)


def _tasks(config: Config) -> Need:
    left, bound = limits.tasks_left()
    workers = config.workers.resolvers + 2
    return Need(
        "processes",
        workers * THREADS,
        left,
        f"{workers} workers of {THREADS} threads each",
        f"left {bound}",
        "raise the limit, or fewer workers.resolvers",
        unit="processes and threads",
    )

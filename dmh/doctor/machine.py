"""The machine's side of the report: kernel, memory, limits, idle sources, directories, tools."""

from __future__ import annotations

import os
import pwd
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from dmh.config import about
from dmh.doctor.finding import Finding, Level
from dmh.errors import ServiceError
from dmh.evict.idle import choose_source, page_idle, unmap
from dmh.machine import kernel, limits, memory
from dmh.service.launcher import PIPE_BYTES
from dmh.service.paths import base_directory, check_private, running_services
from dmh.service.requirements import USERFAULTFD_MEND, kernel_problems, most_programs

OK, INFO, LESS, BAD = Level.OK, Level.INFO, Level.LESS, Level.BAD
LARGEST_PAGE = 2 << 20
USUAL_RESOLVERS = 2


def findings() -> Iterator[Finding]:
    """Everything about this machine, in the order of the report."""
    yield from _userfaultfd()
    yield from _kernel()
    yield from _memory()
    yield from _limits()
    yield from _idle_sources()
    yield from _surroundings()


def _yes(error: int) -> str:
    return os.strerror(error) if error else "yes"


def _userfaultfd() -> Iterator[Finding]:
    found = kernel.userfaultfd()
    group = "userfaultfd"
    for problem, mend in kernel_problems(found, 4096):
        yield Finding(group, "can dmh run?", "no", BAD, problem, mend)
    ways = {
        "device": ("/dev/userfaultfd", "also system calls wait for absent pages"),
        "syscall": ("system call", "the same, for root, CAP_SYS_PTRACE, or vm.unprivileged_userfaultfd=1"),
        "user": ("user-mode faults", "with them alone, system calls on absent pages fail with EFAULT"),
    }  # fmt: skip
    for way, (name, meaning) in ways.items():
        error = found.errors[way]
        used = way == found.how
        level = (OK if found.kernel_faults else LESS) if used else INFO
        mend = "" if found.kernel_faults else USERFAULTFD_MEND
        yield Finding(group, name, _yes(error) + (", used by dmh" if used else ""), level, meaning, mend)
    if not found.how:
        return
    for name, meaning, level in (
        ("missing pages of shared memory", "what dmh stands on", BAD),
        ("the faulting thread's id", "read-ahead tells threads apart by it", BAD),
        ("poisoned pages", "a lost page raises SIGBUS; without it a program that touches one waits forever", LESS),
    ):
        has = bool(found.features & kernel.FEATURES[name])
        yield Finding(
            group, name, "yes" if has else "no", OK if has else level, meaning, "" if has else "a newer kernel"
        )
    yield Finding(
        group,
        "following forks",
        _yes(found.fork_error),
        INFO if found.fork_error else OK,
        "a forked child may share the region only where the kernel reports forks; otherwise it has to attach",
        "run dmh with CAP_SYS_PTRACE" if found.fork_error else "",
    )


def _kernel() -> Iterator[Finding]:
    group, system = "kernel", os.uname()
    version = f"{system.release}, {system.machine}"
    yield Finding(group, system.sysname, version, INFO, "features are tried out: the version decides nothing")
    for page_size, mend in ((4096, "another kernel"), (LARGEST_PAGE, "smaller pages, or another kernel")):
        error = kernel.capture_error(page_size)
        level = (BAD if page_size == 4096 else LESS) if error else OK
        yield Finding(
            group,
            f"atomic capture, {about(page_size)}",
            _yes(error),
            level,
            "a page leaves by splice and punch while programs write to it, and no write is lost",
            mend if error else "",
        )
    pages = kernel.huge_pages()
    forced = kernel.forced_huge_pages()
    chosen = next((word.strip("[]") for word in pages.split() if word.startswith("[")), "not built in")
    yield Finding(
        group,
        "huge shared pages",
        chosen,
        BAD if forced else OK,
        "forced, they destroy data when pages are punched" if forced else "dmh switches them off for its own mappings",
        f"write `never` or `advise` to {kernel.SHMEM_ENABLED}" if forced else "",
    )
    sealed = kernel.mseal_error()
    yield Finding(
        group,
        "sealed mappings",
        _yes(sealed),
        INFO if sealed else OK,
        'region.seal keeps a stray munmap from taking the region away; programs of mode "r" stay read-only by it',
        "Linux 6.10 or newer" if sealed else "",
    )
    directory = Path("/var/tmp")
    error = kernel.nowait_error(directory)
    yield Finding(
        group,
        f"reads without waiting, {directory}",
        _yes(error),
        LESS if error else OK,
        "the monitor resolves a fault at once whose page the page cache has; elsewhere it takes the pool",
        "put the page file on ext4, XFS or btrfs" if error else "",
    )
    has = kernel.capabilities()
    yield Finding(
        group,
        "user",
        f"{_user()}: {', '.join(sorted(has)) or 'no capabilities'}",
        INFO,
        "CAP_SYS_PTRACE: faults of system calls, forks; CAP_SYS_NICE: idle source unmap; CAP_SYS_ADMIN: page_idle",
    )


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _memory() -> Iterator[Finding]:
    group, info = "memory", memory.meminfo()
    if info:
        yield Finding(
            group,
            "available",
            f"{about(info['MemAvailable'])} of {about(info['MemTotal'])}",
            OK,
            "memory.limit, and some 25 MiB for each process of the service, must fit into it",
        )
        swap = info.get("SwapTotal", 0)
        yield Finding(
            group,
            "swap",
            about(swap) if swap else "none",
            LESS if swap else OK,
            "pages that dmh keeps local may be swapped out behind its back; idle source unmap needs none"
            if swap
            else "nothing takes pages away behind dmh's back",
            "swapoff -a, or memory.swap.max=0 for the cgroup" if swap else "",
        )
    groups = memory.memory_groups()
    for one in groups:
        yield Finding(
            group,
            "memory cgroup",
            f"{about(one.used)} of {about(one.limit)} used",
            INFO,
            f"{one.path} bounds programs and service together",
            "give the group more, or keep memory.limit below what is left",
        )
    if not groups:
        yield Finding(group, "memory cgroup", "no limit", OK, "only the machine bounds memory.limit")
    mode = memory.overcommit()
    yield Finding(
        group,
        "overcommit",
        {0: "heuristic", 1: "always", 2: "strict"}.get(mode, str(mode)),
        LESS if mode == 2 else OK,
        "vm.overcommit_memory=2: the local pages count against the commit limit"
        if mode == 2
        else "a region costs nothing until its pages are touched",
        "sysctl vm.overcommit_memory=0" if mode == 2 else "",
    )
    yield Finding(
        group, "/dev/shm", _size_of("/dev/shm"), INFO, "not used: the region is a memfd, which this size does not bound"
    )


def _size_of(path: str) -> str:
    try:
        return about(shutil.disk_usage(path).total)
    except OSError:
        return "none"


def _limits() -> Iterator[Finding]:
    group = "limits"
    allowed = limits.soft(resource.RLIMIT_NOFILE)
    programs = most_programs(USUAL_RESOLVERS)
    enough = programs >= 16
    yield Finding(
        group,
        "descriptors (ulimit -n)",
        f"{allowed:,}",
        OK if enough else LESS if programs > 0 else BAD,
        f"enough for {max(programs, 0)} programs at a time with {USUAL_RESOLVERS} resolvers",
        "" if enough else "ulimit -n 1024",
    )
    left, bound = limits.tasks_left()
    yield Finding(
        group,
        "processes (ulimit -u)",
        "no bound" if left == limits.UNLIMITED else f"{left:,} left {bound}",
        OK if left >= 100 else LESS,
        "a service has one process for each resolver and three more, of five threads each",
        "" if left >= 100 else "raise the limit",
    )
    for name, which, meaning in (
        ("address space (ulimit -v)", resource.RLIMIT_AS, "every process maps the whole region"),
        ("file size (ulimit -f)", resource.RLIMIT_FSIZE, "bounds region.size: the region is a file in memory"),
    ):
        most = limits.soft(which)
        bounded = most < limits.UNLIMITED
        mend = "set it to unlimited" if bounded else ""
        value = about(most) if bounded else "no bound"
        yield Finding(group, name, value, LESS if bounded else OK, meaning, mend)
    locked = limits.soft(resource.RLIMIT_MEMLOCK)
    yield Finding(
        group,
        "locked memory (ulimit -l)",
        about(locked) if locked < limits.UNLIMITED else "no bound",
        INFO,
        "not needed: pages stay by dmh's own rule, and a pin of dmh's locks nothing",
    )
    yield from _pipes(group)


def _pipes(group: str) -> Iterator[Finding]:
    granted = limits.pipe_bytes(PIPE_BYTES)
    most, soft_pages, hard_pages = (
        limits.setting(f"fs/{name}") for name in ("pipe-max-size", "pipe-user-pages-soft", "pipe-user-pages-hard")
    )
    less = granted < PIPE_BYTES
    yield Finding(
        group,
        "capture pipe",
        about(granted),
        LESS if less else OK,
        f"captured at a time, at most {about(most)}; a user gets {soft_pages:,} pages of pipes ({hard_pages or 'no'} "
        "hard limit); a pipe of one page is slower and works",
        "sysctl fs.pipe-max-size=1048576, or a larger fs.pipe-user-pages-soft" if less else "",
    )


def _idle_sources() -> Iterator[Finding]:
    """In the order in which `evictor.idle: auto` takes them, for a policy that profits from marks."""
    taken = choose_source("auto", 4096)
    for name, reason, meaning in (
        ("page_idle", page_idle.probe(), "the kernel's idle flags: a mark costs a program nothing"),
        ("unmap", unmap.probe(4096), "a mark costs a program one minor fault, where it uses the page"),
        ("buffer", None, "a mark moves the page to the victim buffer, from where a use brings it back"),
    ):
        used = ", what policies that mark use" if name == taken else ""
        level = INFO if reason else LESS if used and name == "buffer" else OK
        mend = f"for a better one: {unmap.probe(4096)}" if level == LESS else reason or ""
        yield Finding("idle sources", name, ("no" if reason else "yes") + used, level, meaning, mend)


def _surroundings() -> Iterator[Finding]:
    group = "surroundings"
    base = base_directory()
    level, value, mend = OK, str(base), ""
    try:
        if base.exists():
            check_private(base)
        elif not os.access(base.parent, os.W_OK | os.X_OK):
            raise ServiceError(f"{base.parent} may not be written to; set XDG_RUNTIME_DIR to a directory of yours")
    except ServiceError as error:
        level, mend = BAD, str(error)
    yield Finding(group, "runtime directory", value, level, "the services' sockets; only this user may enter", mend)
    names = running_services()
    yield Finding(group, "running services", ", ".join(names) or "none", INFO, "`dmh stats NAME` shows one")
    for programs, meaning, package in (
        (("redis-server", "valkey-server"), "a store; `dmh stress --store redis` and the tests", "redis-server"),
        (("cc", "gcc", "clang"), "builds the native module; not needed any more", "gcc"),
    ):
        path = next((path for path in map(shutil.which, programs) if path), None)
        yield Finding(
            group, programs[0], path or "not installed", INFO, meaning, "" if path else f"apt install {package}"
        )

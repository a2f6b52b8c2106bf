"""``dmh demo``: a NumPy program on an array four times larger than its memory, shown as it runs, every byte verified.

Owns the demo's settings and its processes: this one (which shows, and never touches a page), the service, and the
program.  What is computed and what is shown is `dmh.demo`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dmh.cli import arguments
from dmh.cli.signals import terminable, undisturbed
from dmh.config import Config, format_size, load, loads, without_password
from dmh.demo.display import Display
from dmh.demo.progress import Job, Progress
from dmh.errors import RegionError, ServiceError, StoreError
from dmh.observe.report import Snapshot
from dmh.region.connection import Connection, start_service
from dmh.service.client import PROTOCOL
from dmh.service.paths import SOCKET_VARIABLE, control_socket, service_directory

TIMES = 4
"""The array is so many times larger than memory.limit."""
DEFAULT_SIZE = 1_024_000_000
LOOK_SECONDS = 0.02
DRAW_SECONDS = 0.2
PAGES_AN_UPDATE = 4
SIZE_STAND_IN = "1TiB"

_SETTINGS = """
region: {{name: "{name}", size: {size}}}
memory: {{limit: {limit}}}
store: {{url: {url}}}
"""


def add_parser(commands: Any) -> None:
    """Declare ``dmh demo``."""
    parser = commands.add_parser(
        "demo",
        help="sort a NumPy array four times larger than its memory, and verify every byte",
        description="Fills, sums, updates and sorts a NumPy array four times larger than memory.limit, with live "
        "progress; every byte is verified against an independent computation.  Needs no server and no configuration: "
        "pages go to a temporary file.  Exit status 0 only if every byte was right.",
    )
    parser.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        help="settings for the service in place of the demo's own; the array is 4 x memory.limit",
    )
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE", help="override a setting"
    )
    parser.add_argument(
        "--size",
        type=arguments.size,
        metavar="SIZE",
        help=f"bytes of the array (default: 4 x memory.limit; {DEFAULT_SIZE // 10**6}MB)",
    )
    parser.add_argument("--seed", type=_seed, default=1, metavar="N", help="of all random numbers (default: 1)")
    parser.set_defaults(run=run)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 64:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2**64 - 1, is {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """0 if every byte was right, 1 if not, 130 after Ctrl-C."""
    with contextlib.ExitStack() as undo:
        undo.enter_context(terminable())
        config, size, page_file = settings(args)
        if page_file is not None:
            undo.callback(_remove, page_file)
        page_size = config.region.page_size
        job = Job(
            array=size,
            limit=config.memory.limit,
            page_size=page_size,
            updates=max(64, size // page_size // PAGES_AN_UPDATE),
            seed=args.seed,
            place=_place(config, page_file),
        )
        try:
            return _demonstrate(config, job)
        except KeyboardInterrupt:
            print("dmh demo: stopped by Ctrl-C; the service is down and the pages are gone", file=sys.stderr)
            return 130


# ---- settings


def settings(args: argparse.Namespace) -> tuple[Config, int, Path | None]:
    """(the service's settings, the array's bytes, the page file to remove: None where it is not the demo's own).

    Raises:
        ConfigError: the settings cannot be used.
        RegionError: the array does not fit the region.
        StoreError: no directory has the room for a page file.
    """
    page_file = None
    if args.config is not None:
        config = load(args.config, args.overrides)
        size = args.size or TIMES * config.memory.limit
    else:
        config, size, page_file = _own_settings(args.size, args.overrides)
    size -= size % 8
    if size > config.region.size:
        what = (
            "--size is" if args.size else f"the array of {TIMES} x memory.limit ({format_size(config.memory.limit)}) is"
        )
        raise RegionError(
            f"{what} {format_size(size)}, and region.size only {format_size(config.region.size)}: make region.size "
            f"larger, or {'--size' if args.size else 'memory.limit'} smaller",
            region=config.region.name,
        )
    return config, size, page_file


def _own_settings(size: int | None, overrides: list[str]) -> tuple[Config, int, Path | None]:
    given = {override.partition("=")[0].strip() for override in overrides}
    name = f"demo-{os.getpid()}"
    limit = (size or DEFAULT_SIZE) // TIMES

    def made(region_size: int | str, url: str) -> Config:
        text = _SETTINGS.format(name=name, size=region_size, limit=limit, url=json.dumps(url))
        return loads(text, overrides, name="the demo's own settings")

    # What was overridden decides about the rest: the limit and the page size, then the array, then its region.
    asked = made(SIZE_STAND_IN, "memory:")
    if size is None:
        size = TIMES * asked.memory.limit if "memory.limit" in given else DEFAULT_SIZE
    page_size = asked.region.page_size
    region_size = asked.region.size if "region.size" in given else -(-size // page_size) * page_size
    if "store.url" in given:
        return made(region_size, "memory:"), size, None
    page_file = page_file_directory(region_size) / f"dmh-{name}-{secrets.token_hex(4)}.pages"
    return made(region_size, f"file://{page_file}"), size, page_file


def page_file_directory(needed: int) -> Path:
    """A directory for temporary files with room for `needed` bytes: on a disk if any, for memory is to be saved.

    Raises:
        StoreError: there is none; says why each one will not do.
    """
    refused = []
    in_memory = []
    wanted = [os.environ.get("TMPDIR"), "/var/tmp", tempfile.gettempdir(), os.getcwd()]
    for directory in dict.fromkeys(Path(path).absolute() for path in wanted if path):
        if not directory.is_dir() or not os.access(directory, os.W_OK | os.X_OK):
            refused.append(f"{directory} is no directory that you may write to")
        elif set("?#$~%") & set(str(directory)):
            refused.append(f"{directory} has a character that store.url would take for something else")
        elif (free := shutil.disk_usage(directory).free) < needed:
            refused.append(f"{directory} has only {free / 1e6:,.0f} MB free")
        elif filesystem_of(directory) in ("tmpfs", "ramfs"):
            in_memory.append(directory)
        else:
            return directory
    if in_memory:
        return in_memory[0]
    raise StoreError(
        f"no directory has room for a page file of {needed / 1e6:,.0f} MB: {'; '.join(refused)}.  Set TMPDIR to one "
        "that has, or take a smaller --size"
    )


def filesystem_of(directory: Path) -> str:
    """The type of the file system that a directory is on; "" where the kernel does not tell."""
    with contextlib.suppress(OSError):
        device = directory.stat().st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            mount, _, kind = line.partition(" - ")
            if mount.split()[2] == wanted:
                return kind.split()[0]
    return ""


def _place(config: Config, page_file: Path | None) -> str:
    if page_file is None:
        return without_password(config.store.url)
    free = shutil.disk_usage(page_file.parent).free / 1e9
    slow = (
        ", which is itself in memory: set TMPDIR to a directory on a disk"
        if filesystem_of(page_file.parent) in ("tmpfs", "ramfs")
        else ""
    )
    return f"{page_file} ({free:,.1f} GB free there{slow}; removed at the end)"


def _remove(page_file: Path) -> None:
    """The service removes its file; but one that was killed could not."""
    page_file.unlink(missing_ok=True)


# ---- processes


def _demonstrate(config: Config, job: Job) -> int:
    began = time.monotonic()
    live = sys.stdout.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
    progress = Progress()
    with (
        Display(job, live=live) as display,
        _service(config) as (connection, region_fd),
        _program(config, job) as program,
    ):
        assert program.stdout is not None
        _watch(program.stdout, connection, region_fd, progress, display)
        status = program.wait()
    if status not in (0, 1) or (status == 1 and progress.wrong is None):
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        print(f"dmh demo: the NumPy program ended {how}", file=sys.stderr)
    display.close(progress, time.monotonic() - began)
    return 0 if status == 0 and progress.verified and progress.highest <= job.limit else 1


@contextlib.contextmanager
def _service(config: Config) -> Iterator[tuple[Connection, int]]:
    """A service that ends with this block, and its region's memory, to look at its size only."""
    connection = start_service(config)
    try:
        _, (region_fd,) = connection.request({"op": "hello", "version": PROTOCOL, "owner": True})
        try:
            yield connection, region_fd
        finally:
            os.close(region_fd)
    finally:
        with undisturbed():
            connection.close()


@contextlib.contextmanager
def _program(config: Config, job: Job) -> Iterator[subprocess.Popen[bytes]]:
    """The NumPy program; killed where it has not ended by itself."""
    arguments = {"elements": job.array // 8, "updates": job.updates, "seed": job.seed}
    command = [sys.executable, "-m", "dmh.demo.program", *(f"--{name}={value}" for name, value in arguments.items())]
    socket = control_socket(service_directory(config.region.name))
    program = subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=os.environ | {SOCKET_VARIABLE: str(socket)}
    )
    try:
        yield program
    finally:
        with undisturbed():
            program.kill()
            program.communicate()


def _watch(told: IO[bytes], connection: Connection, region_fd: int, progress: Progress, display: Display) -> None:
    """Follow the program to its end."""
    os.set_blocking(told.fileno(), False)
    selector = selectors.DefaultSelector()
    selector.register(told, selectors.EVENT_READ)
    drawn = 0.0
    rest = b""
    with selector:
        while True:
            readable = selector.select(LOOK_SECONDS)
            now = time.monotonic()
            # What the kernel has given to the region's memfd: not what dmh believes it has.
            progress.memory(os.fstat(region_fd).st_blocks * 512)
            if readable:
                if not (received := os.read(told.fileno(), 65536)):
                    return
                *lines, rest = (rest + received).split(b"\n")
                for line in lines:
                    if ended := progress.told(line, now):
                        display.ended(ended)
            if now - drawn >= DRAW_SECONDS:
                progress.counted(_counters(connection), now)
                display.show(progress, now)
                drawn = now


def _counters(connection: Connection) -> dict[str, int]:
    try:
        answer, _ = connection.request({"op": "stats"})
    except ServiceError as error:
        raise ServiceError(f"the service failed while the demo ran; its own message stands above ({error})") from error
    return Snapshot.from_wire(answer["stats"]).counters

"""`Region`: memory that is larger than its limit, as NumPy arrays.

Owns arrays and the calls a program makes about them.  Does not own the mapping (`dmh.region.mapping`) nor the way to
the service (`dmh.region.connection`).  None of this code runs while a page fault is resolved.
"""

from __future__ import annotations

import contextlib
import math
import operator
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmh.config import Config, load
from dmh.errors import RegionError
from dmh.native import lib
from dmh.observe.report import Snapshot
from dmh.region.array import Array, Block, Handle, Shape, array_over, join, layout
from dmh.region.children import regions
from dmh.region.connection import Connection, find_socket, start_service
from dmh.region.guardian import Guardian, Patience
from dmh.region.mapping import Mapping
from dmh.service.channel import Message
from dmh.service.client import PROTOCOL


class Region:
    """A region of memory, mapped by this process.  Made by `dmh.open` or `dmh.attach`, not directly.

    A context manager: leaving it closes the region.  Safe to use from several threads.

    Attributes:
        name: of the service.
        size: bytes.
        page_size: bytes a page; an array occupies whole pages.
        mode: "r+", or "r" where this program only reads.
    """

    def __init__(self, connection: Connection, *, owner: bool = False, mode: str = "r+") -> None:
        self.mode = mode
        self._connection = connection
        description, descriptors = connection.request({"op": "hello", "version": PROTOCOL, "owner": owner})
        self.name = str(description["name"])
        self.size = int(description["size"])
        self.page_size = int(description["page_size"])
        (region_fd,) = descriptors
        try:
            self._mapping = Mapping(
                region_fd,
                self.size,
                self.page_size,
                seal=bool(description["seal"]),
                fork=str(description["fork"]),
                writable=self.writable,
            )
        finally:
            os.close(region_fd)
        try:
            self._register(connection, description)
        except BaseException:
            self._mapping.close()
            if connection.guardian:
                connection.guardian.stop()
            raise
        self._begin()
        self._mapping.serve_children()
        regions.add(self)

    def _begin(self) -> None:
        """What belongs to one process: at the start of a region, and in a forked child that shares it."""
        self._pid = os.getpid()
        self._closed = False
        self._close_lock = threading.Lock()
        self._freed: deque[int] = deque()
        self._finalizer = weakref.finalize(self, _disconnect, self._connection, self._mapping, os.getpid())

    def _register(self, connection: Connection, description: Message) -> None:
        # Watched from before the first fault: a service that dies later leaves this process frozen otherwise.
        self._service = str(description["service"])
        self._patience = Patience(float(description["grace"]), float(description["grace_launcher"]))
        self._guard()
        mapping = self._mapping
        message = {"op": "register", "base": mapping.base, "follows": mapping.follows, "writes": mapping.writes}
        answer, _ = connection.request(message, (mapping.uffd,))
        self._introduce(answer["view"])

    def _guard(self) -> None:
        connection = self._connection
        connection.guardian = Guardian(connection.channel, connection.path, self.name, self._patience)

    def _introduce(self, view: int) -> None:
        """How this program is known to a launcher that takes over."""
        assert self._connection.guardian is not None
        self._connection.guardian.resume_with(self._resume(view=view))

    def _resume(self, **key: int) -> Message:
        return {"op": "resume", "version": PROTOCOL, "service": self._service, **key}

    def in_forked_child(self) -> None:
        """Make this process a program of its own on the region, which it shares with its parent.  Called by
        `dmh.region.children` before the child's own code runs.
        """
        if self._closed or not self._mapping.follows:
            return
        self._finalizer.detach()
        self._mapping.be_born()
        try:
            self._connection.renew()
            answer, (uffd,) = self._connection.request(self._resume(base=self._mapping.base))
            self._mapping.replace_uffd(uffd)
            self._guard()
            self._introduce(answer["view"])
        except BaseException:
            self._mapping.abandon()
            raise
        self._begin()

    # ---- arrays

    @property
    def writable(self) -> bool:
        """Whether this program may write to the region (mode "r+")."""
        return self.mode == "r+"

    @property
    def buf(self) -> memoryview:
        """The whole region as bytes, shape (size,), writable but in mode "r".  Shared with arrays: whoever uses both
        keeps them apart.
        """
        self._check_open()
        buffer = self._mapping.buffer(0, self.size)
        return buffer if self.writable else buffer.toreadonly()

    def empty(self, shape: Shape, dtype: npt.DTypeLike = float) -> Array:
        """A new array in the region.

        Its pages are new, so it holds zeros, at no cost until they are touched.  The pages go back to the region and
        out of the store when the array and every view of it are gone.

        Args:
            shape: as for `numpy.empty`.
            dtype: any type without Python objects.

        Raises:
            RegionError: no run of free pages is long enough, the type holds objects, the region is closed, or its
                mode is "r".

        Example:
            >>> a = region.empty((1000, 1000), "f4")        # doctest: +SKIP
        """
        self._check_writable("a new array", "ndarray() gives arrays over what others have written")
        kind = np.dtype(dtype)
        if kind.hasobject:
            raise RegionError(
                f"an array of {kind} holds pointers to Python objects, and those cannot be paged out; use a type "
                "of fixed size"
            )
        dimensions, kind = layout(shape, kind)
        size = math.prod(dimensions) * kind.itemsize
        if not size:
            return np.empty(dimensions, kind).view(Array)
        count = -(-size // self.page_size)
        self._check_open()
        self._send_freed()
        answer = self._request({"op": "allocate", "count": count})
        first = int(answer["first"])
        return array_over(Block(self, first * self.page_size, count * self.page_size, first), dimensions, kind)

    def zeros(self, shape: Shape, dtype: npt.DTypeLike = float) -> Array:
        """A new array of zeros; see `empty`, which gives the same here."""
        return self.empty(shape, dtype)

    def ndarray(self, shape: Shape, dtype: npt.DTypeLike = float, offset: int = 0) -> Array:
        """An array over the bytes at a given place, as for sharing with another process: no copy, nothing freed.  It is
        not writeable in mode "r".

        Args:
            shape: as for `numpy.ndarray`.
            dtype: any type without Python objects.
            offset: bytes from the region's start; see `offset_of`.

        Raises:
            RegionError: the bytes are not all within the region.
        """
        kind = np.dtype(dtype)
        if kind.hasobject:
            raise RegionError(f"an array of {kind} holds pointers to Python objects, and those cannot be paged out")
        dimensions, kind = layout(shape, kind)
        size, offset = math.prod(dimensions) * kind.itemsize, operator.index(offset)
        if offset < 0 or size < 0 or offset + size > self.size:
            raise RegionError(f"{size} bytes at offset {offset} are not all within the region of {self.size} bytes")
        self._check_open()
        if not size:
            nothing = np.empty(dimensions, kind).view(Array)
            nothing.flags.writeable = self.writable
            return nothing
        first = offset // self.page_size
        count = -(-(offset + size) // self.page_size) - first
        # `empty` must not hand these pages out afterwards.
        self._request({"op": "take", "first": first, "count": count})
        return array_over(Block(self, offset, size), dimensions, kind)

    def offset_of(self, array: npt.NDArray[Any]) -> int:
        """Where an array's first byte lies in the region, for `ndarray` in another process."""
        self._check_open()
        low, _ = self._bounds(array)
        return low

    # ---- what a program may say about its arrays

    def flush(self, array: npt.NDArray[Any] | None = None) -> None:
        """Return when the store has every page of the array (of the whole region without one), as durable as it can
        make them.

        The pages stay resident.  Pinned pages are left out.

        Raises:
            RegionError: the store did not take every page.
        """
        self._ask("flush", array)

    def evict(self, array: npt.NDArray[Any] | None = None) -> None:
        """Move an array's pages (the whole region's without one) out of local memory now; they come back when they
        are touched.
        """
        self._ask("evict", array)

    def prefetch(self, array: npt.NDArray[Any]) -> None:
        """Start bringing an array's pages in, and return at once.  A hint: what finds no room is left out."""
        self._ask("prefetch", array)

    def advise(self, array: npt.NDArray[Any], advice: str) -> None:
        """Say how an array's pages will be used.  Hints: nothing depends on them but speed; the content stays.

        Args:
            array: lies in the region; what is said holds for whole pages, and until something else is said of them or
                the array goes.
            advice: "sequential": in ascending order, so the first fault reads ahead as far as `prefetch.window`.
                "random": in no order, so no fault reads ahead.
                "normal": what the faults show; the default.
                "willneed": soon; as `prefetch`.
                "dontneed": not soon; its pages begin to move out, as by `evict`, and this returns at once.

        Raises:
            RegionError: another word than these.

        Example:
            >>> region.advise(a, "random")                    # doctest: +SKIP
        """
        if advice == "willneed":
            self.prefetch(array)
            return
        if advice not in ("sequential", "random", "normal", "dontneed"):
            raise RegionError(
                f"advice {advice!r} is not one of 'sequential', 'random', 'normal', 'willneed' and 'dontneed'"
            )
        first, count = self._pages(array)
        if count:
            self._request({"op": "advise", "first": first, "count": count, "advice": advice})

    def discard(self, array: npt.NDArray[Any]) -> None:
        """The array's content is not needed any more: it reads as zeros, and its pages cost nothing until they are
        touched again.

        Raises:
            RegionError: the array is not contiguous, so its pages hold others' elements too; or the mode is "r".
        """
        self._check_writable("discard", "evict() and advise(array, 'dontneed') keep the content")
        self._check_open()
        low, high = self._bounds(array)
        if not array.flags.forc:
            raise RegionError("discard needs a contiguous array: the pages of this one hold elements of others too")
        first, end = -(-low // self.page_size), high // self.page_size
        if first >= end:
            self._zero(low, high)
            return
        self._zero(low, first * self.page_size)
        self._zero(end * self.page_size, high)
        self._request({"op": "discard", "first": first, "count": end - first})

    def _zero(self, low: int, high: int) -> None:
        if low < high:
            np.asarray(Block(self, low, high - low))[:] = 0

    @contextlib.contextmanager
    def pin(self, array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
        """Keep an array resident inside the ``with`` block.

        Needed where something outside the processor writes to its memory: O_DIRECT reads, registered io_uring
        buffers, RDMA.  Ordinary code and ordinary system calls do not need it.

        Raises:
            RegionError: too little of memory.limit would be left to page with.

        Example:
            >>> with region.pin(a):                           # doctest: +SKIP
            ...     os.preadv(direct, [a], 0)
        """
        first, count = self._pages(array)
        self._request({"op": "pin", "first": first, "count": count})
        try:
            lib.dmh_touch(self._mapping.pointer(first * self.page_size), count * self.page_size, self.page_size)
            yield array
        finally:
            # A block that is still open when the region ends, at the interpreter's end for one, has nothing to undo.
            if not self._closed and self._finalizer.alive:
                self._request({"op": "unpin", "first": first, "count": count})

    def stats(self) -> Snapshot:
        """The service's figures of this moment: see `dmh.observe.report.Snapshot`."""
        self._check_open()
        answer = self._request({"op": "stats"})
        return Snapshot.from_wire(answer["stats"])

    # ---- the end

    def close(self) -> None:
        """Let go of the region; a service of its own (`dmh.open`) ends.  Arrays in it must not be touched
        afterwards: that is SIGSEGV, or waits for ever where the mapping is sealed (region.seal, mode "r").

        Closing twice is harmless.
        """
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
        if os.getpid() == self._pid:
            self._finalizer()

    def __enter__(self) -> Region:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"at {self._mapping.base:#x}"
        return (
            f"<dmh.Region {self.name!r}: {self.size / 2**30:g} GiB in pages of {self.page_size // 1024} KiB, {state}>"
        )

    # ---- to other processes

    def __reduce__(self) -> Any:
        """A region is pickled as a handle: whoever unpickles it joins the service, or finds that it has."""
        return join, self._handle()

    def _handle(self) -> Handle:
        return str(self._connection.path), self._service, self.name, self.mode

    def _lend(self, first: int) -> int:
        """A hold on an array for whoever unpickles it."""
        self._check_open()
        return int(self._request({"op": "lend", "first": first})["loan"])

    def _take_loan(self, loan: int) -> tuple[Block, int]:
        """A hold on an array that was lent, and the offset of its memory."""
        self._check_open()
        answer = self._request({"op": "take-loan", "loan": loan})
        first, count = int(answer["first"]), int(answer["count"])
        start = first * self.page_size
        return Block(self, start, count * self.page_size, first), start

    # ---- inside

    def _check_open(self) -> None:
        if self._closed:
            raise RegionError("the region is closed", region=self.name)
        if os.getpid() != self._pid:
            raise RegionError(
                "this forked child does not share the region, because its parent has not CAP_SYS_PTRACE or region.fork "
                "is none: call dmh.attach() in it, or start it with the spawn method",
                region=self.name,
            )

    def _check_writable(self, what: str, instead: str) -> None:
        if not self.writable:
            raise RegionError(
                f"{what} needs mode 'r+', and this program has attached the region with mode 'r': "
                f"dmh.attach({self.name!r}) can write; {instead}",
                region=self.name,
            )

    def _bounds(self, array: npt.NDArray[Any]) -> tuple[int, int]:
        low, high = np.lib.array_utils.byte_bounds(array)
        low, high = low - self._mapping.base, high - self._mapping.base
        if low < 0 or high > self.size:
            raise RegionError("this array does not lie in the region")
        return int(low), int(high)

    def _pages(self, array: npt.NDArray[Any]) -> tuple[int, int]:
        self._check_open()
        low, high = self._bounds(array)
        first = low // self.page_size
        return first, -(-high // self.page_size) - first

    def _ask(self, operation: str, array: npt.NDArray[Any] | None) -> None:
        self._check_open()
        first, count = (0, self.size // self.page_size) if array is None else self._pages(array)
        if count:
            self._request({"op": operation, "first": first, "count": count})

    def _request(self, message: Message) -> Message:
        answer, _ = self._connection.request(message)
        self._send_freed()  # arrays that ended in another thread meanwhile found the connection in use
        return answer

    @staticmethod
    def _free(region: weakref.ref[Region], first: int) -> None:
        """The last view of an array is gone."""
        alive = region()
        if alive is not None and not alive._closed and os.getpid() == alive._pid:
            alive._freed.append(first)
            alive._send_freed()

    def _send_freed(self) -> None:
        """Give back the pages of arrays that are gone.  Called with no lock held, and from the garbage collector at
        any moment.
        """
        while True:
            try:
                first = self._freed.popleft()
            except IndexError:
                return
            if not self._connection.tell({"op": "free", "first": first}):
                self._freed.append(first)  # told after the next request, or never: if the service is gone
                return


def _disconnect(connection: Connection, mapping: Mapping, pid: int) -> None:
    """The last things a region does, on close, on collection or at the interpreter's end."""
    if os.getpid() != pid:
        return
    mapping.close()
    if connection.guardian:
        connection.guardian.stop()  # nothing here needs the service any more
    with contextlib.suppress(Exception):
        connection.request({"op": "detach", "stays": mapping.sealed}, patient=False)
    connection.close()


def open_region(config: str | os.PathLike[str] | Config, *, overrides: Sequence[str] = ()) -> Region:
    """Start a service of this program's own and map its region; the service ends when the region is closed or the
    program ends.

    Args:
        config: a YAML file, or a `dmh.Config`.
        overrides: settings that replace the file's, each ``"section.key=value"``.

    Raises:
        ConfigError: the configuration cannot be used; every problem is listed with its place.
        KernelError: this kernel or this user lacks something.
        StoreError: the store cannot be reached or used.
        ServiceError: the service could not be started.

    Example:
        >>> with dmh.open("configs/quickstart.yaml") as region:      # doctest: +SKIP
        ...     a = region.zeros((20_000, 20_000), dtype="f8")
    """
    settings = config if isinstance(config, Config) else load(config, overrides)
    return Region(start_service(settings), owner=True)


def attach(name: str | None = None, mode: str = "r+") -> Region:
    """Map the region of a service that is running.

    Args:
        name: of the service (`region.name`).  Without one: the service this program was started under (`dmh run` sets
        DMH_SOCKET), or the only
            one that runs.
        mode: "r+" to read and write; "r" only to read: arrays are not writeable, and what would change the region is
            a RegionError.  While every program has mode "r", pages that came in leave without a look at them, which
            makes reading through more than memory.limit cheaper.  A mapping of mode "r" is sealed where the kernel
            can: it then lives until the process ends, also after `close`.

    Raises:
        RegionError: another mode than these.
        ServiceError: no such service.
        KernelError: this process may not use userfaultfd.

    Example:
        >>> with dmh.attach("shared", mode="r") as region:           # doctest: +SKIP
        ...     total = region.ndarray((1000, 1000), "f8", offset=0).sum()
    """
    if mode not in ("r", "r+"):
        raise RegionError(
            f"mode {mode!r} is not one of 'r', to read, and 'r+', to read and write; there is no copy-on-write, and a "
            "region is made by dmh.open or `dmh serve`"
        )
    return attach_at(find_socket(name), mode)


def attach_at(socket_path: Path, mode: str = "r+") -> Region:
    """Map the region of the service with this control socket."""
    return Region(Connection(socket_path), mode=mode)

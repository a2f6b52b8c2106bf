"""The kernel's interfaces for tests: a memfd, its mappings, userfaultfd requests, and threads that touch pages.

Written against the kernel's headers and not with dmh's own filling and waking, so that a kernel that differs is told
from a dmh that errs.  Only opening, registering and mapping are dmh's: they are what an application's pages stand on.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
import threading
from typing import Any, NamedTuple

import pytest

from dmh.native import check, ffi, lib

PAGE = 4096
COPY, ZEROPAGE, WAKE, CONTINUE, POISON = 0xC028AA03, 0xC020AA04, 0x8010AA02, 0xC020AA07, 0xC020AA08
FEATURE_POISON = 1 << 14
MADV_DONTNEED, MADV_REMOVE, MADV_DONTFORK, MADV_DOFORK, MADV_PAGEOUT, MADV_COLLAPSE = 4, 9, 10, 11, 21, 25
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


class Message(NamedTuple):
    """A page-fault message, of the fields that matter here."""

    address: int
    thread: int


class Memory:
    """A memfd of some pages."""

    def __init__(self, pages: int) -> None:
        self.size = pages * PAGE
        self.fd = check(lib.dmh_region_create(b"dmh-test", self.size), "memfd")
        self.views: list[View] = []

    def view(self, *, registered: bool = True, follows: bool = False) -> View:
        """A mapping of all of it, watched by a userfaultfd of its own if `registered`, which announces forks if
        `follows`; children do not inherit it.
        """
        made = View(self, registered=registered, follows=follows)
        self.views.append(made)
        return made

    def present(self) -> list[int]:
        """The pages that have memory."""
        pages, at = [], 0
        while at < self.size:
            try:
                data = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError as error:
                assert error.errno == errno.ENXIO
                break
            at = os.lseek(self.fd, data, os.SEEK_HOLE)
            pages += range(data // PAGE, at // PAGE)
        return pages

    def punch(self, page: int, count: int = 1) -> None:
        check(lib.dmh_punch_file(self.fd, page * PAGE, count * PAGE), "punching a hole")

    def close(self) -> None:
        for view in self.views:
            view.close()
        os.close(self.fd)


class View:
    """One mapping of a Memory."""

    def __init__(self, memory: Memory, *, registered: bool, follows: bool = False) -> None:
        self.memory = memory
        self.pointer: Any = lib.dmh_map_region(memory.fd, memory.size, PAGE, 1)
        assert self.pointer != ffi.NULL
        self.base = int(ffi.cast("uintptr_t", self.pointer))
        self.uffd, self.features, self.how = -1, 0, 0
        if registered:
            how, features = ffi.new("int *"), ffi.new("uint64_t *")
            opening = lib.dmh_uffd_open_following if follows else lib.dmh_uffd_open
            self.uffd = check(opening(how, features), "userfaultfd")
            self.how, self.features = how[0], features[0]
            check(lib.dmh_uffd_register(self.uffd, self.pointer, memory.size), "registering")

    def bytes(self, page: int, count: int = 1) -> Any:
        """Writable bytes; touching absent ones waits for a handler."""
        return ffi.buffer(self.pointer + page * PAGE, count * PAGE)

    def copy(self, page: int, content: bytes) -> int:
        """UFFDIO_COPY: 0 or the error."""
        source = ctypes.create_string_buffer(content, len(content))
        return self._request(
            COPY, struct.pack("QQQQq", self.base + page * PAGE, ctypes.addressof(source), len(content), 0, 0)
        )

    def zero(self, page: int) -> int:
        return self._request(ZEROPAGE, struct.pack("QQQq", self.base + page * PAGE, PAGE, 0, 0))

    def wake(self, page: int) -> int:
        return self._request(WAKE, struct.pack("QQ", self.base + page * PAGE, PAGE))

    def poison(self, page: int) -> int:
        if not self.features & FEATURE_POISON:
            pytest.skip("needs UFFDIO_POISON")
        return self._request(POISON, struct.pack("QQQq", self.base + page * PAGE, PAGE, 0, 0))

    def map_present(self, page: int, count: int = 1) -> int:
        """UFFDIO_CONTINUE: map pages that are in the file already."""
        return self._request(CONTINUE, struct.pack("QQQq", self.base + page * PAGE, count * PAGE, 0, 0))

    def _request(self, request: int, argument: bytes) -> int:
        try:
            fcntl.ioctl(self.uffd, request, bytearray(argument))
        except OSError as error:
            return error.errno or -1
        return 0

    def message(self, timeout: float = 10.0) -> Message | None:
        """The next page-fault message, or None if none comes."""
        poller = select.poll()
        poller.register(self.uffd, select.POLLIN)
        if not poller.poll(timeout * 1000):
            return None
        event, _, _, _, _, address, thread, _ = struct.unpack("<BBHIQQII", os.read(self.uffd, 32))
        assert event == 0x12
        return Message(address, thread)

    def fault(self, page: int) -> Message:
        """The message of a fault on this very page."""
        message = self.message()
        assert message is not None
        assert message.address & -PAGE == self.base + page * PAGE
        return message

    def madvise(self, page: int, advice: int, count: int = 1) -> int:
        result = LIBC.madvise(ctypes.c_void_p(self.base + page * PAGE), ctypes.c_size_t(count * PAGE), advice)
        return 0 if result == 0 else ctypes.get_errno()

    def close(self) -> None:
        lib.dmh_unmap(self.pointer, self.memory.size)
        if self.uffd >= 0:
            os.close(self.uffd)


class Toucher:
    """A thread that reads the first byte of a page and then ends."""

    def __init__(self, view: View, page: int) -> None:
        self.thread_id = 0
        self._view, self._page = view, page
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.thread_id = threading.get_native_id()
        self.value = lib.dmh_touch(self._view.pointer + self._page * PAGE, 1, 1)

    def ended(self, seconds: float = 10.0) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

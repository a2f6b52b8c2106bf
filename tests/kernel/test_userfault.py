"""What resolving a fault stands on: userfaultfd over shared memory.  The facts are those of KERNEL-NOTES."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator

import pytest
from regions import run_python
from userfault import LIBC, MADV_DONTNEED, PAGE, Memory, Toucher, View

from dmh.native import check, lib

BRIEF = 0.05
"""Seconds in which a thread that has been woken by mistake would have ended; waiting longer proves no more."""


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory(16)
    yield made
    made.close()


@pytest.fixture
def view(memory: Memory) -> View:
    return memory.view()


class TestDescriptor:
    def test_is_close_on_exec_and_non_blocking(self, view: View) -> None:
        """Without O_NONBLOCK poll() says POLLERR; without O_CLOEXEC a child would keep a dead program's pages
        frozen.
        """
        assert fcntl.fcntl(view.uffd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert fcntl.fcntl(view.uffd, fcntl.F_GETFL) & os.O_NONBLOCK

    def test_poll_fails_without_o_nonblock(self, view: View) -> None:
        """The monitor's epoll would spin on the error."""
        fcntl.fcntl(view.uffd, fcntl.F_SETFL, 0)
        poller = select.poll()
        poller.register(view.uffd, select.POLLIN)
        assert poller.poll(0) == [(view.uffd, select.POLLERR)]

    def test_reading_it_when_nothing_is_there_is_eagain(self, view: View) -> None:
        """A thread that was woken before its message was read leaves POLLIN without a message."""
        with pytest.raises(BlockingIOError):
            os.read(view.uffd, 32)

    def test_messages_name_thread_and_address(self, view: View) -> None:
        """Read-ahead tells streams apart by thread."""
        toucher = Toucher(view, 5)
        message = view.fault(5)
        assert message.thread == toucher.thread_id
        view.zero(5)
        assert toucher.ended()


class TestWaking:
    def test_filling_wakes(self, view: View) -> None:
        """The ordinary case needs no second system call."""
        toucher = Toucher(view, 0)
        view.fault(0)
        assert view.copy(0, b"x" * PAGE) == 0
        assert toucher.ended()
        assert toucher.value == ord("x")

    def test_eexist_does_not_wake(self, memory: Memory, view: View) -> None:
        """Another process may have filled the page first: whoever meets EEXIST must wake, or the thread hangs."""
        toucher = Toucher(view, 0)
        view.fault(0)
        os.pwrite(memory.fd, b"y" * PAGE, 0)
        assert view.copy(0, b"x" * PAGE) == errno.EEXIST
        assert not toucher.ended(BRIEF)
        assert view.wake(0) == 0
        assert toucher.ended()
        assert toucher.value == ord("y")

    def test_filling_through_one_mapping_leaves_another_blocked(self, memory: Memory) -> None:
        """Each process waits on its own userfaultfd, so every one of them must be woken."""
        views = [memory.view(), memory.view()]
        touchers = [Toucher(view, 0) for view in views]
        for view in views:
            view.fault(0)
        assert views[0].copy(0, b"x" * PAGE) == 0
        assert touchers[0].ended()
        assert not touchers[1].ended(BRIEF)
        views[1].wake(0)
        assert touchers[1].ended()
        assert touchers[1].value == ord("x")

    def test_waking_before_the_message_is_read_makes_it_disappear(self, memory: Memory, view: View) -> None:
        """So a wake of everybody is a repair at any moment, and no message has to be remembered."""
        toucher = Toucher(view, 0)
        poller = select.poll()
        poller.register(view.uffd, select.POLLIN)
        assert poller.poll(10_000)
        os.pwrite(memory.fd, b"z", 0)
        view.wake(0)
        assert toucher.ended()
        assert view.message(0) is None

    def test_a_thread_woken_too_early_faults_again(self, view: View) -> None:
        """So a wake too many is harmless."""
        toucher = Toucher(view, 0)
        view.fault(0)
        view.wake(0)
        view.fault(0)
        assert view.zero(0) == 0
        assert toucher.ended()

    def test_two_threads_on_one_page_are_two_messages_and_one_fill(self, view: View) -> None:
        """Why the monitor makes one fault of several messages."""
        touchers = [Toucher(view, 0), Toucher(view, 0)]
        view.fault(0)
        view.fault(0)
        assert view.zero(0) == 0
        assert all(toucher.ended() for toucher in touchers)


class TestErrors:
    def test_a_mapping_that_is_gone_is_enoent(self, memory: Memory) -> None:
        """dmh fills through another mapping then."""
        view = memory.view()
        lib.dmh_unmap(view.pointer, memory.size)
        assert view.copy(0, bytes(PAGE)) == errno.ENOENT

    def test_a_process_that_is_gone_is_esrch(self) -> None:
        """No hang-up arrives on the descriptor: only the errno and a pidfd tell."""
        code = """
            import socket, sys
            sys.path.insert(0, sys.argv[2])
            from userfault import Memory
            memory = Memory(2)
            view = memory.view()
            with socket.socket(fileno=int(sys.argv[1])) as channel:
                socket.send_fds(channel, [str(view.base).encode()], [view.uffd])
            """
        import socket

        ours, theirs = socket.socketpair()
        with ours, theirs:
            ended = run_python(code, theirs.fileno(), os.path.dirname(__file__), pass_fds=[theirs.fileno()])
            assert ended.returncode == 0, ended.stderr
            base, fds, _, _ = socket.recv_fds(ours, 100, 1)
        view = object.__new__(View)
        view.base, view.uffd = int(base), fds[0]
        assert view.copy(0, bytes(PAGE)) == errno.ESRCH
        assert view.message(0) is None
        os.close(fds[0])

    def test_a_run_with_one_page_in_the_middle_stops_there(self, memory: Memory, view: View) -> None:
        """UFFDIO_COPY of several pages may be partial: dmh has to go on behind what exists."""
        os.pwrite(memory.fd, b"m" * PAGE, 2 * PAGE)
        assert view.copy(0, b"x" * 4 * PAGE) in (errno.EAGAIN, errno.EEXIST)
        assert memory.present() == [0, 1, 2]
        assert os.pread(memory.fd, 1, 2 * PAGE) == b"m"


def in_child(body: str, *, expect: int) -> str:
    """Run a program over a Memory of 8 pages and its View; it must end by this signal (0: in order)."""
    code = f"""
        import ctypes, errno, os, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from userfault import *
        from dmh.native import ffi, lib
        memory = Memory(8)
        view = memory.view()
        {body}
        """
    ended = run_python(code)
    assert ended.returncode == -expect, ended.stderr
    return ended.stdout


class TestPoison:
    def test_access_is_sigbus(self) -> None:
        """A page whose content is lost must never read as anything."""
        in_child("assert view.poison(0) == 0; lib.dmh_touch(view.pointer, 1, 1)", expect=signal.SIGBUS)

    def test_in_a_system_call_it_is_efault(self, memory: Memory, view: View) -> None:
        """A kernel that accesses a lost page says so, and does not kill."""
        assert view.poison(1) == 0
        with open(os.devnull, "rb") as null, open("/dev/zero", "rb", buffering=0) as zero:
            assert null.readable()
            with pytest.raises(OSError, match="Bad address") as caught:
                zero.readinto(view.bytes(1))
        assert caught.value.errno == errno.EFAULT

    def test_a_copy_heals_while_the_page_is_absent(self, view: View) -> None:
        """How a discarded page becomes usable again after it was lost."""
        assert view.poison(1) == 0
        assert view.copy(1, b"w" * PAGE) == 0
        assert lib.dmh_touch(view.pointer + PAGE, 1, 1) == ord("w")

    def refused(self, view: View, page: int) -> bool:
        """A system call that writes to the page says EFAULT."""
        with open("/dev/zero", "rb", buffering=0) as zero:
            try:
                zero.readinto(view.bytes(page))
            except OSError as error:
                return error.errno == errno.EFAULT
        return False

    def test_a_mapping_stays_poisoned_when_another_fills_the_page(self, memory: Memory) -> None:
        """Each mapping has a mark of its own: healing has to go through every one of them."""
        view, other = memory.view(), memory.view()
        assert view.poison(1) == 0
        assert other.copy(1, b"w" * PAGE) == 0
        assert self.refused(view, 1)
        assert view.madvise(1, MADV_DONTNEED) == 0
        assert lib.dmh_touch(view.pointer + PAGE, 1, 1) == ord("w")

    def test_mapping_what_is_there_takes_a_mark_away(self, memory: Memory) -> None:
        """How a page is healed in every program without showing anything but its content: fill it through one mapping,
        UFFDIO_CONTINUE through the others.  They need no registration for minor faults.
        """
        views = [memory.view() for _ in range(3)]
        assert [view.poison(page) for view in views[1:] for page in (1, 2)] == [0] * 4
        assert views[0].copy(1, b"w" * 2 * PAGE) == 0
        assert self.refused(views[1], 1)
        assert self.refused(views[2], 2)
        assert [view.map_present(1, 2) for view in views[1:]] == [0, 0]
        assert [lib.dmh_touch(view.pointer + page * PAGE, 1, 1) for view in views for page in (1, 2)] == [ord("w")] * 6
        views[1].bytes(1)[0:1] = b"z"
        assert lib.dmh_touch(views[2].pointer + PAGE, 1, 1) == ord("z")
        assert views[1].map_present(1) == errno.EEXIST

    def test_a_mark_stays_where_there_is_nothing_to_map(self, memory: Memory) -> None:
        """A discarded page needs zeros in its place before its marks can go; and a punch does not take them away."""
        view, other = memory.view(), memory.view()
        assert view.poison(1) == 0
        assert view.map_present(1) == errno.EFAULT
        assert self.refused(view, 1)
        assert other.copy(1, b"w" * PAGE) == 0
        memory.punch(1)
        assert self.refused(view, 1)

    def test_a_second_mark_is_eexist(self, view: View) -> None:
        """Marking again, after a worker's death or for a program that joined later, is harmless."""
        assert view.poison(1) == 0
        assert view.poison(1) == errno.EEXIST


class TestSafeMapping:
    FORK = """
        os.pwrite(memory.fd, b"x" * 4096, 0)
        child = os.fork()
        if not child:
            lib.dmh_touch(view.pointer + {page} * 4096, 1, 1)
            os._exit(0)
        print(os.WTERMSIG(os.waitpid(child, 0)[1]), memory.present(), lib.dmh_touch(view.pointer, 1, 1))
        """

    @pytest.mark.parametrize("page", [0, 1])
    def test_a_forked_child_gets_sigsegv_and_harms_nobody(self, page: int) -> None:
        """MADV_DONTFORK: an inherited mapping is not registered, and would make zeros for the parent."""
        body = self.FORK.format(page=page).replace("\n        ", "\n        ")
        code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n" + (
            "import os\nfrom userfault import *\nmemory = Memory(8)\nview = memory.view()\n"
            + "\n".join(line[8:] for line in body.splitlines())
        )
        ended = run_python(code)
        assert ended.stdout.split(" ", 1) == [str(int(signal.SIGSEGV)), f"[0] {ord('x')}\n"], ended.stderr

    def test_a_guarded_mapping_raises_sigsegv(self) -> None:
        """A stale array after close() must not read zeros."""
        in_child(
            "lib.dmh_guard_mapping(view.pointer, memory.size); lib.dmh_touch(view.pointer, 1, 1)", expect=signal.SIGSEGV
        )

    def test_the_last_descriptor_going_frees_blocked_threads_into_zeros(self, memory: Memory) -> None:
        """Why application and launcher both hold one as long as the region lives."""
        view = memory.view()
        toucher = Toucher(view, 0)
        view.fault(0)
        os.close(view.uffd)
        view.uffd = -1
        assert toucher.ended()
        assert toucher.value == 0

    def test_a_second_descriptor_keeps_them_blocked(self, memory: Memory) -> None:
        """And that a duplicate is enough."""
        view = memory.view()
        kept = os.dup(view.uffd)
        toucher = Toucher(view, 0)
        view.fault(0)
        os.close(view.uffd)
        view.uffd = kept
        assert not toucher.ended(BRIEF)
        assert view.copy(0, b"q" * PAGE) == 0
        assert toucher.ended()

    def test_mseal_stops_replacement_and_leaves_faults_and_punching_alone(self) -> None:
        """A stray munmap in the program cannot turn its pages into zeros."""
        out = in_child(
            "sealed = lib.dmh_seal_mapping(view.pointer, memory.size)\n"
            "        if sealed == -errno.ENOSYS: print('ENOSYS'); sys.exit(0)\n"
            "        assert sealed == 0\n"
            "        base = ctypes.c_void_p(view.base)\n"
            "        size = ctypes.c_size_t(memory.size)\n"
            "        assert LIBC.munmap(base, size) == -1 and ctypes.get_errno() == errno.EPERM\n"
            "        assert LIBC.mprotect(base, size, 1) == -1 and ctypes.get_errno() == errno.EPERM\n"
            "        assert lib.dmh_guard_mapping(view.pointer, memory.size) == -errno.EPERM\n"
            "        assert view.copy(0, b'x' * PAGE) == 0 and lib.dmh_touch(view.pointer, 1, 1) == ord('x')\n"
            "        memory.punch(0)\n"
            "        assert memory.present() == []\n"
            "        toucher = Toucher(view, 0); view.fault(0); view.zero(0); assert toucher.ended()",
            expect=0,
        )
        if "ENOSYS" in out:
            pytest.skip("needs mseal")


class TestSystemCalls:
    def serve(self, view: View, call: Callable[[], object]) -> None:
        """Do something in a thread that faults on page 0, and resolve that fault."""
        import threading

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        view.fault(0)
        view.copy(0, b"k" * PAGE)
        thread.join(10)
        assert not thread.is_alive()

    def test_absent_pages_block_and_succeed(self, memory: Memory, view: View) -> None:
        """file.readinto(array) and os.write(fd, array) work on pages that were evicted."""
        if view.how == lib.DMH_UFFD_USER_ONLY:
            pytest.skip("needs kernel faults: root, CAP_SYS_PTRACE or a readable /dev/userfaultfd")
        reading, writing = os.pipe()
        self.serve(view, lambda: os.write(writing, view.bytes(0)))
        assert os.read(reading, PAGE) == b"k" * PAGE
        os.close(reading)
        os.close(writing)

    def test_with_user_mode_faults_only_they_fail(self, memory: Memory) -> None:
        """What the warning at start-up is about: EFAULT, and never wrong bytes."""
        opened = (
            LIBC.syscall(ctypes.c_long(323), ctypes.c_int(os.O_CLOEXEC | os.O_NONBLOCK | 1))
            if sys.maxsize > 2**32
            else -1
        )
        if opened < 0 or os.uname().machine != "x86_64":
            pytest.skip("needs UFFD_USER_MODE_ONLY")
        api = bytearray((0xAA).to_bytes(8, "little") + bytes(16))
        fcntl.ioctl(opened, 0xC018AA3F, api)
        view = memory.view(registered=False)
        check(lib.dmh_uffd_register(opened, view.pointer, memory.size), "registering")
        view.uffd = opened
        with open("/dev/zero", "rb", buffering=0) as zero, pytest.raises(OSError, match="Bad address"):
            zero.readinto(view.bytes(0))
        assert memory.present() == []

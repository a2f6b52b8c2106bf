"""What following forks stands on: the event, the child's userfaultfd, and how its end shows."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from regions import follows, start_python, wait_until
from userfault import PAGE, Memory, View

from dmh.native import lib

FORK_EVENT = 0x13
BRIEF = 0.05


pytestmark = pytest.mark.skipif(not follows(), reason="needs CAP_SYS_PTRACE: UFFD_FEATURE_EVENT_FORK")

PROGRAM = """
import os, socket, sys
sys.path.insert(0, sys.argv[2])
from userfault import *
memory = Memory(8)
view = memory.view(follows=True)
view.madvise(0, MADV_DOFORK, 8)
channel = socket.socket(fileno=int(sys.argv[1]))

def touch(page):
    return lib.dmh_touch(view.pointer + page * PAGE, 1, 1)

def say(what):
    channel.send(str(what).encode())

def fork(work):
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    say(child)
    os.waitpid(child, 0)
    say("waited")

socket.send_fds(channel, [str(view.base).encode()], [memory.fd, view.uffd])
for line in iter(lambda: channel.recv(1000), b""):
    exec(line)
"""


class Program:
    """A process that maps a Memory, follows forks and does what it is told; this one holds its userfaultfd."""

    def __init__(self) -> None:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.settimeout(10)
        self.process = start_python(PROGRAM, theirs.fileno(), os.path.dirname(__file__), pass_fds=[theirs.fileno()])
        theirs.close()
        base, (self.memory_fd, uffd), _, _ = socket.recv_fds(self.channel, 100, 2)
        self.base = int(base)
        self.view = self.at(uffd)
        self.fds = [self.memory_fd, uffd]

    def at(self, uffd: int) -> View:
        """The same place in the process behind this userfaultfd."""
        view = object.__new__(View)
        view.base, view.uffd, view.features = self.base, uffd, 1 << 14
        return view

    def do(self, line: str) -> None:
        self.channel.send(line.encode())

    def answer(self, timeout: float = 10.0) -> str | None:
        self.channel.settimeout(timeout)
        try:
            return self.channel.recv(1000).decode()
        except TimeoutError:
            return None

    def birth(self, of: View | None = None) -> View:
        """Read the event of a fork: the child's view."""
        fd = (of or self.view).uffd
        assert select.select([fd], [], [], 10)[0], "no fork is announced"
        event, child = struct.unpack_from("<B7xI", os.read(fd, 32))
        assert event == FORK_EVENT
        self.fds.append(child)
        return self.at(child)

    def quiet(self, view: View) -> bool:
        return not select.select([view.uffd], [], [], BRIEF)[0]

    def close(self) -> None:
        self.channel.close()
        self.process.kill()
        self.process.__exit__(None, None, None)
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def program() -> Iterator[Program]:
    made = Program()
    yield made
    made.close()


class TestTheEvent:
    def test_fork_waits_until_it_is_read_and_filling_says_eagain_meanwhile(self, program: Program) -> None:
        """The monitor, which reads it, must not wait for the fill: it fills through its own mapping then."""
        program.do("fork(lambda: None)")
        assert select.select([program.view.uffd], [], [], 10)[0]
        assert program.view.copy(0, bytes(PAGE)) == errno.EAGAIN
        assert program.view.zero(1) == errno.EAGAIN
        assert program.view.poison(2) == errno.EAGAIN
        assert program.view.wake(0) == 0
        assert program.answer(BRIEF) is None
        program.birth()
        assert program.answer() is not None
        assert program.view.copy(0, bytes(PAGE)) == 0

    def test_it_brings_the_childs_userfaultfd_ready_for_use(self, program: Program) -> None:
        """Non-blocking and close-on-exec like its parent's, or epoll would spin and programs would inherit it."""
        program.do("fork(lambda: None)")
        child = program.birth()
        assert fcntl.fcntl(child.uffd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert fcntl.fcntl(child.uffd, fcntl.F_GETFL) & os.O_NONBLOCK

    def test_a_program_started_without_a_copy_of_the_memory_raises_none(self, program: Program) -> None:
        """posix_spawn, and subprocess, use vfork: they cost nothing."""
        program.do("import subprocess; subprocess.run(['true']); say('ran')")
        assert program.answer() == "ran"
        program.do("os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0); say('ran')")
        assert program.answer() == "ran"
        assert program.quiet(program.view)

    def test_a_mapping_that_children_do_not_inherit_raises_none(self, program: Program) -> None:
        """So a mapping may be registered before anybody reads its events."""
        program.do("view.madvise(0, MADV_DONTFORK, 8); fork(lambda: None)")
        assert program.answer() is not None
        assert program.quiet(program.view)

    def test_children_of_children_are_announced_by_the_child(self, program: Program) -> None:
        """Nobody has to register anything again."""
        program.do("fork(lambda: fork(lambda: touch(3)))")
        child = program.birth()
        grandchild = program.birth(child)
        grandchild.fault(3)
        grandchild.zero(3)
        assert program.quiet(program.view)


class TestTheChild:
    def test_its_faults_come_by_its_own_userfaultfd_and_name_it(self, program: Program) -> None:
        """How the launcher learns which process a child is."""
        program.do("fork(lambda: say(touch(3)))")
        child = program.birth()
        assert child.fault(3).thread == int(program.answer() or 0)
        assert program.quiet(program.view)
        assert program.view.copy(3, b"x" * PAGE) == 0
        assert program.answer(BRIEF) is None, "filled through the parent, it still waits"
        child.wake(3)
        assert program.answer() == str(ord("x"))

    def test_what_is_present_it_sees_without_a_fault(self, program: Program) -> None:
        """Shared memory has no copies: page tables are filled on the way."""
        program.view.copy(3, b"y" * PAGE)
        program.do("fork(lambda: say(touch(3)))")
        child = program.birth()
        assert {program.answer(), program.answer()} >= {str(ord("y"))}
        assert program.quiet(child)

    def test_a_poisoned_page_is_poisoned_in_the_child_or_raises_a_fault_there(self, program: Program) -> None:
        """The mark is inherited where page tables are copied (write protection is registered), else it is asked for."""
        program.view.poison(3)
        program.do("fork(lambda: say(touch(3)))")
        child = program.birth()
        assert program.answer() is not None
        if child.message(0.3):
            child.poison(3)
        assert program.answer() == "waited", "it has read something"

    def test_with_its_last_descriptor_gone_it_reads_zeros(self, program: Program) -> None:
        """The service holds the child's only one, until the child has been given it."""
        program.do("fork(lambda: say(touch(3)))")
        child = program.birth()
        child.fault(3)
        os.close(child.uffd)
        program.fds.remove(child.uffd)
        assert "0" in (program.answer(), program.answer())

    def test_an_anonymous_page_that_is_dropped_faults_again_in_the_next_child(self, program: Program) -> None:
        """The birth page: every child touches it, none leaves it to its own children."""
        code = (
            "view.madvise(0, MADV_DONTFORK, 8); memory = Memory(8); view = memory.view(registered=False); lib.dmh_birth_page(view.pointer, memory.size); "
            "uffd = lib.dmh_uffd_open_following(ffi.new('int *'), ffi.new('uint64_t *')); "
            "lib.dmh_uffd_register(uffd, view.pointer, memory.size + PAGE); lib.dmh_follow_forks(view.pointer, memory.size); "
            "socket.send_fds(channel, [str(view.base).encode()], [uffd]); "
            "born = lambda: lib.dmh_be_born(view.pointer, memory.size)"
        )
        program.do(code)
        base, (uffd,), _, _ = socket.recv_fds(program.channel, 100, 1)
        program.fds.append(uffd)
        program.base = int(base)
        parent = program.at(uffd)
        program.do("fork(lambda: (born(), fork(lambda: born())))")
        for _ in range(2):
            parent = program.birth(parent)
            parent.fault(8)
            assert lib.dmh_birth_answer(parent.uffd, parent.base, 8 * PAGE, 0) == 0


class TestItsEnd:
    def gone(self, view: View) -> bool:
        return bool(lib.dmh_view_is_gone(view.uffd, view.base))

    def test_exit_and_exec_show_as_esrch_and_nothing_else(self, program: Program) -> None:
        """No hang-up comes, so the launcher asks from time to time."""
        for line in ("fork(lambda: sys.stdin.readline())", "fork(lambda: os.execvp('cat', ['cat']))"):
            program.do(line)
            child = program.birth()
            pid = int(program.answer() or 0)
            if "exec" not in line:
                assert not self.gone(child)
                os.kill(pid, 9)
                assert program.answer() == "waited"
            else:
                wait_until(lambda pid=pid: Path(f"/proc/{pid}/comm").read_text() == "cat\n", "it is another program")
                assert program.process.stdin is not None
                program.process.stdin.close()
            assert self.gone(child)
            assert program.quiet(child)
        assert not self.gone(program.view)


def test_a_child_of_a_mapping_that_is_not_followed_makes_zeros_for_everybody() -> None:
    """Why a mapping is either followed or not inherited at all."""
    memory = Memory(8)
    view = memory.view()
    view.madvise(0, 11, 8)  # MADV_DOFORK
    child = os.fork()
    if not child:
        os._exit(lib.dmh_touch(view.pointer, 1, 1))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert memory.present() == [0]
    memory.close()


def test_a_debugger_does_not_see_absent_pages() -> None:
    """Told in the README: /proc/PID/mem fails there, and brings nothing in."""
    memory = Memory(8)
    view = memory.view()
    view.copy(1, b"z" * PAGE)
    with open("/proc/self/mem", "rb", buffering=0) as file:
        assert os.pread(file.fileno(), 1, view.base + PAGE) == b"z"
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(file.fileno(), 1, view.base)
    assert memory.present() == [1]
    memory.close()

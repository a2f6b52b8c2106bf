"""What a program does when processes of its service die: it waits, or ends with a message; it never sees zeros."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from regions import processes_of, start_python, unique_name, wait_until

from dmh.native import check, lib
from dmh.service.channel import Channel, Message
from dmh.service.paths import ServiceDirectory, control_socket, hold_alive, service_directory

SIZE = 1 << 20


class StandIn:
    """Speaks as a launcher does, on a real socket with real descriptors, and dies or comes back when it is told to."""

    def __init__(self, directory: Path, grace: float = 0.3, grace_launcher: float = 30.0) -> None:
        self.directory = directory
        self.alive = hold_alive(directory)
        self.region = check(lib.dmh_region_create(b"dmh-stand-in", SIZE), "memfd")
        self.description = {
            "name": "stand-in", "size": SIZE, "page_size": 4096, "seal": False, "fork": "none",
            "service": "0123456789abcdef", "grace": grace, "grace_launcher": grace_launcher,
        }  # fmt: skip
        self.uffd = -1
        self.channel: Channel | None = None
        self.listen()

    def listen(self) -> None:
        self.server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.server.settimeout(20)
        self.server.bind(str(control_socket(self.directory)))
        self.server.listen(8)

    def accept(self) -> Message:
        """The first message of the next connection."""
        connection, _ = self.server.accept()
        connection.settimeout(20)
        self.channel = Channel(connection)
        return self.read()

    def read(self) -> Message:
        assert self.channel is not None
        received = self.channel.receive()
        assert received is not None
        for fd in received[1]:
            self.uffd = fd
        return received[0]

    def answer(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        assert self.channel is not None
        self.channel.send(message, fds)

    def greet(self) -> None:
        """What happens until a program is attached."""
        assert self.accept()["op"] == "hello"
        self.answer(self.description, (self.region,))
        assert self.read()["op"] == "register"
        self.answer({"view": 7})

    def launcher_dies(self) -> None:
        """Its sockets close, and its name is free; workers still hold the sign of life."""
        assert self.channel is not None
        self.server.close()
        control_socket(self.directory).unlink()
        self.channel.close()

    def workers_die(self) -> None:
        os.close(self.alive)
        self.alive = -1

    def close(self) -> None:
        self.server.close()
        if self.channel:
            self.channel.close()
        for fd in (self.alive, self.region, self.uffd):
            if fd >= 0:
                os.close(fd)


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[StandIn]:
    made = StandIn(tmp_path)
    yield made
    made.close()


PROGRAM = """
    import sys, dmh
    region = dmh.attach()
    print("attached", flush=True)
    for line in sys.stdin:
        region.evict()
        print("done", flush=True)
    """
TOUCHES = """
    import sys, dmh
    region = dmh.attach()
    print("attached", flush=True)
    sys.stdin.readline()
    print("read", region.buf[0], flush=True)
    """


def attached(stand_in: StandIn, code: str = PROGRAM) -> subprocess.Popen[str]:
    env = os.environ | {"DMH_SOCKET": str(control_socket(stand_in.directory))}
    program = start_python(code, env=env, stderr=subprocess.PIPE)
    stand_in.greet()
    assert program.stdout is not None
    assert program.stdout.readline() == "attached\n"
    return program


class TestTheLauncherDies:
    def test_one_that_takes_over_is_told_who_this_is_and_requests_go_on(self, stand_in: StandIn) -> None:
        """The request that the death cut off is made again: the program sees a pause."""
        with attached(stand_in) as program:
            assert program.stdin is not None
            assert program.stdout is not None
            program.stdin.write("ask\n")
            program.stdin.flush()
            assert stand_in.read() == {"op": "evict", "first": 0, "count": 256}
            stand_in.launcher_dies()
            stand_in.listen()
            assert stand_in.accept() == {"op": "resume", "version": 1, "service": "0123456789abcdef", "view": 7}
            stand_in.answer({"view": 7})
            assert stand_in.read() == {"op": "evict", "first": 0, "count": 256}
            stand_in.answer({})
            assert program.stdout.readline() == "done\n"
            program.kill()

    def test_a_program_that_asks_for_nothing_is_known_again_too(self, stand_in: StandIn) -> None:
        """Its Python may be frozen in a page fault: the thread that speaks for it is C."""
        with attached(stand_in, TOUCHES) as program:
            assert program.stdin is not None
            program.stdin.write("touch\n")
            program.stdin.flush()
            stand_in.launcher_dies()
            stand_in.listen()
            assert stand_in.accept()["op"] == "resume"
            stand_in.answer({"view": 7})
            stand_in.launcher_dies()
            stand_in.listen()
            assert stand_in.accept()["op"] == "resume", "and again"
            assert program.poll() is None
            program.kill()

    def test_nobody_takes_over_in_time(self, tmp_path: Path) -> None:
        stand_in = StandIn(tmp_path, grace_launcher=0.2)
        with attached(stand_in, TOUCHES) as program:
            stand_in.launcher_dies()
            out, err = program.communicate("touch\n", timeout=20)
            assert (program.returncode, out) == (-signal.SIGBUS, "")
            assert "has lost its launcher, and no other has taken over" in err
        stand_in.close()

    def test_one_that_does_not_know_the_program_ends_it(self, stand_in: StandIn) -> None:
        with attached(stand_in, TOUCHES) as program:
            stand_in.launcher_dies()
            stand_in.listen()
            assert stand_in.accept()["op"] == "resume"
            stand_in.answer({"error": "no such view", "kind": "ProtocolError"})
            out, err = program.communicate("touch\n", timeout=20)
            assert (program.returncode, out) == (-signal.SIGBUS, "")
            assert "does not know this program any more" in err

    def test_nobody_is_left(self, stand_in: StandIn) -> None:
        with attached(stand_in, TOUCHES) as program:
            stand_in.launcher_dies()
            stand_in.workers_die()
            out, err = program.communicate("touch\n", timeout=20)
            assert (program.returncode, out) == (-signal.SIGBUS, "")
            assert "the service 'stand-in' is gone" in err


EVERYTHING = """
    import sys, threading, numpy as np, dmh
    region = dmh.attach(sys.argv[1])
    array = region.empty((512, 4096), "u1")
    array[:] = 255
    print("ready", flush=True)

    def look(first):
        while True:
            for page in range(first, 512, 2):
                if array[page, 17] != 255:
                    print("WRONG", page, flush=True)

    threading.Thread(target=look, args=(1,), daemon=True).start()
    look(0)
    """


@pytest.mark.parametrize("order", ["launcher first", "workers first"])
def test_everything_dies_at_once(tmp_path: Path, order: str) -> None:
    """SIGKILL for every process of the service, under load: its own descriptor keeps the program's threads frozen."""
    name = unique_name()
    (tmp_path / "all.yaml").write_text(
        f"region: {{name: {name}, size: 4MiB}}\nmemory: {{limit: 256KiB}}\nstore: {{url: 'file://{tmp_path}/pages'}}\n"
        "prefetch: {enabled: false}\nservice: {grace: 200ms}\n"
    )
    serve = subprocess.Popen(
        [sys.executable, "-m", "dmh.cli.main", "serve", "-c", str(tmp_path / "all.yaml")], stdout=subprocess.PIPE
    )
    with serve:
        wait_until(lambda: control_socket(service_directory(name)).exists(), "the service listens")
        victims = processes_of(serve.pid)
        with start_python(EVERYTHING, name, stderr=subprocess.PIPE) as program:
            assert program.stdout is not None
            assert program.stdout.readline() == "ready\n"
            for pid in victims if order == "launcher first" else victims[::-1]:
                os.kill(pid, signal.SIGKILL)
            out, err = program.communicate(timeout=20)
    ServiceDirectory(name).remove()
    assert (program.returncode, out) == (-signal.SIGBUS, "")
    assert "is gone, and with it the pages of this program that it held" in err

"""Who does not belong: another user reaches nothing, and whatever comes over dmh's sockets, nobody is harmed."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from regions import inside, launcher_of, run_python, wait_until
from store_servers import RedisServer

import dmh
from dmh import wire
from dmh.errors import ProtocolError
from dmh.fault.dispatch import resolver_address
from dmh.native import check, ffi, lib
from dmh.region.connection import connect
from dmh.service.channel import MAX_BYTES, Channel
from dmh.service.paths import base_directory, control_socket, service_directory

OpenRegion = Callable[..., dmh.Region]
NOBODY = 65534
BECOME_NOBODY = f"""
    import ctypes, json, os, socket, sys
    from pathlib import Path
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
    """

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")


def as_nobody(code: str, *arguments: object) -> list[str]:
    """The lines that a program of another user prints."""
    ended = run_python(BECOME_NOBODY + code, *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split()


@pytest.fixture
def pages(open_region: OpenRegion, tmp_path: Path) -> Iterator[tuple[dmh.Region, np.ndarray]]:
    """A region whose bytes are right in the end."""
    region = open_region(f"store.url=file://{tmp_path}/pages")
    array = region.empty((100, 4096), "u1")
    array[:] = 77
    yield region, array
    assert (array == 77).all()
    region.evict(array)
    assert (array == 77).all()
    with inside(region) as look:
        look.validate()


@needs_root
class TestAnotherUser:
    def test_finds_every_door_closed(self, pages: tuple[dmh.Region, np.ndarray], tmp_path: Path) -> None:
        """Sockets, the ledger, the lock files, the page file, and what /proc shows of the service's processes."""
        region, _ = pages
        directory = service_directory(region.name)
        doors = [str(path) for path in directory.iterdir()]
        assert {"control.sock", "resolver-1.sock", "lock", "alive", "ledger"} <= {Path(door).name for door in doors}
        tmp_path.chmod(0o755)
        for parent in tmp_path.parents[:-1]:
            parent.chmod(parent.stat().st_mode | 0o011)
        stored = [str(path) for path in tmp_path.iterdir()]
        assert f"{tmp_path}/pages" in stored
        doors += stored
        with inside(region) as look:
            for pid in look.processes:
                doors += [f"/proc/{pid}/{what}" for what in ("mem", "environ", "maps")]
                doors += [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
            code = """
    for door in map(str, json.loads(sys.argv[1])):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            if door.endswith(".sock"):
                sock.connect(door)
            else:
                open(door, "rb").read(1)
            print("OPEN:" + door)
        except PermissionError:
            print("closed")
    """
            assert set(as_nobody(code, json.dumps(doors))) == {"closed"}

    def test_behind_an_opened_door_is_still_turned_away(self, pages: tuple[dmh.Region, np.ndarray]) -> None:
        """Should somebody open the directory, the kernel says who connects: nothing is answered, and it is counted."""
        region, _ = pages
        directory = service_directory(region.name)
        refused = region.stats().counters["refused"]
        with opened(directory):
            code = """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(sys.argv[1])
    try:
        sock.send(json.dumps({"op": "hello", "version": 1}).encode())
        print("answered" if sock.recv(1000) else "closed")
    except (BrokenPipeError, ConnectionResetError):
        print("closed")
    """
            assert as_nobody(code, control_socket(directory)) == ["closed"]
            assert region.stats().counters["refused"] == refused + 1
            code = """
    import zmq
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.setsockopt(zmq.LINGER, 300)
        push.connect(sys.argv[1])
        push.send(b"whatever is refused is counted")
    """
            completed = region.stats().counters["refused"]
            as_nobody_with_packages(code, resolver_address(directory, 1))
        assert region.stats().counters["refused"] == completed, "it never reached the resolver"

    def test_sees_no_password(self, open_region: OpenRegion, start_redis: Callable[..., RedisServer]) -> None:
        secret = "s3cr3t-of-this-test"
        server = start_redis(requirepass=secret)
        region = open_region(f"store.url={server.url}")
        assert secret in server.url
        region.zeros(100_000)[:] = 1
        assert secret not in json.dumps(region.stats().to_wire())
        with inside(region) as look:
            shown = "".join(Path(f"/proc/{pid}/cmdline").read_text() for pid in look.processes)
            assert secret not in shown
            assert not any(secret in path.read_text(errors="replace") for path in service_directory(region.name).iterdir() if path.is_file())  # fmt: skip
        assert secret not in subprocess.run(["ps", "axww"], capture_output=True, text=True, check=True).stdout


def as_nobody_with_packages(code: str, *arguments: object) -> None:
    """For code that imports packages, which another user may not be able to read: they are imported before."""
    head, _, rest = BECOME_NOBODY.partition("    os.setgroups")
    ended = run_python(head + "    import zmq\n    os.setgroups" + rest + code, *arguments)
    assert ended.returncode == 0, ended.stderr


@contextmanager
def opened(directory: Path) -> Iterator[None]:
    """Everybody may enter, for as long as a test takes."""
    changed = {path: path.stat().st_mode for path in (base_directory().parent, base_directory(), directory)}
    sockets = [path for path in directory.iterdir() if path.name.endswith(".sock")]
    try:
        for path in changed:
            path.chmod(0o755)
        for path in sockets:
            path.chmod(0o777)
        yield
    finally:
        for path, mode in changed.items():
            path.chmod(mode)
        for path in sockets:
            path.chmod(0o755)


class TestSharedMemory:
    def test_is_sealed(self, pages: tuple[dmh.Region, np.ndarray]) -> None:
        """A program is given the region's memfd: it can neither cut it short nor make it longer."""
        region, _ = pages
        directory = Path(f"/proc/{launcher_of(region)}/fd")
        link = next(link for link in directory.iterdir() if os.readlink(link).startswith("/memfd:dmh-region"))
        fd = os.open(link, os.O_RDWR)
        try:
            for size in (0, 4096, region.size * 2):
                with pytest.raises(PermissionError):
                    os.ftruncate(fd, size)
        finally:
            os.close(fd)


# ---- messages


def speak(region: dmh.Region, *, greet: bool) -> Channel:
    channel = connect(control_socket(service_directory(region.name)))
    channel.socket.settimeout(10)
    if greet:
        _, fds = channel.request({"op": "hello", "version": 1})
        for fd in fds:
            os.close(fd)
    return channel


def answer_to(channel: Channel, packet: bytes, fds: list[int] | None = None) -> str:
    """`error`, `closed` or `accepted`."""
    try:
        socket.send_fds(channel.socket, [packet], fds or [])
        answer = channel.receive()
    except (ProtocolError, OSError):
        return "closed"
    if answer is None:
        return "closed"
    for fd in answer[1]:
        os.close(fd)
    return "error" if "error" in answer[0] else "accepted"


OPERATIONS = ["hello", "resume", "register", "detach", "allocate", "take", "prefetch", "discard", "evict", "flush", "pin", "unpin", "lend", "take-loan", "birth", "ready", "stop it", "__class__", ""]  # fmt: skip
FIELDS = ["version", "service", "view", "base", "follows", "first", "count", "owner", "loan", "id", "op"]


def nonsense(rng: random.Random) -> Any:
    """A value that no operation can take."""
    return rng.choice(
        [-1, -(1 << 70), 1 << 70, 1e308, float("nan"), float("inf"), None, "", "x" * rng.randrange(300), [], {}, [[]], {"a": []}]
    )  # fmt: skip


def some_packet(rng: random.Random) -> bytes:
    """A message that must not be obeyed: wrong fields, wrong types, cut short, too deep, too long, or no JSON at all."""
    kind = rng.randrange(8)
    message = {field: nonsense(rng) for field in rng.sample(FIELDS, rng.randrange(len(FIELDS)))}
    message["op"] = rng.choice([*OPERATIONS, nonsense(rng)])
    packet = json.dumps(message).encode()
    if kind == 0:
        return packet[: rng.randrange(1, len(packet))] if len(packet) > 1 else b"{"
    if kind == 1:
        return rng.randbytes(rng.randrange(1, 300))
    if kind == 2:
        return rng.choice([b"[", b'{"op":', b'[{"a":']) * rng.randrange(1, 9000)
    if kind == 3:
        return packet + b" " * (MAX_BYTES - len(packet) + rng.randrange(1, 100))
    if kind == 4:
        at = rng.randrange(len(packet))
        return packet[:at] + rng.randbytes(1) + packet[at + 1 :]
    return packet


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_comes_over_the_control_socket_harms_nobody(pages: tuple[dmh.Region, np.ndarray], seed: int) -> None:
    region, _ = pages
    rng = random.Random(seed)
    before = region.stats()
    descriptors = Path(f"/proc/{launcher_of(region)}/fd")
    open_before = len(list(descriptors.iterdir()))
    refused = 0
    channel = speak(region, greet=True)
    for _ in range(600):
        fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(rng.choice([0] * 8 + [1, 2, 31, 40]))]
        packet = some_packet(rng)
        answer = answer_to(channel, packet, fds)
        for fd in fds:
            os.close(fd)
        # What does not read as JSON may by chance be a harmless question, such as a second hello.
        refused += answer != "accepted"
        if answer == "closed" or rng.random() < 0.1:
            channel.close()
            channel = speak(region, greet=rng.random() < 0.5)
    channel.close()
    wait_until(lambda: len(list(descriptors.iterdir())) <= open_before + 1, "no descriptor is kept")
    after = region.stats()
    assert refused > 500
    assert after.counters["refused"] > before.counters["refused"]
    assert (after.programs, after.allocated, after.pinned) == (before.programs, before.allocated, before.pinned)


class TestRegistering:
    def uffd(self) -> int:
        return check(lib.dmh_uffd_open(ffi.new("int *"), ffi.new("uint64_t *")), "userfaultfd")

    def test_what_is_not_a_userfaultfd_is_refused(self, pages: tuple[dmh.Region, np.ndarray], tmp_path: Path) -> None:
        region, _ = pages
        reading, writing = os.pipe()
        ours, theirs = socket.socketpair()
        plain = os.open(tmp_path / "plain", os.O_RDWR | os.O_CREAT)
        message = json.dumps({"op": "register", "base": 1 << 30}).encode()
        channel = speak(region, greet=True)
        for fds in ([reading], [writing], [ours.fileno()], [plain], [], [plain, plain]):
            assert answer_to(channel, message, fds) == "error"
        channel.close()
        for fd in (reading, writing, plain):
            os.close(fd)
        ours.close()
        theirs.close()
        assert region.stats().programs == 1

    def test_a_place_where_no_mapping_can_be_is_refused(self, pages: tuple[dmh.Region, np.ndarray]) -> None:
        """A worker that filled pages there would take the error for a defect of its own, and end."""
        region, _ = pages
        fd = self.uffd()
        channel = speak(region, greet=True)
        for base in (0, -4096, 1, 4097, 1 << 47, (1 << 47) - 4096, 1 << 63, 1 << 64, 1 << 100):
            message = json.dumps({"op": "register", "base": base}).encode()
            assert answer_to(channel, message, [fd]) == "error", base
        channel.close()
        os.close(fd)
        assert region.stats().programs == 1

    def test_a_userfaultfd_without_a_mapping_is_the_programs_own_trouble(
        self, pages: tuple[dmh.Region, np.ndarray]
    ) -> None:
        """Pages that it asks for cannot be filled there; others have theirs."""
        region, array = pages
        fd = self.uffd()
        channel = speak(region, greet=True)
        assert answer_to(channel, json.dumps({"op": "register", "base": 1 << 40}).encode(), [fd]) == "accepted"
        assert answer_to(channel, json.dumps({"op": "register", "base": 1 << 40}).encode(), [fd]) == "error", "again"
        region.evict(array)
        assert (array == 77).all()
        region.flush(array)
        channel.close()
        os.close(fd)
        wait_until(lambda: region.stats().programs == 1, "it is forgotten")

    def test_another_programs_mapping_cannot_be_taken_over(self, pages: tuple[dmh.Region, np.ndarray]) -> None:
        region, _ = pages
        channel = speak(region, greet=False)
        description, (fd,) = channel.request({"op": "hello", "version": 1})
        os.close(fd)
        channel.close()
        for key in ({"view": 1}, {"base": region._mapping.base}):
            channel = speak(region, greet=False)
            resume = {"op": "resume", "version": 1, "service": description["service"], **key}
            assert answer_to(channel, json.dumps(resume).encode()) == "error"
            channel.close()
        assert region.stats().programs == 1


def test_who_does_not_read_his_answers_holds_nobody_up(pages: tuple[dmh.Region, np.ndarray]) -> None:
    region, _ = pages
    channel = speak(region, greet=True)
    channel.socket.settimeout(0.2)
    try:
        for _ in range(20_000):
            channel.socket.send(b'{"op": "hello", "version": 1}')
    except TimeoutError:
        pass
    assert region.stats().programs == 1
    channel.close()


class TestFaultMessages:
    @contextmanager
    def push(self, region: dmh.Region) -> Iterator[Callable[[bytes], None]]:
        with zmq.Context() as context, context.socket(zmq.PUSH) as push:
            push.setsockopt(zmq.LINGER, 5000)
            push.connect(resolver_address(service_directory(region.name), 1))
            yield push.send

    def test_malformed_frames_are_counted_and_no_more(self, pages: tuple[dmh.Region, np.ndarray]) -> None:
        region, _ = pages
        rng = random.Random(4)
        good = wire.pack(wire.Kind.FAULT, [wire.Request(5, 1, 0, 1, 1, 0)])
        frames = [b"", b"d", b"dm", b"dm\x01\x09", b"dm\x02\x01", good[:-1], good + b"x", b"x" * 1_000_000]
        frames += [good[:at] for at in range(4, len(good)) if (at - 4) % 36]
        frames += [rng.randbytes(rng.randrange(100)) for _ in range(200)]
        before = region.stats().counters["refused"]
        with self.push(region) as send:
            for frame in frames:
                send(frame)
        wait_until(lambda: region.stats().counters["refused"] >= before + len(frames), "each is refused")

    def test_well_formed_lies_harm_nobody(self, pages: tuple[dmh.Region, np.ndarray]) -> None:
        """Pages that do not exist are refused; a fault that nobody had is a page brought in for nothing."""
        region, array = pages
        rng = random.Random(5)
        numbers = [0, 1, region.size // 4096 - 1, region.size // 4096, 1 << 40, (1 << 64) - 1]
        lies = [
            wire.Request(
                rng.choice(numbers), rng.choice([0, 1, -1, 1 << 62, -(1 << 62)]), rng.choice([0, 1, 50, (1 << 32) - 1]),
                rng.choice([0, 1, 2, 1 << 31]), rng.randrange(1 << 32), rng.randrange(1 << 64),
            )
            for _ in range(300)
        ]  # fmt: skip
        before = region.stats().counters["refused"]
        with self.push(region) as send:
            for lie in lies:
                send(wire.pack(rng.choice([wire.Kind.FAULT, wire.Kind.PREFETCH, wire.Kind.STOP]), [lie]))
        wait_until(lambda: region.stats().counters["refused"] > before, "some are refused")
        region.evict(array)
        assert (array == 77).all()

    def test_what_is_no_zeromq_at_all(self, pages: tuple[dmh.Region, np.ndarray]) -> None:
        region, _ = pages
        rng = random.Random(6)
        address = resolver_address(service_directory(region.name), 1).removeprefix("ipc://")
        for _ in range(20):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
                raw.connect(address)
                raw.sendall(rng.randbytes(rng.randrange(200)))

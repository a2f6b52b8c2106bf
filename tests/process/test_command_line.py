"""`dmh run`, `serve`, `stats`, and what bad input gets: real processes, real signals, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from regions import unique_name, wait_until

from dmh.service.paths import control_socket, service_directory

DMH = [sys.executable, "-m", "dmh.cli.main"]

PROGRAM = """
import os, signal, sys, time
import numpy as np, dmh
region = dmh.attach()
a = region.zeros(200_000)
a[:] = np.arange(200_000)
assert a.sum() == 200_000 * 199_999 / 2
print("ready", flush=True)
"""


class Service:
    """A configuration file of its own."""

    def __init__(self, tmp_path: Path) -> None:
        self.name = unique_name()
        self.pages = tmp_path / "pages"
        self.file = tmp_path / "service.yaml"
        self.file.write_text(
            f"region: {{name: {self.name}, size: 4MiB}}\nmemory: {{limit: 512KiB}}\nstore: {{url: 'file://{self.pages}'}}\n"
        )

    def left(self) -> list[str]:
        """What a service of this name has left behind."""
        found = [str(path) for path in (service_directory(self.name), self.pages) if path.exists()]
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                if f"\0{self.name}\0".encode() in directory.joinpath("cmdline").read_bytes():
                    found.append(str(directory))
                environment = directory.joinpath("environ").read_bytes()
            except OSError:
                continue
            if f"DMH_TEST={self.name}\0".encode() in environment:
                found.append(directory.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode())
        return found

    def start(self, *words: str, **more: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*DMH, *words],
            env=os.environ | {"DMH_TEST": self.name},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **more,  # type: ignore[call-overload]
        )

    def program(self, code: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | {"DMH_TEST": self.name},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *program: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        process = self.start("run", "-c", str(self.file), *options, "--", *program)
        out, err = process.communicate(timeout=40)
        return subprocess.CompletedProcess(program, process.returncode, out, err)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    yield service
    wait_until(lambda: not service.left(), f"nothing is left: {service.left()}", 15)


class TestRun:
    def test_the_program_runs_in_the_region_and_its_status_is_passed_on(self, service: Service, tmp_path: Path) -> None:
        stats = tmp_path / "stats.json"
        done = service.run(sys.executable, "-c", PROGRAM + "sys.exit(7)", options=("--stats", str(stats)))
        assert (done.returncode, done.stdout, done.stderr) == (7, "ready\n", "")
        figures = json.loads(stats.read_text())
        assert figures["counters"]["evicted"] > 100
        assert figures["limit"] == 128

    def test_a_program_that_needs_no_region_is_no_error(self, service: Service) -> None:
        assert service.run("true").returncode == 0

    def test_a_setting_can_be_overridden(self, service: Service, tmp_path: Path) -> None:
        stats = tmp_path / "stats.json"
        assert service.run("true", options=("--set", "memory.limit=1MiB", "--stats", str(stats))).returncode == 0
        assert json.loads(stats.read_text())["limit"] == 256

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    def test_a_signal_to_dmh_reaches_the_program(self, service: Service, number: signal.Signals) -> None:
        program = f"signal.signal({int(number)}, lambda *_: sys.exit(42))\n" + PROGRAM + "time.sleep(60)"
        process = service.start(
            "run", "-c", str(service.file), "--", sys.executable, "-c", "import signal, sys\n" + program
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(30) == 42

    def test_a_program_that_a_signal_ends_ends_dmh_the_same_way(self, service: Service) -> None:
        done = service.run(sys.executable, "-c", PROGRAM + "os.kill(os.getpid(), signal.SIGKILL)")
        assert done.returncode == -signal.SIGKILL

    def test_ctrl_c_reaches_the_program_once(self, service: Service) -> None:
        program = (
            "import signal\nhits = []\nsignal.signal(signal.SIGINT, lambda *_: hits.append(1))\n"
            + PROGRAM
            + "time.sleep(1.0)\n"
            "print(len(hits), flush=True)\n"
        )
        leader, follower = os.openpty()
        code = f"import os, sys; os.setsid(); import fcntl, termios; fcntl.ioctl({follower}, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *DMH, "run", "-c", str(service.file), "--", sys.executable, "-c", program],
            env=os.environ | {"DMH_TEST": service.name}, stdin=follower, stdout=subprocess.PIPE, text=True, pass_fds=[follower],
        )  # fmt: skip
        os.close(follower)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.write(leader, b"\x03")
        assert process.stdout.readline() == "1\n"
        assert process.wait(30) == 0
        os.close(leader)

    def test_nothing_outlives_dmh_that_was_killed(self, service: Service) -> None:
        process = service.start("run", "-c", str(service.file), "--", sys.executable, "-c", PROGRAM + "time.sleep(60)")
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        process.wait(10)  # the fixture waits until nothing is left

    @pytest.mark.parametrize("role", ["monitor", "resolver", "evictor"])
    def test_a_worker_that_is_killed_is_replaced_and_the_program_goes_on(self, service: Service, role: str) -> None:
        code = PROGRAM + "sys.stdin.readline()\na += 1\nprint(a[5], a.sum())\n"
        process = service.start("run", "-c", str(service.file), "--", sys.executable, "-c", code, stdin=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        worker = subprocess.check_output(["pgrep", "-P", str(process.pid), "-f", f"workers.{role}"], text=True).split()
        os.kill(int(worker[0]), signal.SIGKILL)
        out, err = process.communicate("go on\n", timeout=30)
        assert process.returncode == 0, err
        assert out == f"6.0 {200_000 * 199_999 / 2 + 200_000}\n"
        assert "ended unexpectedly (SIGKILL) and is started again" in err

    def test_a_worker_that_finds_a_defect_ends_the_run_with_a_message_and_never_with_zeros(
        self, service: Service
    ) -> None:
        code = PROGRAM + "time.sleep(0.5)\nprint(a[5], a.sum())\ntime.sleep(60)"
        process = service.start("run", "-c", str(service.file), "--", sys.executable, "-c", code)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        evictor = subprocess.check_output(["pgrep", "-P", str(process.pid), "-f", "workers.evictor"], text=True).split()
        os.kill(int(evictor[0]), signal.SIGABRT)
        out, err = process.communicate(timeout=30)
        assert process.returncode != 0
        assert "evictor ended unexpectedly (SIGABRT)" in err
        assert "0.0 " not in out

    def test_a_worker_that_fails_again_and_again_ends_the_run(
        self, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A service whose evictor is started for ever would stand still, and look as if it worked."""
        (tmp_path / "sitecustomize.py").write_text(
            "import sys\n"
            "if 'workers.evictor' in sys.orig_argv:\n"
            "    from dmh.evict.lpet import Lpet\n"
            "    def run(self, keep_going): raise RuntimeError('a defect')\n"
            "    Lpet.run = run\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        code = PROGRAM + "time.sleep(60)"
        process = service.start("run", "-c", str(service.file), "--", sys.executable, "-c", code)
        _, err = process.communicate(timeout=30)
        assert process.returncode != 0
        assert err.count("evictor ended unexpectedly (exit status 1) and is started again") == 5
        assert "evictor ended unexpectedly (exit status 1); the service cannot go on without it" in err
        assert "a defect" in err

    @pytest.mark.parametrize(
        ("words", "status", "says"),
        [
            (["no-such-program"], 127, "no such program"),
            (["./pages"], 126, "not executable"),
            ([], 2, "name a program"),
        ],
    )
    def test_a_program_that_cannot_be_started(self, service: Service, words: list[str], status: int, says: str) -> None:
        plain = service.file.with_name("plain")
        plain.touch(0o600)
        done = service.run(*[word.replace("./pages", str(plain)) for word in words])
        assert done.returncode == status
        assert says in done.stderr


class TestServe:
    def test_several_programs_share_a_region(self, service: Service) -> None:
        process = service.start("serve", "-c", str(service.file))
        assert process.stdout is not None
        assert "serving" in process.stdout.readline()
        process.stdout.readline()
        first = (
            f"import dmh; r = dmh.attach({service.name!r}); a = r.ndarray(100_000, 'i4', 65536); a[:] = 5; r.evict(a)"
        )
        second = f"import dmh; r = dmh.attach({service.name!r}); a = r.ndarray(100_000, 'i4', 65536); print(a.sum())"
        subprocess.run([sys.executable, "-c", first], check=True, timeout=30)
        assert subprocess.check_output([sys.executable, "-c", second], text=True, timeout=30) == "500000\n"
        shown = subprocess.check_output([*DMH, "stats", service.name], text=True, timeout=30)
        assert "resident" in shown
        assert "written" in shown
        figures = json.loads(subprocess.check_output([*DMH, "stats", service.name, "--json"], text=True, timeout=30))
        assert figures["counters"]["written"] >= 97
        assert figures["programs"] == 0
        another = service.start("serve", "-c", str(service.file))
        _, err = another.communicate(timeout=30)
        assert another.returncode == 1
        assert "already running" in err
        subprocess.run([*DMH, "serve", "--stop", service.name], check=True, timeout=30)
        assert process.wait(30) == 0

    def test_sigterm_ends_it(self, service: Service) -> None:
        process = service.start("serve", "-c", str(service.file))
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        assert process.wait(30) == 0

    def test_a_program_whose_service_is_killed_as_a_whole_is_ended_and_reads_no_zeros(self, service: Service) -> None:
        process = service.start("serve", "-c", str(service.file))
        assert process.stdout is not None
        process.stdout.readline()
        wait_until(lambda: control_socket(service_directory(service.name)).exists(), "the service is up")
        program = service.program(
            f"import dmh, sys; r = dmh.attach({service.name!r}); a = r.zeros(400_000); a[:] = 1; print('ready', flush=True)\n"
            "sys.stdin.readline(); print(a.min(), flush=True)"
        )
        assert program.stdout is not None
        assert program.stdin is not None
        assert program.stdout.readline() == "ready\n"
        workers = subprocess.check_output(["pgrep", "-P", str(process.pid), "-f", "workers."], text=True).split()
        for pid in (process.pid, *map(int, workers)):
            os.kill(pid, signal.SIGKILL)
        process.wait(10)
        program.stdin.write("\n")
        program.stdin.flush()
        out, err = program.communicate(timeout=30)
        assert program.returncode == -signal.SIGBUS
        assert "is gone" in err
        assert out == ""
        # Nobody was left to clear up: the next service of the name does.
        process = service.start("serve", "-c", str(service.file))
        assert process.stdout is not None
        assert "serving" in process.stdout.readline()
        process.terminate()
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["store.url=nothing:x"], "file, memory, redis"),
        (["store.url=redis://127.0.0.1:1/0"], "redis://127.0.0.1:1/0"),
        (["memory.limit=8MiB"], "memory.limit"),
        (["memory.limit=4KiB"], "8 pages"),
        (["memory.high=0.5", "memory.low=0.6"], "memory.low"),
        (["region.size=1PiB", "memory.limit=1GiB"], "region.size"),
        (["region.size=8TiB", "memory.limit=1GiB"], "disk"),
        (["memory.limit=3TiB", "region.size=4TiB", "store.url='memory:'"], "missing"),
        (["region.sise=1MiB"], "region.size"),
    ],
)
def test_settings_that_cannot_be_are_told_and_nothing_is_started(
    service: Service, settings: list[str], says: str
) -> None:
    done = service.run("echo", "ran", options=tuple(word for s in settings for word in ("--set", s)))
    assert done.returncode in (2, 125)
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_page_file_in_use_is_refused(service: Service, tmp_path: Path) -> None:
    code = f"import subprocess, sys; sys.exit(subprocess.call({[*DMH, 'run', '-c', str(service.file), '--set', 'region.name=' + service.name + 'b', '--', 'true']!r}))"
    done = service.run(sys.executable, "-c", code)
    assert done.returncode == 125
    assert "in use by another service" in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody who may not use userfaultfd")
def test_a_user_who_may_not_use_userfaultfd_is_told_what_to_do(tmp_path: Path) -> None:
    if (
        os.stat("/dev/userfaultfd").st_mode & 0o006
        or Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1"
    ):
        pytest.skip("everybody may use userfaultfd here")
    code = (
        "import os, logging; logging.basicConfig(); from dmh.service.requirements import check_kernel; os.setgroups([]); os.setgid(65534);"
        " os.setuid(65534); check_kernel(4096)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    # The kernel still allows user-mode faults: a warning that says what breaks, and the mend.
    assert done.returncode == 0, done.stderr
    assert "user-mode faults" in done.stderr
    assert "chmod a+rw /dev/userfaultfd" in done.stderr

"""`dmh doctor`: what it says of this machine, of one that is denied things, and of configurations; and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from denied import DENIED
from regions import run_python, unique_name
from store_servers import RedisServer

import dmh

OpenRegion = Callable[..., dmh.Region]
GROUPS = ["userfaultfd", "kernel", "memory", "limits", "idle sources", "surroundings"]
MAIN = """
    from dmh.cli.main import main
    sys.exit(main(["doctor", *sys.argv[2:]]))
"""


def doctor(*words: str, code: str = "\n    import sys", how: str = "", **options: Any) -> tuple[int, str]:
    """Exit status and output, after `code` has taken something away."""
    ended = run_python(code + MAIN, how, *words, **options)
    assert "Traceback" not in ended.stderr, ended.stderr
    if ended.returncode == 77:
        pytest.skip("needs seccomp filters")
    return ended.returncode, ended.stdout + ended.stderr


def named(findings: list[dict[str, str]], name: str) -> dict[str, str]:
    return next(finding for finding in findings if finding["name"].startswith(name))


def told(*words: str, **more: Any) -> tuple[int, list[dict[str, str]]]:
    status, printed = doctor("--json", *words, **more)
    report = json.loads(printed)
    assert report["can_run"] == (status == 0)
    return status, report["findings"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A configuration of its own name, with its page file in tmp_path/pages."""
    path = tmp_path / "dmh.yaml"
    path.write_text(
        f"region: {{name: {unique_name()}, size: 4MiB}}\nmemory: {{limit: 1MiB}}\nstore: {{url: 'file://{tmp_path}/pages'}}\n"
    )
    return path


class TestThisMachine:
    def test_the_report_is_aligned_and_says_that_dmh_can_run(self) -> None:
        status, printed = doctor()
        lines = printed.splitlines()
        assert status == 0, printed
        assert lines[-1].startswith("dmh can run here")
        assert [line for line in lines if line and not line.startswith((" ", "dmh can"))] == GROUPS
        assert lines == [line.rstrip() for line in lines]
        found = [line for line in lines if re.match(r" [✓·!✗] ", line)]
        assert len(found) > 20
        # Name, value and meaning begin in the same columns on every line.
        for line in found:
            assert all(line[column - 1] == " " != line[column] for column in (4, 36, 68)), line

    def test_as_json_every_finding_is_whole(self) -> None:
        status, findings = told()
        assert status == 0
        assert list(dict.fromkeys(finding["group"] for finding in findings)) == GROUPS
        for finding in findings:
            assert finding.keys() == {"group", "name", "value", "level", "meaning", "mend"}
            assert finding["level"] in ("ok", "info", "less", "bad")
            assert all(finding[key] for key in ("name", "value", "meaning")), finding
            assert finding["level"] not in ("less", "bad") or finding["mend"], finding

    def test_it_leaves_no_descriptor_open(self) -> None:
        code = """
    import os
    from dmh.doctor import machine
    list(machine.findings())
    before = os.listdir("/proc/self/fd")
    list(machine.findings())
    print(before == os.listdir("/proc/self/fd"))
    """
        assert run_python(code).stdout == "True\n"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="needs x86-64: the filter names its system calls' numbers")
class TestWithLess:
    def test_without_userfaultfd_dmh_cannot_run(self) -> None:
        status, findings = told(code=DENIED, how="denied")
        assert status == 1
        bad = [finding for finding in findings if finding["level"] == "bad"]
        assert [finding["name"] for finding in bad] == ["can dmh run?"]
        assert "may not use userfaultfd" in bad[0]["meaning"]
        assert "chmod a+rw /dev/userfaultfd" in bad[0]["mend"]
        assert "cannot run here: can dmh run?" in doctor(code=DENIED, how="denied")[1]

    def test_with_user_mode_faults_only_it_can_with_less(self) -> None:
        status, findings = told(code=DENIED, how="user mode")
        assert status == 0
        finding = named(findings, "user-mode faults")
        assert (finding["level"], finding["value"]) == ("less", "yes, used by dmh")
        assert "EFAULT" in finding["meaning"]
        assert "chmod a+rw /dev/userfaultfd" in finding["mend"]


@pytest.mark.parametrize(
    ("limit", "name", "level"),
    [("NOFILE, (40, 40)", "descriptors", "bad"), ("NOFILE, (60, 60)", "descriptors", "less"), ("AS, (3 << 30,) * 2", "address space", "less")],
)  # fmt: skip
def test_limits_are_told_with_the_mend(limit: str, name: str, level: str) -> None:
    status, findings = told(code=f"\n    import sys, resource\n    resource.setrlimit(resource.RLIMIT_{limit})")
    assert status == (level == "bad")
    assert (named(findings, name)["level"], bool(named(findings, name)["mend"])) == (level, True)


class TestConfiguration:
    def test_one_that_fits(self, file: Path, tmp_path: Path) -> None:
        status, findings = told("-c", str(file))
        assert status == 0, findings
        assert [f["name"] for f in findings if f["group"] == f"configuration {file}"] == [
            "evictor.idle", "memory", "address space", "file size", "descriptors", "processes", "programs", "store",
        ]  # fmt: skip
        assert "written and read back" in named(findings, "store")["meaning"]
        assert list(tmp_path.iterdir()) == [file]

    def test_one_that_does_not_fit_says_what_is_missing(self, file: Path) -> None:
        status, printed = doctor("-c", str(file), "--set", "region.size=8TiB", "--set", "memory.limit=4TiB")
        assert status == 1
        assert re.search(r"✗ +memory +3\.\d+ TiB \([\d,]+", printed), printed
        assert re.search(r"✗ +store", printed), printed
        assert "cannot run here: memory, store" in printed

    @pytest.mark.skipif(Path("/sys/kernel/mm/page_idle").exists(), reason="needs a kernel without idle page tracking")
    def test_an_idle_source_that_is_not_there_is_told(self, file: Path) -> None:
        status, findings = told("-c", str(file), "--set", "evictor.idle=page_idle")
        assert status == 1
        assert "CONFIG_IDLE_PAGE_TRACKING" in named(findings, "evictor.idle")["meaning"]
        assert named(findings, "page_idle")["value"] == "no"

    def test_a_configuration_with_mistakes_is_told_as_ever(self, file: Path) -> None:
        status, printed = doctor("-c", str(file), "--set", "memory.limit=8MiB")
        assert status == 2
        assert "memory.limit" in printed

    def test_a_store_is_tried_out_and_left_as_it_was(self, file: Path, redis_server: RedisServer) -> None:
        status, findings = told("-c", str(file), "--set", f"store.url={redis_server.url}")
        assert status == 0
        assert named(findings, "store")["value"] == redis_server.url
        keys = subprocess.check_output(["redis-cli", "-s", str(redis_server.socket_path), "dbsize"], text=True)
        assert keys.strip() == "0"

    def test_a_store_that_does_not_answer_is_told_without_its_password(self, file: Path) -> None:
        status, printed = doctor("-c", str(file), "--set", "store.url=redis://:hush@127.0.0.1:1/0")
        assert status == 1
        assert "***@127.0.0.1:1" in printed
        assert "hush" not in printed

    def test_a_running_service_is_left_alone(self, open_region: OpenRegion, file: Path, tmp_path: Path) -> None:
        region = open_region(f"store.url=file://{tmp_path}/pages")
        array = region.zeros(200_000)
        array[:] = np.arange(200_000)
        running = "--set", f"region.name={region.name}"
        status, findings = told("-c", str(file), *running)
        assert status == 0
        assert "runs already" in named(findings, "region.name")["meaning"]
        status, findings = told("-c", str(file))
        assert status == 1
        assert "in use by another service" in named(findings, "store")["meaning"]
        assert np.array_equal(array, np.arange(200_000))
        assert region.stats().counters["poisoned"] == 0
        region.close()


def test_it_is_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "dmh.cli.main", "doctor"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    assert "✓" in done.stdout

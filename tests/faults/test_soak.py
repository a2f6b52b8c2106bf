"""Random kills under load: not one wrong byte, no hang, nothing left over.  Short here; `make soak` takes ten minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from store_servers import require_program

CASES = {
    "small pages": ("--kill-rate", "4"),
    "a tiny limit": ("--kill-rate", "4", "-c", "configs/stress.yaml", "--threads", "4"),
    "large pages": ("--kill-rate", "4", "--page-size", "64KiB", "--limit", "8MiB", "--processes", "3"),
    "a store that is killed, too": ("--kill-rate", "3", "--store", "redis", "--kill-store"),
}


def soak(seconds: int, *options: str) -> dict[str, Any]:
    """A run of `dmh stress`, in which nothing may go wrong."""
    if "redis" in options:
        require_program("redis-server")
    command = [sys.executable, "-m", "dmh.cli.main", "stress", "--json", "--duration", f"{seconds}s", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 200)
    assert done.stdout, done.stderr
    verdict: dict[str, Any] = json.loads(done.stdout)
    assert verdict["ok"], "\n".join([f"seed {verdict['seed']}", *verdict["log"], *problems(verdict)])
    print({key: verdict[key] for key in ("seed", "seconds", "operations", "kills", "longest_ms")})
    return verdict


def problems(verdict: dict[str, Any]) -> list[str]:
    return [line for kind in ("wrong", "hangs", "ended", "exceeded", "leaks") for line in verdict[kind]]


@pytest.mark.timeout(250)
@pytest.mark.parametrize("case", ["small pages", "a store that is killed, too"])
def test_workers_die_at_random_and_no_byte_is_wrong(case: str) -> None:
    verdict = soak(8, *CASES[case])
    assert verdict["counters"]["restarts"] >= 4


@pytest.mark.soak
@pytest.mark.timeout(400)
@pytest.mark.parametrize("case", CASES)
def test_for_ten_minutes_in_all(case: str) -> None:
    verdict = soak(150, *CASES[case])
    assert sum(verdict["kills"].values()) >= 100

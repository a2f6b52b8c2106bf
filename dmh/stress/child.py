"""One program of a stress run, as the run sees it: its process, what it tells, and which of its threads stand still.

Owns the pipes to the process.  What it does there is `dmh.stress.program`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dmh.service.paths import SOCKET_VARIABLE
from dmh.stress.look import Look
from dmh.stress.plan import Plan


class Program:
    """One of the programs, as the run sees it."""

    def __init__(self, plan: Plan, number: int, socket: Path, log: IO[bytes]) -> None:
        self.number = number
        self.phase = ""
        self.operations = 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dmh.stress.program", plan.to_wire(), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | {SOCKET_VARIABLE: str(socket)},
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self._rest = b""
        self._advanced = [time.monotonic()] * plan.threads
        self._progress = [[-1, -1]] * plan.threads
        self._doing = [""] * plan.threads

    def go(self) -> None:
        """The next phase may begin."""
        self.phase = ""
        self._advanced = [time.monotonic()] * len(self._advanced)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()

    def read(self) -> Iterator[dict[str, Any]]:
        """What it has told since last time; nothing more after its end, which `phase` then says."""
        assert self.process.stdout is not None
        received = self.process.stdout.read1(1 << 16)  # type: ignore[attr-defined]
        if not received and received is not None:
            self.phase = "ended"
        *lines, self._rest = (self._rest + (received or b"")).split(b"\n")
        for line in lines:
            facts: dict[str, Any] = json.loads(line)
            if "progress" in facts:
                self._note(facts["progress"], facts["doing"])
            self.phase = facts.get("phase", self.phase)
            yield facts

    def _note(self, progress: list[list[int]], doing: list[str]) -> None:
        now = time.monotonic()
        for thread, (before, after) in enumerate(zip(self._progress, progress, strict=True)):
            if before[0] != after[0] or not doing[thread]:
                self._advanced[thread] = now
        self._progress, self._doing = progress, doing
        self.operations = sum(done for done, _ in progress)

    def stuck(self, patience: float, look: Look) -> Iterator[str]:
        """Which of its threads have made no progress for so long, and in what."""
        now = time.monotonic()
        for thread, since in enumerate(self._advanced):
            if now - since > patience:
                page = self._progress[thread][1]
                where = f", at {look.page(page)}" if page >= 0 else ""
                what = self._doing[thread] or "starting"
                yield f"hang: thread {thread} of program {self.number}, {what}, for {now - since:.0f} s{where}"

    def how_it_ended(self) -> str:
        """For a message."""
        status = self.process.wait()
        return f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"

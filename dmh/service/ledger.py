"""What the launcher would have to know if it were another one: who has the region mapped, and what each program holds.

Owns the file ``ledger`` in the service's directory: one JSON record a line, appended before the program is answered,
so that a launcher that takes over knows at least what any program was told.  Everything else about a service lives in
its workers.  Written by `dmh.service.clients`, read by `dmh.service.adoption`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmh.errors import ServiceError

Record = dict[str, Any]
COMPACT_LINES = 20_000
"""Above this many lines, and four times what is in force, the file is written anew."""


@dataclass(slots=True)
class Program:
    """One program with the region mapped.

    Attributes:
        pid, started: its process, and when that started (clock ticks since boot): a number alone may be another's soon.
            Both 0 for a forked child that has not said who it is.
        view, base: its mapping.
        owner: the service ends with it.
        follows: its forks are announced.
        writes: its mapping can be written through.
        blocks: first page -> [pages, how often it holds them], of its arrays.
        pins: (first page, pages), as often as they were pinned.
    """

    pid: int
    started: int
    view: int
    base: int
    owner: bool
    follows: bool
    writes: bool
    blocks: dict[int, list[int]] = field(default_factory=dict)
    pins: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class State:
    """What the records come to.

    Attributes:
        programs: by view.
        taken: runs of pages handed out for good.
        freeing: first page -> pages, given back but with their content not known to be gone.
        loans: loan -> first page of the array that was lent, the lender's view; 0: it has been taken.
        lingering: view -> base, process, when that started, of mappings that can be written through by a program that
            does not speak any more.
        untold: a child that can write may have been forked and not been told of.
        views: how many views were ever given out.
        loan: the last that was given out.
    """

    programs: dict[int, Program] = field(default_factory=dict)
    taken: list[tuple[int, int]] = field(default_factory=list)
    freeing: dict[int, int] = field(default_factory=dict)
    loans: dict[int, tuple[int, int]] = field(default_factory=dict)
    lingering: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    untold: bool = False
    views: int = 0
    loan: int = 0

    def apply(self, record: Record) -> None:
        """Go on by one record."""
        kind = record["op"]
        run = record.get("first", 0), record.get("count", 0)
        program = self.programs.get(record.get("view", 0))
        if kind == "register":
            self.programs[record["view"]] = child = Program(
                record["pid"], record["started"], record["view"], record["base"], record["owner"], record["follows"],
                record.get("writes", True),
            )  # fmt: skip
            if parent := self.programs.get(record["parent"]):
                child.blocks = deepcopy(parent.blocks)
            self.views = max(self.views, record["view"])
        elif kind == "untold":
            self.untold = True
        elif kind == "lingers":
            process = (program.pid, program.started) if program else (record["pid"], record["started"])
            self.lingering[record["view"]] = record["base"], *process
            self.views = max(self.views, record["view"])  # which may be all that is left of it
        elif kind == "gone":
            self.lingering.pop(record["view"], None)
        elif kind == "detach":
            self.programs.pop(record["view"], None)
        elif kind == "take":
            self.taken.append(run)
        elif kind == "freeing":
            self.freeing[run[0]] = run[1]
            self.loans = {loan: lent for loan, lent in self.loans.items() if not run[0] <= lent[0] < sum(run)}
            if program:
                for first in [first for first in program.blocks if run[0] <= first < sum(run)]:
                    del program.blocks[first]
        elif kind == "freed":
            self.freeing.pop(run[0], None)
        elif program and kind == "process":
            program.pid, program.started = record["pid"], record["started"]
        elif program and kind == "allocate":
            program.blocks[run[0]] = [run[1], record.get("holds", 1)]
        elif program and kind == "lend":
            program.blocks[run[0]][1] += 1
            self.loans[record["loan"]] = run[0], record["view"]
            self.loan = record["loan"]
        elif program and kind == "take-loan":
            program.blocks.setdefault(run[0], [run[1], 0])[1] += 1
            self.loans[record["loan"]] = run[0], 0
        elif kind == "loans":
            self.loans = {loan: (first, view) for loan, first, view in record["loans"]}
            self.loan = record["loan"]
        elif program and kind == "let-go" and run[0] in program.blocks:
            program.blocks[run[0]][1] -= 1
            if not program.blocks[run[0]][1]:
                del program.blocks[run[0]]
        elif program and kind == "pin":
            program.pins.append(run)
        elif program and kind == "unpin" and run in program.pins:
            program.pins.remove(run)

    def records(self) -> Iterator[Record]:
        """The shortest way to this state."""
        for view, program in self.programs.items():
            yield {
                "op": "register",
                "view": view,
                "pid": program.pid,
                "started": program.started,
                "base": program.base,
                "owner": program.owner,
                "follows": program.follows,
                "writes": program.writes,
                "parent": 0,
            }
            for first, (count, holds) in program.blocks.items():
                yield {"op": "allocate", "view": view, "first": first, "count": count, "holds": holds}
            for first, count in program.pins:
                yield {"op": "pin", "view": view, "first": first, "count": count}
        for view, (base, pid, began) in self.lingering.items():
            yield {"op": "lingers", "view": view, "base": base, "pid": pid, "started": began}
        if self.untold:
            yield {"op": "untold"}
        if self.loan:
            yield {"op": "loans", "loans": [[loan, *lent] for loan, lent in self.loans.items()], "loan": self.loan}
        for first, count in self.taken:
            yield {"op": "take", "first": first, "count": count}
        for first, count in self.freeing.items():
            yield {"op": "freeing", "first": first, "count": count}


class Ledger:
    """The file, and what it says so far.

    Invariant: applying the file's records to an empty `State` gives ``state``.
    """

    def __init__(self, path: Path, *, fresh: bool) -> None:
        """Open the ledger at `path`: empty, or going on where a dead launcher stopped."""
        self._path = path
        self.state = State()
        self._lines = 0
        if not fresh:
            self._read()
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if fresh:
            os.ftruncate(self._fd, 0)

    def _read(self) -> None:
        try:
            lines = self._path.read_bytes().split(b"\n")
        except OSError as error:
            raise ServiceError(
                f"{self._path} cannot be read ({error.strerror}): who holds what is not known"
            ) from error
        for line in lines[:-1]:  # what is behind the last line's end was not yet told to anybody
            self.state.apply(json.loads(line))
            self._lines += 1
        if lines[-1]:
            os.truncate(self._path, sum(len(line) + 1 for line in lines[:-1]))

    def note(self, operation: str, **fields: Any) -> None:
        """Write down that something has happened.  On return another launcher would know it."""
        record = {"op": operation, **fields}
        self.state.apply(record)
        os.write(self._fd, _line(record))
        self._lines += 1
        if self._lines > COMPACT_LINES:
            self._compact()

    def _compact(self) -> None:
        records = list(self.state.records())
        if self._lines < 4 * len(records):
            return
        beside = self._path.with_suffix(".new")
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(fd, "wb", closefd=False) as file:
            file.writelines(map(_line, records))
        os.replace(beside, self._path)
        os.close(self._fd)
        self._fd, self._lines = fd, len(records)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def _line(record: Record) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def started(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 where there is none, or only what is left of a dead one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZXx" else int(fields[19])

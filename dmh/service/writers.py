"""Who can write to the region, and the quiet periods in which nobody can.

Owns `quiet` in the shared table: while a period lasts, the evictor drops unseen what came in during it (dmh_drop.c).
The period ends before a program is told that it can go on with a mapping that it can write through, and the next begins
when the last such mapping is known to be gone.  Does not own the programs' views (`dmh.service.clients`).  Runs in the
launcher's one thread.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dmh.native import lib
from dmh.service.client import Client
from dmh.service.ledger import started

if TYPE_CHECKING:
    from dmh.service.clients import Clients
    from dmh.service.launcher import Launcher

LOOK_SECONDS = 0.1
"""How often to look whether a mapping that was left behind is gone."""


@dataclass(slots=True)
class Lingering:
    """A mapping that can still be written through although its program does not speak any more.

    Attributes:
        view: its number.
        base: where it lies.
        uffd: its userfaultfd, which knows whether its address space is there; -1: another launcher had it.
        pid, started: its process, asked where there is no userfaultfd.
    """

    view: int
    base: int
    uffd: int
    pid: int
    started: int

    def gone(self) -> bool:
        """Nothing runs with this mapping any more."""
        if self.uffd >= 0:
            return bool(lib.dmh_view_is_gone(self.uffd, self.base))
        return started(self.pid) != self.started


class Writers:
    """Keeps the table's `quiet` in step with the programs.

    Invariant: ``quiet`` is 0 while any process may write to the region without a fault that is resolved first.
    """

    def __init__(self, launcher: Launcher, clients: Clients) -> None:
        self._launcher = launcher
        self._clients = clients
        self._lingering: list[Lingering] = []
        self._untold = False
        """A child that can write may have been forked and not been told of: there is no quiet period any more."""

    @property
    def count(self) -> int:
        """How many mappings can be written through, as far as is known."""
        return sum(1 for client in self._clients.all if client.view and client.writes) + len(self._lingering)

    def update(self) -> None:
        """End the quiet period, or begin one, as the programs are now."""
        raw = self._launcher.table.raw
        if self._untold or self.count:
            raw.quiet = 0
        elif not raw.quiet:
            raw.quiets += 1
            raw.quiet = raw.quiets

    def leaves(self, client: Client) -> None:
        """A view ends.  Its mapping is gone if the program has said that it has taken it down, or if the address space
        is; not where only the connection has ended, or the mapping is sealed.
        """
        if client.writes and not client.taken_down and not lib.dmh_view_is_gone(client.uffd, client.base):
            program = self._launcher.ledger.state.programs[client.view]
            try:
                uffd = os.dup(client.uffd)
            except OSError:  # no descriptor is left: then its process's end must do
                uffd = -1
            self._lingering.append(Lingering(client.view, client.base, uffd, program.pid, program.started))
            self._launcher.ledger.note("lingers", view=client.view, base=client.base)

    def look_after(self) -> float | None:
        """Returns in how many seconds to look again whether what was left behind is gone; None: there is nothing."""
        for left in [left for left in self._lingering if left.gone()]:
            self._lingering.remove(left)
            self._launcher.ledger.note("gone", view=left.view)
            if left.uffd >= 0:
                os.close(left.uffd)
            self.update()
        return LOOK_SECONDS if self._lingering else None

    def births_lost(self) -> None:
        """Word of a birth may have died with a worker or a launcher.  Python's children that are not known take their
        mapping down; one that other code forked does not know that it should.
        """
        if not self._untold and any(client.view and client.writes and client.follows for client in self._clients.all):
            self._untold = True
            self._launcher.ledger.note("untold")
            self.update()

    def restore(self) -> None:
        """After another launcher: its programs are known again."""
        state = self._launcher.ledger.state
        self._untold = state.untold
        self._lingering = [
            Lingering(view, base, -1, pid, began) for view, (base, pid, began) in state.lingering.items()
        ]
        self.births_lost()
        self.update()

    def close(self) -> None:
        """The service ends."""
        for left in self._lingering:
            if left.uffd >= 0:
                os.close(left.uffd)
        self._lingering.clear()

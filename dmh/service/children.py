"""Forked children, as the launcher learns of them: by the monitor's word, and by asking whether they are still there.

Owns what happens between a birth and the child's first word (`resume`), if it ever has one.  The kernel's part is told
in dmh_fork.c, the child's in `dmh.region.children`, the monitor's in `dmh.fault.births`.  Used by
`dmh.service.clients`.
"""

from __future__ import annotations

import logging
from copy import deepcopy
from typing import TYPE_CHECKING

from dmh.native import lib
from dmh.service.channel import Message
from dmh.service.client import Client
from dmh.service.ledger import started

if TYPE_CHECKING:
    from dmh.service.clients import Clients
    from dmh.service.launcher import Launcher

log = logging.getLogger("dmh")

LOOK_SECONDS = 0.1
"""How often to look whether children that do not speak are still there."""


class Children:
    """The programs that nobody started and that connect to nobody, at first."""

    def __init__(self, launcher: Launcher, clients: Clients) -> None:
        self._launcher = launcher
        self._clients = clients

    def born(self, message: Message, descriptors: list[int]) -> None:
        """What the monitor has read of a birth: first the child's userfaultfd, then, when the child touches its birth
        page, which process it is.
        """
        parent = next((client for client in self._clients.all if client.view == message["view"]), None)
        if not descriptors:
            if parent is not None and not parent.pid:
                parent.pid = int(message["pid"])
                self._launcher.ledger.note("process", view=parent.view, pid=parent.pid, started=started(parent.pid))
                named = {"op": "view-process", "view": parent.view, "pid": parent.pid}
                self._launcher.pool.tell_all(named, lambda replies: None)
                self._launcher.watch_process(parent)
            if parent is not None:
                lib.dmh_birth_answer(parent.uffd, parent.base, self._size, False)
            return
        child = Client(None, 0, uffd=descriptors.pop(), base=int(message["base"]), follows=True, writes=True)
        if parent is not None:
            child.writes = parent.writes
            child.blocks = deepcopy(parent.blocks)
        full = self._clients.attached >= self._launcher.most_programs
        self._clients.all.append(child)
        self._clients.enter(child, message["view"])

        def known(problem: Message | None) -> None:
            if problem:
                log.error("a forked child cannot use the region, and is ended: %s", problem["error"])
                lib.dmh_birth_answer(child.uffd, child.base, self._size, True)

        if full:
            known({"error": "this service has descriptors for no more programs: start it with a larger `ulimit -n`"})
        else:
            self._clients.add_view(child, known)

    def look_after(self) -> float | None:
        """Give back what forked children held that have ended or become other programs, which nobody announces.
        Returns in how many seconds to look again; None: there are none.
        """
        children = [
            client for client in self._clients.all if client.channel is None and client.follows and not client.leaving
        ]
        for child in children:
            if lib.dmh_view_is_gone(child.uffd, child.base):
                self._launcher.drop(child)
        return LOOK_SECONDS if children else None

    @property
    def _size(self) -> int:
        return self._launcher.config.region.size

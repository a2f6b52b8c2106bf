"""Who holds which pages of the region: allocated, shared, lent to a process that unpickles, given back.

Owns the rules by which pages become free: with the last hold of the last program, when it is known that no forked child
has one as well, and not before their content is gone.  Which pages are free is `dmh.region.extents`; what each program
holds stands in `Client.blocks`.  Used by `dmh.service.clients`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from dmh.errors import RegionError
from dmh.lspt.states import Advice
from dmh.service.channel import Message
from dmh.service.client import Client, Operation

if TYPE_CHECKING:
    from dmh.service.clients import Clients
    from dmh.service.launcher import Launcher

log = logging.getLogger("dmh")


class Holdings:
    """The operations on arrays' pages."""

    def __init__(self, launcher: Launcher, clients: Clients) -> None:
        self._launcher = launcher
        self._clients = clients
        self.loans: dict[int, tuple[int, int]] = {}
        """loan -> first page of an array, the lender's view; 0: it has been taken over."""
        self._waiting_for_room: list[tuple[Client, Message]] = []
        self._being_freed = 0
        self._freed: list[tuple[Client, int]] = []
        self._asking_for_births = False
        self.operations: dict[str, Operation] = {
            "allocate": self._allocate,
            "free": self._free,
            "lend": self._lend,
            "take-loan": self._take_loan,
            "take": self._take,
        }

    def _allocate(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        count = int(message["count"])
        try:
            first = self._launcher.extents.allocate(count)
        except RegionError:
            self._clients.children.look_after()
            leaving = any(other.leaving for other in self._clients.all)
            if self._being_freed or self._freed or self._asking_for_births or leaving:
                self._waiting_for_room.append((client, message))
                return None
            raise
        client.blocks[first] = [count, 1]
        self._launcher.ledger.note("allocate", view=client.view, first=first, count=count)
        return {"first": first}

    def _take(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        self._launcher.extents.take(int(message["first"]), int(message["count"]))
        self._launcher.ledger.note("take", first=int(message["first"]), count=int(message["count"]))
        return {}

    def _free(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        first = int(message["first"])
        if not client.follows:
            self._let_go(client, first)
            return None
        # A child that was forked before this was said may not be known yet, and holds the array as well.
        self._freed.append((client, first))
        if not self._asking_for_births:
            self._ask_for_births()
        return None

    def _ask_for_births(self) -> None:
        freed, self._freed = self._freed, []
        self._asking_for_births = True

        def told(reply: Message) -> None:
            self._asking_for_births = False
            for client, first in freed:
                self._let_go(client, first)
            if self._freed:
                self._ask_for_births()
            else:
                self.answer_waiting()

        self._launcher.pool.tell(self._launcher.pool.by_role("monitor"), {"op": "births"}, told)

    def after_births(self, client: Client, then: Callable[[], None]) -> None:
        """Go on when every child that this program has forked is known."""
        if client.follows:
            self._launcher.pool.tell(self._launcher.pool.by_role("monitor"), {"op": "births"}, lambda reply: then())
        else:
            then()

    def _let_go(self, client: Client, first: int) -> None:
        """One hold less on an array; its pages go back with the last one of the last program."""
        held = client.blocks.get(first)
        if held is None:
            return
        held[1] -= 1
        if held[1]:
            self._launcher.ledger.note("let-go", view=client.view, first=first)
            return
        del client.blocks[first]
        if any(first in other.blocks for other in self._clients.all):
            self._launcher.ledger.note("let-go", view=client.view, first=first)
        else:
            self.release(client.view, first, held[0])

    def _lend(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        """One hold more on an array, for whoever asks for the loan that is answered."""
        first = int(message["first"])
        if first not in client.blocks:
            raise RegionError("an array that this program does not hold cannot be lent")
        loan = self._launcher.ledger.state.loan + 1
        client.blocks[first][1] += 1
        self.loans[loan] = first, client.view
        self._launcher.ledger.note("lend", view=client.view, first=first, loan=loan)
        return {"loan": loan}

    def _take_loan(self, client: Client, message: Message, descriptors: list[int]) -> Message | None:
        """The hold goes over to this program; who comes later gets one of his own, as long as anybody has one."""
        loan = int(message["loan"])
        if loan not in self.loans:
            raise RegionError(
                "this array is gone: whoever sent it has ended, or it was received before and nobody has kept it"
            )
        first, lender = self.loans[loan]
        holder = next(other for other in self._clients.all if first in other.blocks)
        count = holder.blocks[first][0]
        client.blocks.setdefault(first, [count, 0])[1] += 1
        self.loans[loan] = first, 0
        self._launcher.ledger.note("take-loan", view=client.view, first=first, count=count, loan=loan)
        if lent := next((other for other in self._clients.all if lender and other.view == lender), None):
            self._let_go(lent, first)
        return {"first": first, "count": count}

    def release(self, view: int, first: int, count: int) -> None:
        """Pages go back to the pool only when their content is gone: the next owner must find zeros."""
        self._being_freed += 1
        self.loans = {loan: lent for loan, lent in self.loans.items() if not first <= lent[0] < first + count}
        self._launcher.ledger.note("freeing", view=view, first=first, count=count)

        def done(reply: Message) -> None:
            self._being_freed -= 1
            self._launcher.table.advice[first : first + count] = Advice.NORMAL
            if "error" in reply:
                log.error("pages %d..%d are not given back: %s", first, first + count - 1, reply["error"])
            else:
                self._launcher.extents.release(first, count)
                self._launcher.ledger.note("freed", first=first, count=count)
            self.answer_waiting()

        self._launcher.pool.tell(
            self._launcher.pool.by_role("evictor"), {"op": "discard", "first": first, "count": count}, done
        )

    def answer_waiting(self) -> None:
        waiting, self._waiting_for_room = self._waiting_for_room, []
        for client, message in waiting:
            try:
                answer = self._allocate(client, message, [])
            except RegionError as error:
                answer = {"error": str(error), "kind": "RegionError"}
            if answer is not None:
                self._clients.reply(client, answer)

    def leaves(self, client: Client) -> None:
        """Nobody answers this program any more."""
        self._waiting_for_room = [waiting for waiting in self._waiting_for_room if waiting[0] is not client]

    def give_back(self, client: Client) -> None:
        """A program has gone: whatever it alone held is free."""
        blocks, client.blocks = client.blocks, {}
        for first, count in _merged(blocks, {first for other in self._clients.all for first in other.blocks}):
            self.release(client.view, first, count)


def _merged(blocks: dict[int, list[int]], held: set[int]) -> list[tuple[int, int]]:
    """The runs of pages that nobody holds any more, neighbours joined: a program with many small arrays gives them back
    in few requests.
    """
    runs: list[tuple[int, int]] = []
    for first, (count, _) in sorted(blocks.items()):
        if first in held:
            continue
        if runs and sum(runs[-1]) == first:
            runs[-1] = (runs[-1][0], runs[-1][1] + count)
        else:
            runs.append((first, count))
    return runs

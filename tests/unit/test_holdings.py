"""When an array's pages become free: with the last hold of the last program, in whatever order its end is heard of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dmh.errors import RegionError
from dmh.region.extents import Extents
from dmh.service.client import Client
from dmh.service.holdings import Holdings
from dmh.service.ledger import State


class Ledger:
    def __init__(self) -> None:
        self.state = State()

    def note(self, operation: str, **fields: Any) -> None:
        self.state.apply({"op": operation, **fields})


class Service:
    """A launcher and its clients, of whom `Holdings` knows no more than this; workers answer when they are told to."""

    def __init__(self, pages: int = 100) -> None:
        self.all: list[Client] = []
        self.extents = Extents(pages)
        self.ledger = Ledger()
        self.pool = self.children = self.table = self
        self.advice = np.zeros(pages, np.uint8)
        self.asked: list[tuple[str, dict[str, Any], Any]] = []
        self.replies: list[tuple[Client, dict[str, Any]]] = []
        self.holdings = Holdings(self, self)  # type: ignore[arg-type]

    def by_role(self, role: str) -> str:
        return role

    def tell(self, worker: str, message: dict[str, Any], answer: Any) -> None:
        self.asked.append((worker, message, answer))

    def look_after(self) -> None:
        pass

    def reply(self, client: Client, answer: dict[str, Any]) -> None:
        self.replies.append((client, answer))

    def answer(self, worker: str) -> dict[str, Any]:
        """The worker answers what it was asked first."""
        at = next(i for i, (who, _, _) in enumerate(self.asked) if who == worker)
        _, message, answer = self.asked.pop(at)
        answer({})
        return message

    def program(self, view: int, *, parent: Client | None = None) -> Client:
        client = Client(None, view, view=view, follows=True)
        fields = {"pid": view, "started": 1, "base": 4096, "owner": False, "follows": True}
        self.ledger.note("register", view=view, parent=parent.view if parent else 0, **fields)
        if parent:
            client.blocks = {first: list(held) for first, held in parent.blocks.items()}
        self.all.append(client)
        return client

    def do(self, client: Client, operation: str, **fields: int) -> dict[str, Any] | None:
        answer: dict[str, Any] | None = self.holdings.operations[operation](client, {"op": operation, **fields}, [])
        self.agree()
        return answer

    def agree(self) -> None:
        """What would be written down for another launcher is what is known here."""
        for client in self.all:
            assert self.ledger.state.programs[client.view].blocks == client.blocks
        assert self.ledger.state.loans == self.holdings.loans


@pytest.fixture
def service() -> Service:
    return Service()


def test_pages_are_free_when_their_content_is_gone(service: Service) -> None:
    program = service.program(1)
    assert service.do(program, "allocate", count=30) == {"first": 0}
    service.do(program, "free", first=0)
    service.answer("monitor")
    assert service.answer("evictor") == {"op": "discard", "first": 0, "count": 30}
    assert service.extents.free_pages == 100
    service.agree()


def test_a_child_that_is_heard_of_after_the_end_of_the_array_keeps_it(service: Service) -> None:
    """The program says that it drops the array before the monitor says that it had forked before that."""
    program = service.program(1)
    service.do(program, "allocate", count=30)
    service.do(program, "free", first=0)
    child = service.program(2, parent=program)  # the monitor tells of births before it answers
    service.answer("monitor")
    assert service.asked == []
    service.do(child, "free", first=0)
    service.answer("monitor")
    service.answer("evictor")
    assert service.extents.free_pages == 100


def test_who_finds_no_room_waits_for_what_is_being_given_back(service: Service) -> None:
    program, other = service.program(1), service.program(2)
    service.do(program, "allocate", count=100)
    with pytest.raises(RegionError, match="no room"):
        service.do(other, "allocate", count=1)
    service.do(program, "free", first=0)
    assert service.do(other, "allocate", count=100) is None
    service.answer("monitor")
    assert service.replies == []
    service.answer("evictor")
    assert service.replies == [(other, {"first": 0})]


def test_who_waits_for_room_in_vain_is_told(service: Service) -> None:
    program, other = service.program(1), service.program(2)
    service.do(program, "allocate", count=50)
    service.do(program, "free", first=0)
    assert service.do(other, "allocate", count=101) is None
    service.answer("monitor")
    service.answer("evictor")
    assert [(client, answer["kind"]) for client, answer in service.replies] == [(other, "RegionError")]


def test_a_loan_goes_over_to_who_takes_it(service: Service) -> None:
    sender, receiver = service.program(1), service.program(2)
    service.do(sender, "allocate", count=5)
    loan = service.do(sender, "lend", first=0)
    assert loan is not None
    service.do(sender, "free", first=0)
    service.answer("monitor")
    assert service.asked == [], "lent: not free"
    assert service.do(receiver, "take-loan", loan=loan["loan"]) == {"first": 0, "count": 5}
    assert sender.blocks == {}
    assert service.do(receiver, "take-loan", loan=loan["loan"]) == {"first": 0, "count": 5}, "again, by one who has it"
    for _ in range(2):
        service.do(receiver, "free", first=0)
        service.answer("monitor")
    service.answer("evictor")
    service.agree()
    with pytest.raises(RegionError, match="this array is gone"):
        service.do(receiver, "take-loan", loan=loan["loan"])


def test_a_program_that_ends_gives_back_what_it_alone_held(service: Service) -> None:
    one, two = service.program(1), service.program(2)
    for _ in range(4):
        service.do(one, "allocate", count=5)
    loan = service.do(one, "lend", first=5)
    assert loan is not None
    service.do(two, "take-loan", loan=loan["loan"])
    service.do(one, "lend", first=10)
    service.all.remove(one)
    service.holdings.give_back(one)
    assert [message for _, message, _ in service.asked] == [
        {"op": "discard", "first": 0, "count": 5},
        {"op": "discard", "first": 10, "count": 10},
    ]
    assert set(service.holdings.loans) == {loan["loan"]}


def test_what_is_not_held_cannot_be_lent_or_freed(service: Service) -> None:
    one, two = service.program(1), service.program(2)
    service.do(one, "allocate", count=5)
    with pytest.raises(RegionError, match="does not hold"):
        service.do(two, "lend", first=0)
    service.do(two, "free", first=0)
    service.answer("monitor")
    assert one.blocks == {0: [5, 1]}
    assert service.asked == []

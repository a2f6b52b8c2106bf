"""How LPET goes about a run, with a policy, a leaver and an idle source that only write down what they are asked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest

from dmh.evict.budget import MarkBudget
from dmh.evict.lpet import VICTIMS, Lpet
from dmh.evict.policies.base import Choice, Pages, no_pages
from dmh.evict.reserve import Reserve
from dmh.lspt.table import Bounds, Table

PAGES, HIGH, LOW = 4096, 2000, 1000


class Victims:
    """Gives the pages from 0 on, as many as it is asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def look(self, most: int) -> Pages:
        return no_pages()

    def choose(self, evict: int, mark: int) -> Choice:
        first = sum(self.asked)
        self.asked.append(evict)
        return Choice(evict=np.arange(first, first + evict, dtype=np.uint64))

    def learn(self, pages: Pages, kinds: Any) -> None: ...

    def tell(self, event: Any, pages: Pages) -> None: ...


class Unmoving:
    moves = False


class Leaves:
    """Everything leaves at once."""

    on_its_way = 0

    def evict(self, pages: Pages) -> Pages:
        return no_pages()


class Reactions(Reserve):
    def __init__(self) -> None:
        super().__init__(least=1, most=100)
        self.noted: list[float] = []

    def reacted(self, seconds: float) -> None:
        self.noted.append(seconds)


@pytest.fixture(params=[16, 512])
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    fd = Table.create(PAGES, 4096, request.param, 3, Bounds(2500, HIGH, LOW))
    table = Table(fd)
    os.close(fd)
    table.raw.resident = 2200
    yield table
    table.close()


def lpet(table: Table, policy: Victims, batch: int, reserve: Reserve | None = None) -> Lpet:
    parts = cast(Any, (table, policy, Unmoving(), Leaves()))
    return Lpet(*parts, high=HIGH, low=LOW, budget=MarkBudget(0.1), reserve=reserve, batch=batch, number=2)


def test_many_victims_are_chosen_where_few_leave_at_a_time(table: Table) -> None:
    policy = Victims()
    assert lpet(table, policy, table.slots).run(lambda: True) == 0
    assert sum(policy.asked) == 2200 - LOW
    assert max(policy.asked) == max(VICTIMS, table.slots)


def test_what_is_on_its_way_need_not_leave_again(table: Table) -> None:
    policy = Victims()
    one = lpet(table, policy, table.slots)
    cast(Any, one._leaver).on_its_way = 150
    assert one.run(lambda: True) == 0
    assert sum(policy.asked) == 2200 - 150 - LOW


def test_a_smaller_batch_is_what_somebody_wanted(table: Table) -> None:
    policy = Victims()
    assert lpet(table, policy, 8).run(lambda: True) == 0
    assert set(policy.asked) == {8}


def test_there_is_room_again_before_the_last_of_many_has_left(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reserves are for the time until then."""
    reserve, clock = Reactions(), [100.0]
    monkeypatch.setattr("dmh.evict.lpet.time.monotonic", lambda: clock[0])
    one = lpet(table, Victims(), table.slots, reserve)

    def evict(pages: Pages) -> Pages:
        clock[0] += 0.001 * len(pages)
        return no_pages()

    monkeypatch.setattr(one._leaver, "evict", evict)
    one.run(lambda: True)
    assert max(reserve.noted) <= 0.001 * table.slots + 1e-9

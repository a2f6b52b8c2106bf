"""How much room LPET keeps free, and how much it may mark: told of times, so tested without any."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmh.evict.budget import SAVED_SECONDS, MarkBudget
from dmh.evict.reserve import Reserve


def burst(pages: int, seconds: float, at: float = 100.0) -> np.ndarray:
    """Arrivals at an even rate."""
    return (np.linspace(at, at + seconds, pages) * 1e9).astype(np.uint64)


def test_the_reserve_covers_what_arrives_while_lpet_reacts() -> None:
    reserve = Reserve(least=4, most=10_000)
    reserve.pass_time(100.0)
    assert reserve.pages == 4
    reserve.arrived(burst(5000, 0.05))  # 100,000 a second
    reserve.reacted(0.004)
    assert 400 <= reserve.pages <= 900
    for second in range(1, 15):
        reserve.pass_time(100.0 + second)
    assert reserve.pages == 4, "a burst long gone still keeps memory empty"


def test_a_fault_that_waited_doubles_the_reserve_at_once() -> None:
    reserve = Reserve(least=4, most=100)
    reserve.pass_time(1.0)
    sizes = []
    for _ in range(8):
        reserve.waited(1)
        sizes.append(reserve.pages)
    assert sizes == [8, 16, 32, 64, 100, 100, 100, 100]
    reserve.waited(0)
    assert reserve.pages == 100


@given(
    st.integers(1, 50),
    st.integers(1, 500),
    st.lists(st.tuples(st.sampled_from(["arrived", "reacted", "waited", "pass"]), st.floats(0, 1e4)), max_size=30),
)
def test_the_reserve_stays_within_its_bounds(least: int, most: int, events: list[tuple[str, float]]) -> None:
    reserve, now = Reserve(least, most), 1.0
    for what, value in events:
        if what == "arrived":
            reserve.arrived(burst(int(value) % 1000, 0.001, now))
        elif what == "reacted":
            reserve.reacted(value)
        elif what == "waited":
            reserve.waited(int(value))
        else:
            now += value
            reserve.pass_time(now)
        assert reserve.least <= reserve.pages <= reserve.most


def test_marks_keep_to_their_share() -> None:
    """Whatever a page costs, the time spent stays under the share once the first savings are gone."""
    budget, now, spent = MarkBudget(0.1), 0.0, 0.0
    for _ in range(10_000):
        now += 0.001
        n = budget.pages(now, 256)
        budget.spent(5e-6 * n, n)
        spent += 5e-6 * n
    assert 0.09 * now <= spent <= 0.1 * now + SAVED_SECONDS + 256 * 5e-6


def test_without_time_left_nothing_is_marked_until_it_has_accrued() -> None:
    budget = MarkBudget(0.5)
    budget.pages(1.0, 10)
    budget.spent(1.0, 0)  # a look that took very long
    assert budget.pages(2.0, 10) == 0
    assert budget.pages(3.0, 10) == 10
    assert MarkBudget(0.0).pages(1.0, 10) == 0


def test_what_was_saved_up_is_not_spent_while_pages_must_leave() -> None:
    budget = MarkBudget(0.1)
    budget.pages(1.0, 256)
    budget.spent(0.0, 256)  # free until now, so that only time counts
    for k in range(1, 100):
        assert budget.pages(1.0 + k / 1000, 10**9, pressed=True) == pytest.approx(
            1e-4 / budget.page_cost, rel=0.01, abs=1
        )
    assert budget.left == SAVED_SECONDS
    assert budget.pages(1.1, 10**9) == int(SAVED_SECONDS / budget.page_cost)

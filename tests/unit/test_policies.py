"""Eviction policies without a kernel: the order of victims, and that every local page is known exactly once.

`Memory` stands in for LPET, the victim buffer and the application, so that a policy runs as it does in the evictor.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dmh.evict.policies import POLICIES, Choice, Policy
from dmh.evict.policies.fifo import Fifo
from dmh.evict.policies.idle_walk import IdleWalk


class Memory:
    """What stands around a policy.  Marked pages are staged until they are touched, as with the idle source `buffer`.

    Args:
        high: a fault that finds so many local pages runs LPET first.
        low: how many LPET leaves.
        slots: of the victim buffer.
    """

    def __init__(self, policy: Policy, high: int, low: int, slots: int = 1000) -> None:
        self.policy, self.high, self.low, self.slots = policy, high, low, slots
        self.resident: set[int] = set()
        self.staged: set[int] = set()
        self.evicted: list[int] = []

    @property
    def local(self) -> set[int]:
        return self.resident | self.staged

    def touch(self, pages: Sequence[int]) -> list[int]:
        """Use pages one after another; returns what was evicted meanwhile."""
        before = len(self.evicted)
        for page in pages:
            if page in self.staged:
                self.staged.remove(page)
                self.resident.add(page)
                self.policy.returned(page)
            elif page not in self.resident:
                if len(self.local) >= self.high:
                    self.lpet()
                self.resident.add(page)
                self.policy.arrived([page], [False])
        return self.evicted[before:]

    def lpet(self) -> None:
        quota = len(self.local) - self.low
        rounds = 0
        while quota > 0:
            choice = self.step(quota, self.slots - len(self.staged))
            rounds += 1
            assert choice.mark or choice.evict, "local pages, and none can be evicted"
            assert rounds <= 4 * len(self.local) + 4, "the walk does not end"
            quota -= len(choice.evict)

    def step(self, evict: int, mark: int) -> Choice:
        choice = self.policy.choose(evict, mark, lambda page: page in self.staged)
        assert len(choice.mark) <= mark
        assert len(choice.evict) <= evict
        assert len({*choice.mark, *choice.evict}) == len(choice.mark) + len(choice.evict), "a page twice in one choice"
        assert set(choice.mark) <= self.resident, "only what is in the region can be marked"
        assert set(choice.evict) <= self.local, "evicts what is not local"
        self.staged |= set(choice.mark)
        self.resident -= set(choice.mark) | set(choice.evict)
        self.staged -= set(choice.evict)
        self.evicted += choice.evict
        return choice

    def validate(self) -> None:
        assert len(self.policy) == len(self.local)
        assert all(page in self.policy for page in self.local)


def areas(count: int, size: int) -> list[list[int]]:
    return [list(range(n * size, n * size + size)) for n in range(count)]


class TestReference:
    """The reference's scenarios as pure simulation; tests/process/test_scenarios.py has them with a kernel."""

    @pytest.mark.parametrize("policy", [Fifo, IdleWalk])
    def test_four_and_two(self, policy: type[Policy]) -> None:
        memory = Memory(policy(), high=4, low=2)
        assert memory.touch([0, 1, 2, 3]) == []
        assert memory.touch([4]) == [0, 1]
        assert memory.local == {2, 3, 4}

    @pytest.mark.parametrize("policy", [Fifo, IdleWalk])
    def test_twenty_and_ten(self, policy: type[Policy]) -> None:
        first, second = areas(2, 10)
        memory = Memory(policy(), high=20, low=10)
        assert memory.touch(first + second) == []
        assert memory.touch([20]) == first
        assert memory.local == {*second, 20}

    def test_the_cyclic_walk_spares_what_is_used(self) -> None:
        one, two, three, four, five = areas(5, 5)
        memory = Memory(IdleWalk(), high=20, low=15)
        assert memory.touch(one + two + three + four) == []
        assert memory.touch(five) == one
        assert memory.touch(two + three) == []
        assert memory.touch(one) == four
        assert memory.local == {*one, *two, *three, *five}

    def test_fifo_does_not(self) -> None:
        one, two, three, four, five = areas(5, 5)
        memory = Memory(Fifo(), high=20, low=15)
        memory.touch(one + two + three + four + five + two + three)
        assert memory.touch(one) == two


class TestFifo:
    def test_order_of_arrival(self) -> None:
        policy = Fifo()
        policy.arrived([5, 3, 9], [False, True, False])
        assert policy.choose(2, 10, lambda page: True) == Choice(evict=[5, 3])
        assert list(range(10)) != [page for page in range(10) if page in policy] == [9]

    def test_a_page_that_comes_again_is_the_youngest(self) -> None:
        policy = Fifo()
        policy.arrived([1, 2, 3], [False] * 3)
        policy.returned(1)
        assert policy.choose(9, 0, lambda page: True).evict == [2, 3, 1]

    def test_an_empty_choice_when_it_knows_nothing(self) -> None:
        assert Fifo().choose(5, 5, lambda page: True) == Choice()


class TestIdleWalk:
    def test_marks_first_and_evicts_from_where_it_began(self) -> None:
        memory = Memory(IdleWalk(), high=9, low=6)
        memory.touch(range(8))
        assert memory.step(2, 100) == Choice(mark=list(range(8)))
        assert memory.step(2, 100) == Choice(evict=[0, 1])
        memory.validate()

    def test_a_used_page_is_marked_again_not_evicted(self) -> None:
        memory = Memory(IdleWalk(), high=9, low=2)
        memory.touch(range(4))
        memory.step(2, 100)
        memory.touch([0, 1])
        memory.lpet()
        assert memory.evicted == [2, 3]

    def test_a_full_buffer_lets_the_oldest_marked_go(self) -> None:
        memory = Memory(IdleWalk(), high=9, low=6, slots=3)
        memory.touch(range(8))
        memory.lpet()
        memory.validate()
        assert memory.evicted == [0, 1]
        assert len(memory.staged) <= 3

    def test_without_a_buffer_nothing_can_be_marked_and_the_choice_is_empty(self) -> None:
        policy = IdleWalk()
        policy.arrived([1, 2], [False, False])
        assert policy.choose(2, 0, lambda page: True) == Choice()
        assert len(policy) == 2

    def test_asked_for_more_than_there_is(self) -> None:
        """LPET's quota counts every local page, the pinned and the discarded ones too, which the policy does not
        know.
        """
        memory = Memory(IdleWalk(), high=9, low=6)
        memory.touch([0, 1])
        memory.step(5, 100)
        assert memory.step(5, 100) == Choice(evict=[0, 1])
        assert memory.step(5, 100) == Choice()

    def test_everything_in_use_still_ends(self) -> None:
        """Every marked page turns out to have been used: the walk must not go round for ever."""
        policy = IdleWalk()
        policy.arrived(range(6), [False] * 6)
        for _ in range(20):
            choice = policy.choose(2, 6, lambda page: False)
            assert len(policy) + len(choice.evict) == 6
            if choice.evict:
                break


@pytest.mark.parametrize("name", POLICIES)
@given(data=st.data())
def test_a_page_is_known_once(name: str, data: st.DataObject) -> None:
    policy = POLICIES[name]()
    pages = data.draw(st.lists(st.integers(0, 8), max_size=30))
    policy.arrived(pages, [False] * len(pages))
    assert len(policy) == len(set(pages))
    for page in pages:
        policy.returned(page)
    assert len(policy) == len(set(pages))
    for page in (*pages, 99):
        policy.gone(page)
    assert len(policy) == 0


class AnyUse(RuleBasedStateMachine):
    """Any policy: pages come, are used, are discarded and are evicted in any order, and the marks that LPET makes
    may fail.
    """

    policy: type[Policy] = Fifo

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory(self.policy(), high=12, low=8, slots=5)

    @rule(pages=st.lists(st.integers(0, 30), min_size=1, max_size=6))
    def touch(self, pages: list[int]) -> None:
        self.memory.touch(pages)

    @rule(evict=st.integers(1, 20))
    def step(self, evict: int) -> None:
        self.memory.step(evict, self.memory.slots - len(self.memory.staged))

    @rule(evict=st.integers(1, 4))
    def a_mark_that_fails(self, evict: int) -> None:
        """No slot was free when LPET came to it: the pages stay resident and LPET says so."""
        free = self.memory.slots - len(self.memory.staged)
        choice = self.memory.policy.choose(evict, free, lambda page: page in self.memory.staged)
        for page in choice.mark:
            self.memory.policy.arrived([page], [False])
        for page in choice.evict:
            self.memory.policy.arrived([page], [False]) if page in self.memory.resident else self.memory.staged.discard(
                page
            )

    @precondition(lambda self: self.memory.local)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.memory.local)))
        self.memory.resident.discard(page)
        self.memory.staged.discard(page)
        self.memory.policy.gone(page)

    @rule(page=st.integers(40, 50))
    def discard_what_is_not_local(self, page: int) -> None:
        self.memory.policy.gone(page)

    @invariant()
    def every_local_page_once(self) -> None:
        self.memory.validate()

    @invariant()
    def the_count_of_marks_is_right(self) -> None:
        if isinstance(self.memory.policy, IdleWalk):
            assert self.memory.policy._marked == sum(self.memory.policy._circle.values())


class FifoInAnyUse(AnyUse):
    policy = Fifo


class IdleWalkInAnyUse(AnyUse):
    policy = IdleWalk


TestFifoInAnyUse = FifoInAnyUse.TestCase
TestIdleWalkInAnyUse = IdleWalkInAnyUse.TestCase

"""Eviction policies without a kernel: the order of victims, and that every local page is known exactly once.

`Memory` stands in for LPET, the victim buffer and the application, so that a policy runs as it does in the evictor.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dmh.evict.policies import Event, Policy, policy_class, policy_names
from dmh.evict.policies.base import Pages
from dmh.evict.policies.fifo import Fifo
from dmh.evict.policies.idle_walk import IdleWalk
from dmh.evict.policies.native import NativePolicy
from dmh.native import lib

PAGES = 64
NAMES = [name for name in policy_names() if name != "auto"]
"""Every policy once: auto is another name for one of them."""


def numbers(pages: Iterable[int]) -> Pages:
    return np.array(list(pages), np.uint64)


class Memory:
    """What stands around a policy.  Marked pages are staged until they are touched, as with the idle source `buffer`,
    or stay where they are and their use is seen, as with `unmap`, where the policy has accessed information.

    Args:
        high: a fault that finds so many local pages runs LPET first.
        low: how many LPET leaves.
        slots: of the victim buffer.
    """

    def __init__(self, policy: Policy, high: int, low: int, slots: int = 1000) -> None:
        self.policy, self.high, self.low, self.slots = policy, high, low, slots
        self.resident: set[int] = set()
        self.staged: set[int] = set()
        self.used: set[int] = set()
        self.evicted: list[int] = []

    @property
    def local(self) -> set[int]:
        return self.resident | self.staged

    def touch(self, pages: Sequence[int]) -> list[int]:
        """Use pages one after another; returns what was evicted meanwhile."""
        before = len(self.evicted)
        for page in pages:
            self.used.add(page)
            if page in self.staged:
                self.staged.remove(page)
                self.resident.add(page)
                self.policy.tell(Event.SOFT, numbers([page]))
            elif page not in self.resident:
                if len(self.local) >= self.high:
                    self.lpet()
                self.resident.add(page)
                self.policy.tell(Event.FAULT, numbers([page]))
        return self.evicted[before:]

    def lpet(self) -> None:
        quota = len(self.local) - self.low
        rounds = 0
        while quota > 0:
            looked, mark, evict = self.step(quota, self.slots - len(self.staged))
            rounds += 1
            assert looked or mark or evict, "local pages, and none can be evicted"
            assert rounds <= 4 * len(self.local) + 4, "the walk does not end"
            quota -= len(evict)

    def choose(self, evict: int, mark: int) -> tuple[int, list[int], list[int]]:
        looks = self.policy.look(evict).tolist()
        assert len(set(looks)) == len(looks) <= evict
        assert set(looks) <= self.local, "looks at what is not local"
        for page in looks:
            idle = page not in self.used if self.policy.accessed else page in self.staged
            self.policy.tell(Event.IDLE if idle else Event.USED, numbers([page]))
        choice = self.policy.choose(evict, mark)
        marks, victims = choice.mark.tolist(), choice.evict.tolist()
        assert len(marks) <= mark
        assert len(victims) <= evict
        assert len({*marks, *victims}) == len(marks) + len(victims), "a page twice in one choice"
        assert set(marks) <= self.resident, "only what is in the region can be marked"
        assert set(victims) <= self.local, "evicts what is not local"
        return len(looks), marks, victims

    def step(self, evict: int, mark: int) -> tuple[int, list[int], list[int]]:
        looked, marks, victims = self.choose(evict, mark)
        self.used -= {*marks, *victims}
        if not self.policy.accessed:
            self.staged |= set(marks)
            self.resident -= set(marks)
        self.resident -= set(victims)
        self.staged -= set(victims)
        self.evicted += victims
        return looked, marks, victims

    def validate(self) -> None:
        self.policy.validate()
        assert len(self.policy) == len(self.local)
        assert self.policy.knows(numbers(self.local)).all()


def areas(count: int, size: int) -> list[list[int]]:
    return [list(range(n * size, n * size + size)) for n in range(count)]


class TestReference:
    """The reference's scenarios as pure simulation; tests/process/test_scenarios.py has them with a kernel."""

    @pytest.mark.parametrize("policy", [Fifo, IdleWalk])
    def test_four_and_two(self, policy: type[Policy]) -> None:
        memory = Memory(policy(PAGES, PAGES), high=4, low=2)
        assert memory.touch([0, 1, 2, 3]) == []
        assert memory.touch([4]) == [0, 1]
        assert memory.local == {2, 3, 4}

    @pytest.mark.parametrize("policy", [Fifo, IdleWalk])
    def test_twenty_and_ten(self, policy: type[Policy]) -> None:
        first, second = areas(2, 10)
        memory = Memory(policy(PAGES, PAGES), high=20, low=10)
        assert memory.touch(first + second) == []
        assert memory.touch([20]) == first
        assert memory.local == {*second, 20}

    def test_the_cyclic_walk_spares_what_is_used(self) -> None:
        one, two, three, four, five = areas(5, 5)
        memory = Memory(IdleWalk(PAGES, PAGES), high=20, low=15)
        assert memory.touch(one + two + three + four) == []
        assert memory.touch(five) == one
        assert memory.touch(two + three) == []
        assert memory.touch(one) == four
        assert memory.local == {*one, *two, *three, *five}

    def test_fifo_does_not(self) -> None:
        one, two, three, four, five = areas(5, 5)
        memory = Memory(Fifo(PAGES, PAGES), high=20, low=15)
        memory.touch(one + two + three + four + five + two + three)
        assert memory.touch(one) == two


class TestFifo:
    def test_order_of_arrival(self) -> None:
        policy = Fifo(PAGES, PAGES)
        policy.learn(numbers([5, 3, 9]), np.array([Event.FAULT, Event.PREFETCH, Event.KEPT], np.uint8))
        assert policy.choose(2, 10).evict.tolist() == [5, 3]
        assert policy.knows(numbers([5, 3, 9])).tolist() == [False, False, True]

    def test_a_page_that_comes_again_is_the_youngest(self) -> None:
        policy = Fifo(PAGES, PAGES)
        policy.tell(Event.FAULT, numbers([1, 2, 3]))
        policy.tell(Event.SOFT, numbers([1]))
        assert policy.choose(9, 0).evict.tolist() == [2, 3, 1]


class TestIdleWalk:
    def test_marks_first_and_evicts_from_where_it_began(self) -> None:
        memory = Memory(IdleWalk(PAGES, PAGES), high=9, low=6)
        memory.touch(range(8))
        assert memory.step(2, 100) == (0, list(range(8)), [])
        assert memory.step(2, 100) == (2, [], [0, 1])
        memory.validate()

    def test_a_used_page_is_marked_again_not_evicted(self) -> None:
        memory = Memory(IdleWalk(PAGES, PAGES), high=9, low=2)
        memory.touch(range(4))
        memory.step(2, 100)
        memory.touch([0, 1])
        memory.lpet()
        assert memory.evicted == [2, 3]

    def test_a_full_buffer_lets_the_oldest_marked_go(self) -> None:
        memory = Memory(IdleWalk(PAGES, PAGES), high=9, low=6, slots=3)
        memory.touch(range(8))
        memory.lpet()
        memory.validate()
        assert memory.evicted == [0, 1]
        assert len(memory.staged) <= 3

    def test_without_a_buffer_nothing_can_be_marked_and_nothing_is_chosen(self) -> None:
        policy = IdleWalk(PAGES, PAGES)
        policy.tell(Event.FAULT, numbers([1, 2]))
        choice = policy.choose(2, 0)
        assert (len(choice.mark), len(choice.evict), len(policy)) == (0, 0, 2)

    def test_asked_for_more_than_there_is(self) -> None:
        """LPET's quota counts every local page, the pinned and the discarded ones too, which the policy does not
        know.
        """
        memory = Memory(IdleWalk(PAGES, PAGES), high=9, low=6)
        memory.touch([0, 1])
        memory.step(5, 100)
        assert memory.step(5, 100) == (2, [], [0, 1])
        assert memory.step(5, 100) == (0, [], [])

    def test_an_answer_is_waited_for(self) -> None:
        policy = IdleWalk(PAGES, PAGES)
        policy.tell(Event.FAULT, numbers([1, 2]))
        assert policy.choose(2, 9).mark.tolist() == [1, 2]
        assert len(policy.choose(2, 9).evict) == 0
        policy.tell(Event.IDLE, policy.look(1))
        assert policy.choose(2, 9).evict.tolist() == [1]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)
@given(data=st.data())
def test_a_page_is_known_once(name: str, data: st.DataObject) -> None:
    policy = policy_class(name)(PAGES, 10)
    pages = numbers(data.draw(st.lists(st.integers(0, 8), max_size=30)))
    for event in (Event.FAULT, Event.SOFT, Event.PREFETCH, Event.KEPT):
        policy.tell(event, pages)
        assert len(policy) == len(set(pages.tolist()))
        policy.validate()
    policy.tell(Event.GONE, numbers([*pages.tolist(), 9, PAGES + 1]))
    assert len(policy) == 0
    policy.validate()


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_choice_when_it_knows_nothing(name: str) -> None:
    choice = policy_class(name)(PAGES, 10).choose(5, 5)
    assert (len(choice.mark), len(choice.evict)) == (0, 0)


def test_events_have_the_numbers_of_the_native_module() -> None:
    assert {event.name: int(event) for event in Event} == {
        name.removeprefix("DMH_EV_"): getattr(lib, name)
        for name in dir(lib)
        if name.startswith("DMH_EV_") and name != "DMH_EV_NEW"  # in rings only
    }


@pytest.mark.parametrize(("pages", "limit"), [(0, 0), (10, 0), (10, 11), (2**32, 10)])
def test_sizes_that_make_no_sense(pages: int, limit: int) -> None:
    with pytest.raises(ValueError, match="at least one page must be local, at most all"):
        Fifo(pages, limit)


def mixed(limit: int, seed: int) -> Pages:
    """Faults of a program that does a bit of everything, over eight times the limit."""
    rng = np.random.default_rng(seed)
    hot = rng.integers(0, limit // 2, 4 * limit)
    scan = np.arange(4 * limit) % (8 * limit)
    return np.where(rng.random(4 * limit) < 0.5, hot, scan).astype(np.uint64)


@pytest.mark.parametrize("accessed", [False, True])
@pytest.mark.parametrize("name", NAMES)
class TestAtSize:
    LIMIT = 1 << 16

    def full(self, name: str, accessed: bool) -> Policy:
        policy = policy_class(name)(8 * self.LIMIT, self.LIMIT, accessed=accessed)
        policy.tell(Event.FAULT, mixed(self.LIMIT, 1))
        while len(policy) > self.LIMIT:
            self.one_batch(policy, 256)
        return policy

    def one_batch(self, policy: Policy, evict: int) -> tuple[int, float]:
        """How many victims, and in how many seconds of the policy's own; one in eight marked pages is in use."""
        begin = time.perf_counter()
        looks = policy.look(evict)
        asked = time.perf_counter()
        answers = np.where(looks % 8 == 0, np.uint8(Event.USED), np.uint8(Event.IDLE))
        answered = time.perf_counter()
        policy.learn(looks, answers)
        victims = policy.choose(evict, 256).evict
        return len(victims), asked - begin + time.perf_counter() - answered

    def test_256_victims_in_less_than_100_us(self, name: str, accessed: bool) -> None:
        policy = self.full(name, accessed)
        times = []
        for _ in range(30):
            victims, spent = 0, 0.0
            while victims < 256:
                more, seconds = self.one_batch(policy, 256 - victims)
                victims, spent = victims + more, spent + seconds
            times.append(spent)
        assert min(times) < 100e-6, f"{1e6 * min(times):.0f} us"

    def test_a_victim_is_found_where_everything_is_always_in_use(self, name: str, accessed: bool) -> None:
        policy = policy_class(name)(8 * self.LIMIT, self.LIMIT, accessed=accessed)
        policy.tell(Event.FAULT, np.arange(self.LIMIT, dtype=np.uint64))
        for _ in range(4 * self.LIMIT // 256):
            policy.tell(Event.USED, policy.look(256))
            if len(policy.choose(1, 256).evict):
                return
        pytest.fail("none")

    def test_less_than_32_bytes_a_page(self, name: str, accessed: bool) -> None:
        policy = self.full(name, accessed)
        assert isinstance(policy, NativePolicy)
        assert 0 < policy.bytes / policy.pages < 32


class AnyUse(RuleBasedStateMachine):
    """Any policy: pages come, are read ahead, are used, are discarded and are evicted in any order, and the marks and
    evictions that LPET makes may fail.
    """

    name = "fifo"
    accessed = False

    def __init__(self) -> None:
        super().__init__()
        policy = policy_class(self.name)(PAGES, 12, accessed=self.accessed)
        self.memory = Memory(policy, high=12, low=8, slots=5)

    @rule(pages=st.lists(st.integers(0, 30), min_size=1, max_size=6))
    def touch(self, pages: list[int]) -> None:
        self.memory.touch(pages)

    @rule(pages=st.lists(st.integers(0, 30), min_size=1, max_size=6))
    def read_ahead(self, pages: list[int]) -> None:
        for page in pages:
            if page not in self.memory.local and len(self.memory.local) < self.memory.high:
                self.memory.resident.add(page)
                self.memory.used.discard(page)
                self.memory.policy.tell(Event.PREFETCH, numbers([page]))

    @rule(evict=st.integers(1, 20))
    def step(self, evict: int) -> None:
        self.memory.step(evict, self.memory.slots - len(self.memory.staged))

    @rule(evict=st.integers(1, 4))
    def a_step_that_fails(self, evict: int) -> None:
        """No slot was free when LPET came to it: the pages stay resident and LPET says so."""
        free = self.memory.slots - len(self.memory.staged)
        _, marks, victims = self.memory.choose(evict, free)
        self.memory.policy.tell(Event.KEPT, numbers(marks))
        for page in victims:
            if page in self.memory.resident:
                self.memory.policy.tell(Event.KEPT, numbers([page]))
            else:
                self.memory.staged.discard(page)

    @precondition(lambda self: self.memory.local)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.memory.local)))
        self.memory.resident.discard(page)
        self.memory.staged.discard(page)
        self.memory.policy.tell(Event.GONE, numbers([page]))

    @rule(page=st.integers(40, 50))
    def discard_what_is_not_local(self, page: int) -> None:
        self.memory.policy.tell(Event.GONE, numbers([page]))

    @rule()
    def everything_can_be_evicted(self) -> None:
        for _ in range(6 * len(self.memory.local) + 6):
            if not self.memory.local:
                break
            self.memory.step(5, self.memory.slots - len(self.memory.staged))
        assert not self.memory.local

    @invariant()
    def every_local_page_once(self) -> None:
        self.memory.validate()


@pytest.mark.parametrize("name", NAMES)
def test_a_mark_ends_with_its_page(name: str) -> None:
    """Queued when the page was read ahead, made when it had come another way, to a policy that does not ask for marks."""
    policy = policy_class(name)(10, 5, accessed=True)
    for event, pages in ((Event.PREFETCH, [1]), (Event.GONE, [1]), (Event.FAULT, [1, 0])):
        policy.tell(event, numbers(pages))
    for _ in range(20):
        policy.choose(1, 5)
        policy.validate()
        policy.learn(looked := policy.look(5), np.full(len(looked), Event.IDLE, np.uint8))
    assert len(policy) == 0


for _name in NAMES:
    for _accessed in (False, True):
        _machine = type(f"AnyUse_{_name}_{_accessed}", (AnyUse,), {"name": _name, "accessed": _accessed})
        globals()[f"Test_{_name}_{'marks' if _accessed else 'faults'}"] = _machine.TestCase
        _machine.TestCase.settings = settings(max_examples=15, stateful_step_count=30, deadline=None)

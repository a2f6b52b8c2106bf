"""The page life cycle: the table word, the edges, and that C and Python have the same ones."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from regions import run_python

from dmh.errors import InvalidTransition
from dmh.lspt.states import GENERATIONS, SLOT_BITS, TRANSITIONS, State, Word, check_transition, pack, unpack
from dmh.lspt.table import Bounds, Table
from dmh.native import lib

words = st.builds(
    Word,
    state=st.sampled_from(State),
    worker=st.integers(0, 127),
    slot=st.none() | st.integers(0, (1 << SLOT_BITS) - 2),
    generation=st.integers(0, GENERATIONS - 1),
)


@pytest.fixture
def table() -> Iterator[Table]:
    fd = Table.create(64, 4096, 8, 3, Bounds(resident_max=20, high=16, low=8))
    made = Table(fd)
    os.close(fd)
    yield made
    made.close()


@given(words)
def test_a_word_comes_apart_as_it_was_put_together(word: Word) -> None:
    packed = pack(*word)
    assert 0 <= packed < 2**64
    assert unpack(packed) == word


def test_a_fresh_word_is_a_new_page() -> None:
    assert unpack(0) == Word(State.NEW, 0, None, 0)


@pytest.mark.parametrize("old", State)
@pytest.mark.parametrize("new", State)
def test_only_listed_edges_are_legal(old: State, new: State) -> None:
    if new in TRANSITIONS[old]:
        check_transition(7, old, new)
    else:
        with pytest.raises(InvalidTransition, match=f"page 7 cannot go from {old.name} to {new.name}") as caught:
            check_transition(7, old, new)
        assert caught.value.page == 7


def test_memory_is_entered_and_left_through_a_claim() -> None:
    """Without a claim in between, two workers could bring in, or take out, one page at a time."""
    assert all(new is State.FETCHING or State.RESIDENT not in TRANSITIONS[old] for old, edges in TRANSITIONS.items()
    for new in edges
               if old not in (State.FETCHING, State.EVICTING))  # fmt: skip
    assert {old for old in State if State.RESIDENT in TRANSITIONS[old]} == {State.FETCHING, State.EVICTING}
    assert TRANSITIONS[State.RESIDENT] == {State.EVICTING}


def test_no_state_is_a_dead_end_and_none_is_out_of_reach() -> None:
    assert set(TRANSITIONS) == set(State)
    for start in State:
        reached, todo = set[State](), [start]
        while todo:
            new = TRANSITIONS[todo.pop()] - reached
            reached |= new
            todo += new
        assert reached == set(State), start


class TestNativeTable:
    @pytest.mark.parametrize("old", State)
    @pytest.mark.parametrize("new", State)
    def test_compare_and_swap_takes_the_same_edges(self, table: Table, old: State, new: State) -> None:
        table.words[5] = before = pack(old, 2, 3, 9)
        if new in TRANSITIONS[old]:
            assert lib.dmh_move(table.raw, 5, before, new, 1, 4) == 1
            assert table.word(5) == Word(new, 1, 4, 10)
        else:  # a defect in dmh: the process ends rather than damage the table
            code = """
                import sys
                from dmh.lspt.states import pack
                from dmh.lspt.table import Bounds, Table
                from dmh.native import lib
                table = Table(Table.create(8, 4096, 1, 1, Bounds(4, 3, 2)))
                old, new = map(int, sys.argv[1:])
                table.words[5] = pack(old, 0, None, 9)
                lib.dmh_move(table.raw, 5, pack(old, 0, None, 9), new, 0, -1)
                """
            if (old, new) in (
                (State.NEW, State.RESIDENT),
                (State.STAGED, State.EVICTING),
            ):  # two for all: a process each
                ended = run_python(code, int(old), int(new))
                assert ended.returncode == -6
                assert f"cannot go from {old.name} to {new.name}" in ended.stderr

    def test_a_word_that_has_changed_is_left_alone(self, table: Table) -> None:
        seen = int(table.words[3])
        assert lib.dmh_move(table.raw, 3, seen, State.FETCHING, 1, -1) == 1
        assert lib.dmh_move(table.raw, 3, seen, State.FETCHING, 2, -1) == 0
        assert table.word(3) == Word(State.FETCHING, 1, None, 1)

    def test_the_same_state_again_is_another_word(self, table: Table) -> None:
        """What compare-and-swap relies on: back in the same state, a page still has a word nobody saw before."""
        first = int(table.words[3])
        for new in (State.FETCHING, State.NEW):
            assert lib.dmh_move(table.raw, 3, int(table.words[3]), new, 0, -1) == 1
        assert table.state(3) is State.NEW
        assert int(table.words[3]) != first

    def test_the_generation_wraps_without_touching_the_rest(self, table: Table) -> None:
        table.words[1] = pack(State.NEW, 0, None, GENERATIONS - 1)
        assert lib.dmh_move(table.raw, 1, int(table.words[1]), State.FETCHING, 1, 7) == 1
        assert table.word(1) == Word(State.FETCHING, 1, 7, 0)

    @given(counts=st.lists(st.integers(0, 30), max_size=12))
    def test_room_is_never_promised_twice(self, counts: list[int]) -> None:
        fd = Table.create(64, 4096, 8, 3, Bounds(resident_max=20, high=16, low=8))
        table = Table(fd)
        os.close(fd)
        held = 0
        for wanted in counts:
            got = lib.dmh_reserve(table.raw, wanted)
            assert got == min(wanted, 20 - held)
            held += got
            table.validate()
            assert table.resident == held
            if held > 10:
                lib.dmh_release(table.raw, 7)
                held -= 7
        table.close()

    def test_states_are_counted_and_listed(self, table: Table) -> None:
        for page, state in {3: State.STORED, 9: State.STAGED, 10: State.STAGED, 63: State.RESIDENT}.items():
            table.words[page] = pack(state)
        assert table.states() == dict.fromkeys(State, 0) | {
            State.NEW: 60,
            State.STORED: 1,
            State.STAGED: 2,
            State.RESIDENT: 1,
        }
        assert table.in_state(State.STAGED).tolist() == [9, 10]
        assert table.in_state(State.STAGED, 10, 64).tolist() == [10]
        assert table.in_state(State.NEW, 62).tolist() == [62]

    def test_too_many_workers_or_slots_are_refused(self) -> None:
        for slots, workers in ((8, 73), (1 << SLOT_BITS, 3)):
            with pytest.raises(OSError, match="Invalid argument"):
                Table.create(64, 4096, slots, workers, Bounds(20, 16, 8))

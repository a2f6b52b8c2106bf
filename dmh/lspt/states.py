"""The life cycle of a page: states, legal transitions, and what the bits of a table word mean.

Pure: no I/O, no shared memory.  This module is the only place where states and transitions are listed; the build of the
native module generates the C constants and the table that its compare-and-swap checks from it.

A word is 64 bits:

    bits  0..3   state
    bits  4..10  worker: number of the process that holds the page (FETCHING, EVICTING), else 0
    bit  11      FETCHING: the content has to come from the DMS, so that a claim given up leads back to STORED;
                 POISONED: the DMS did not answer, and may have the content yet;
                 EVICTING: it is being dropped as it is, because the DMS has it, or it is all zeros
    bits 12..31  slot + 1 in the victim buffer (STAGED, and FETCHING while the slot is the only copy), else 0
    bit  32      FETCHING, EVICTING: programs' mappings carry the mark that raises SIGBUS, or some of them do
    bits 33..63  generation: one more at every transition, so that a word is never seen twice (no ABA)
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from dmh.errors import InvalidTransition


class State(enum.IntEnum):
    """Where a page is.  NEW is zero, so that a fresh table needs no filling in."""

    NEW = 0
    """Never written, or all zeros: no content is kept anywhere."""
    STORED = 1
    """The DMS has acknowledged the content and is its only holder."""
    FETCHING = 2
    """A worker has claimed it and brings its content in."""
    RESIDENT = 3
    """In the region's memory; the application may be changing it at any moment."""
    EVICTING = 4
    """A worker is moving it out; its content is in the region, the pipe or the slot."""
    STAGED = 5
    """In a slot of the victim buffer, not yet acknowledged by the DMS."""
    POISONED = 6
    """Its content is lost, fails its checksum, or cannot be had while the DMS is away: access raises SIGBUS."""


TRANSITIONS: dict[State, frozenset[State]] = {
    State.NEW: frozenset({State.FETCHING}),
    State.STORED: frozenset({State.FETCHING, State.NEW}),
    State.FETCHING: frozenset({State.RESIDENT, State.NEW, State.STORED, State.STAGED, State.POISONED}),
    State.RESIDENT: frozenset({State.EVICTING}),
    State.EVICTING: frozenset({State.STAGED, State.STORED, State.NEW, State.RESIDENT, State.POISONED}),
    State.STAGED: frozenset({State.FETCHING, State.STORED, State.NEW}),
    State.POISONED: frozenset({State.FETCHING, State.NEW}),
}
"""Every edge a page may take.  FETCHING and EVICTING lead back to where they came from: a claim given up."""


class Copy(enum.IntEnum):
    """What the DMS has of a page, whatever the page's state; one byte a page, written by the evictor only."""

    NONE = 0
    """Nothing."""
    VALID = 1
    """Bytes whose hash stands in the table; in state STORED they are the page's content."""
    STALE = 2
    """Bytes that are no longer wanted (the page has become all zeros); to be deleted."""
    UNKNOWN = 3
    """A write is under way or failed half-way: the DMS may have either version."""


class Advice(enum.IntEnum):
    """What the program has said of its use of a page; one byte a page, written by the launcher for read-ahead."""

    NORMAL = 0
    """Nothing: faults tell."""
    SEQUENTIAL = 1
    """Ascending: the first fault already reads ahead, as far as is allowed."""
    RANDOM = 2
    """No fault here reads ahead."""


STATE_BITS, WORKER_BITS, SLOT_BITS = 4, 7, 20
WORKER_SHIFT, FROM_STORE_SHIFT, SLOT_SHIFT, MARKED_SHIFT, GENERATION_SHIFT = 4, 11, 12, 32, 33
GENERATIONS = 1 << (64 - GENERATION_SHIFT)


class Word(NamedTuple):
    """A table word taken apart.  ``slot`` is None where the word names none."""

    state: State
    worker: int
    slot: int | None
    generation: int


def unpack(word: int) -> Word:
    """Take a 64-bit table word apart."""
    slot = (word >> SLOT_SHIFT) & ((1 << SLOT_BITS) - 1)
    return Word(
        State(word & ((1 << STATE_BITS) - 1)),
        (word >> WORKER_SHIFT) & ((1 << WORKER_BITS) - 1),
        slot - 1 if slot else None,
        word >> GENERATION_SHIFT,
    )


def pack(state: State, worker: int = 0, slot: int | None = None, generation: int = 0) -> int:
    """Put a table word together; the inverse of `unpack`."""
    return (
        int(state)
        | worker << WORKER_SHIFT
        | (0 if slot is None else slot + 1) << SLOT_SHIFT
        | generation % GENERATIONS << GENERATION_SHIFT
    )


def check_transition(page: int, old: State, new: State) -> None:
    """Raise `InvalidTransition` unless `old` -> `new` is an edge of the life cycle."""
    if new not in TRANSITIONS[old]:
        legal = ", ".join(sorted(s.name for s in TRANSITIONS[old]))
        raise InvalidTransition(
            f"page {page} cannot go from {old.name} to {new.name}; from {old.name} it may go to {legal}", page=page
        )

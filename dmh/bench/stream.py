"""Sequential access to four times the memory limit, in 8-byte words.

    read           sum of all words, first to last                            C loop
    update         add one to every word, first to last                       C loop
    triad          a = b + d * c, the arrays being the thirds of the memory   C loop
    numpy sum      array.sum()
    numpy update   array += 1

The baseline of the C loops is the floor pager, that of NumPy's numpy.memmap.  A page of the triad is a page of a, b or
c.  Every run's sum is compared with what must be there, and so is, at the end, what the last run wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from dmh.bench import work
from dmh.bench.rows import Progress, Row, Samples, interleave, summarize
from dmh.bench.subject import Contest, Options, contest, verify
from dmh.bench.words import MASK, total

LIMIT = 64 << 20

SUBJECTS = ("floor-pager", "dmh", "dmh-pool", "mmap", "swap")
CASES = ("read", "update", "triad", "numpy sum", "numpy update")
NUMPY_NAMES = {"dmh": "dmh", "dmh-pool": "dmh-pool", "mmap": "memmap"}
"""Subjects of NumPy's cases, and what they are called there: what is mapped is a numpy.memmap."""


def run(options: Options, progress: Progress) -> list[Row]:
    """Rows of every case."""
    limit = options.limit_or(LIMIT)
    rows: list[Row] = []
    with contest(options, 4 * limit, limit, SUBJECTS, lambda text: progress(f"stream: {text}")) as entered:
        states = {name: _Expected(4 * limit // 8) for name in entered.subjects}
        for case in CASES:
            before = entered.faults()
            rows += _case(options, entered, states, case, progress)
            rows += entered.waits_since(before, "stream", case, options.runs)
    return rows


class _Expected:
    """What a subject's words sum to: all have been increased equally often, the first third may be the triad's."""

    def __init__(self, words: int) -> None:
        self.words = words
        self.increments = 0
        self.all = total(0, words)
        self.factor = 2

    def parts(self, third: int) -> tuple[int, int]:
        """The sums of b and c."""
        added = self.increments * third
        return total(third, 2 * third) + added & MASK, total(2 * third, 3 * third) + added & MASK


def _case(options: Options, entered: Contest, states: dict[str, _Expected], case: str, progress: Progress) -> list[Row]:
    names = NUMPY_NAMES if case.startswith("numpy") else {name: name for name in SUBJECTS}
    size = next(iter(states.values())).words * 8
    third = work.third_of(size // 8)
    touched = third * 3 * 8 if case == "triad" else size

    def one(name: str) -> Samples:
        subject, state = entered.subjects[name], states[name]
        if case == "triad":
            state.factor += 1
            b, c = state.parts(third)
            seconds, found = subject.call(work.triad, state.factor)
            verify(name, found, b + state.factor * c & MASK)
        else:
            action, increments = ACTIONS[case]
            seconds, found = subject.call(action)
            if action is not work.numpy_update:
                verify(name, found, state.all)
            state.increments += increments
            state.all = state.all + increments * state.words & MASK
        return np.array([touched / seconds / 1e6])

    results = interleave(
        {shown: partial(one, name) for name, shown in names.items() if name in entered.subjects},
        options.runs,
        lambda text: progress(f"stream {case}: {text}"),
    )
    for name in names:
        if name in entered.subjects:
            progress(f"stream {case}: verifying {name}")
            found = entered.subjects[name].call(work.read)[1]
            _verify_written(name, found, states[name], third, triad=case == "triad")
    missing = {names[name]: why for name, why in entered.missing.items() if name in names}
    baseline = "memmap" if names is NUMPY_NAMES else "floor-pager"
    per_page = {name: [options.page_size / samples for samples in runs] for name, runs in results.items()}
    return summarize("stream", case, "time a page", "µs", per_page, baseline, missing=missing) + summarize(
        "stream", case, "throughput", "MB/s", results, baseline, rate=True, missing=missing
    )


ACTIONS: dict[str, tuple[Callable[[work.Memory], work.Found], int]] = {
    "read": (work.read, 0),
    "update": (work.update, 1),
    "numpy sum": (work.numpy_sum, 0),
    "numpy update": (work.numpy_update, 1),
}
"""Case -> what is done, and what it adds to every word."""


def _verify_written(name: str, found: int, state: _Expected, third: int, *, triad: bool) -> None:
    if triad:
        b, c = state.parts(third)
        rest = total(3 * third, state.words) + state.increments * (state.words - 3 * third)
        state.all = b + state.factor * c + b + c + rest & MASK
    verify(name, found, state.all)

"""Single words of four times the memory limit, one access after the other (C loop, 8-byte reads).

    random   word numbers are uniform
    zipf     pages follow Zipf's law with exponent 0.99, popular pages lie anywhere, words within a page are uniform:
             `read` only reads, `write` also adds one to every second word that it reads

Every run goes on where the one before it left off, the first is not counted: so what is local is what such accesses
leave there.  Figures are µs an access over a whole run, hits included.  The sum of what a run reads is compared with
what must be there given all runs before it; at the end, that of all words.
"""

from __future__ import annotations

import numpy as np

from dmh.bench import work
from dmh.bench.rows import Progress, Row, Samples, interleave, summarize
from dmh.bench.subject import Contest, Options, Subject, contest, verify
from dmh.bench.words import Accesses, Script, Words, uniform, zipf

LIMIT = 64 << 20
SKEW = 0.99
ACCESSES = {"random": 20_000, "zipf": 60_000}
QUICK_ACCESSES = 2_000
SUBJECTS = ("floor-pager", "dmh", "dmh-pool", "mmap-random", "swap")
BASELINE = "floor-pager"
NO_MMAP = "without MADV_RANDOM the kernel reads around every page of a file: milliseconds an access; see mmap-random"


def run_random(options: Options, progress: Progress) -> list[Row]:
    """Rows of the uniform case."""
    return _run(options, progress, "random", ("read",))


def run_zipf(options: Options, progress: Progress) -> list[Row]:
    """Rows of the cases that follow Zipf's law."""
    return _run(options, progress, "zipf", ("read", "write"))


def _run(options: Options, progress: Progress, benchmark: str, cases: tuple[str, ...]) -> list[Row]:
    limit = options.limit_or(LIMIT)
    size = 4 * limit
    rows: list[Row] = []
    with contest(options, size, limit, SUBJECTS, lambda text: progress(f"{benchmark}: {text}")) as entered:
        entered.missing["mmap"] = NO_MMAP
        script = Script(size // 8)
        generator = np.random.default_rng(20)
        for case in cases:
            before = entered.faults()
            rows += _case(options, entered, script, generator, benchmark, case, progress)
            rows += entered.waits_since(before, benchmark, case, options.runs)
        for name, subject in entered.subjects.items():
            progress(f"{benchmark}: verifying {name}")
            verify(name, subject.call(work.read)[1], script.total())
    return rows


def _case(
    options: Options,
    entered: Contest,
    script: Script,
    generator: np.random.Generator,
    benchmark: str,
    case: str,
    progress: Progress,
) -> list[Row]:
    count = QUICK_ACCESSES if options.quick else ACCESSES[benchmark]
    words = 4 * options.limit_or(LIMIT) // 8

    def numbers() -> Words:
        if benchmark == "random":
            return uniform(generator, words, count)
        return zipf(generator, words * 8 // options.page_size, options.page_size // 8, count, SKEW)

    plan = [script.run(numbers(), write=case == "write") for _ in range(options.runs + 1)]
    results = interleave(
        {name: _Runs(subject, name, plan).next for name, subject in entered.subjects.items()},
        options.runs,
        lambda text: progress(f"{benchmark} {case}: {text}"),
    )
    return summarize(benchmark, case, "time an access", "µs", results, BASELINE, missing=entered.missing)


class _Runs:
    """One subject's way through the plan."""

    def __init__(self, subject: Subject, name: str, plan: list[Accesses]) -> None:
        self._subject, self._name = subject, name
        self._plan = iter(plan)

    def next(self) -> Samples:
        run = next(self._plan)
        seconds, found = self._subject.call(work.access, run.numbers, run.write)
        verify(self._name, found, run.expected)
        return np.array([seconds * 1e6 / len(run.numbers)])

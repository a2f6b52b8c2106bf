"""The simulator: exact against libCacheSim, the same in C and through the interface; the default policy's figures; the
command.
"""

from __future__ import annotations

import json
from pathlib import Path

import libcachesim
import numpy as np
import pytest

from dmh.cli.main import main
from dmh.errors import DmhError
from dmh.evict.policies import Policy, policy_class, policy_names
from dmh.evict.policies.base import Choice, Kinds, Pages
from dmh.simulate.generators import GENERATORS, make_trace
from dmh.simulate.replay import Outcome, lru, optimal, replay
from dmh.simulate.study import SHARES, as_markdown, mean, study
from dmh.simulate.traces import Subject, load_trace

PAGES = 200
TRACES = ("zipf", "loop", "zipf-with-scans", "phases", "quick-sort", "loop-join")


def misses(cache: libcachesim.CacheBase, trace: Pages) -> int:
    """Of libCacheSim; every object has size 1."""
    following: dict[int, int] = {}
    nexts = []
    for time, page in reversed(list(enumerate(trace.tolist()))):
        nexts.append(following.get(page, 2**63 - 1))
        following[page] = time
    count = 0
    for page, following_use in zip(trace.tolist(), reversed(nexts), strict=True):
        request = libcachesim.Request(obj_id=page + 1, obj_size=1)
        request.next_access_vtime = following_use
        count += not cache.get(request)
    return count


@pytest.fixture(params=[(name, limit) for name in TRACES for limit in (20, 50, 150)], ids=lambda it: f"{it[0]}-{it[1]}")
def case(request: pytest.FixtureRequest) -> tuple[Pages, int]:
    name, limit = request.param
    return make_trace(name, PAGES), limit


class TestAgainstLibCacheSim:
    def test_lru(self, case: tuple[Pages, int]) -> None:
        trace, limit = case
        assert lru(trace, PAGES, limit).hard == misses(libcachesim.LRU(limit, hashpower=12), trace)

    def test_opt(self, case: tuple[Pages, int]) -> None:
        trace, limit = case
        assert optimal(trace, PAGES, limit).hard == misses(libcachesim.Belady(limit, hashpower=12), trace)

    @pytest.mark.parametrize("accessed", [True, False], ids=["marks", "every use"])
    def test_clock(self, case: tuple[Pages, int], accessed: bool) -> None:
        """A mark as soon as a page has come in, and a look when the hand is there, is CLOCK's bit."""
        trace, limit = case
        policy = policy_class("clock")(PAGES, limit, accessed=accessed)
        outcome = replay(policy, trace, PAGES, limit, every=not accessed)
        assert outcome.hard == misses(libcachesim.Clock(limit, hashpower=12), trace)

    def test_s3fifo(self, case: tuple[Pages, int]) -> None:
        trace, limit = case
        policy = policy_class("s3fifo")(PAGES, limit)
        outcome = replay(policy, trace, PAGES, limit, every=True)
        assert outcome.hard == misses(libcachesim.S3FIFO(limit, hashpower=12), trace)

    def test_fifo(self, case: tuple[Pages, int]) -> None:
        trace, limit = case
        outcome = replay(policy_class("fifo")(PAGES, limit), trace, PAGES, limit)
        assert outcome.hard == misses(libcachesim.FIFO(limit, hashpower=12), trace)


class Foreign(Policy):
    """A policy from another package: nothing of it is in the native module but what it calls."""

    def __init__(self, name: str, pages: int, limit: int, *, accessed: bool = False) -> None:
        super().__init__(pages, limit, accessed=accessed)
        self.inner = policy_class(name)(pages, limit, accessed=accessed)

    def learn(self, pages: Pages, kinds: Kinds) -> None:
        self.inner.learn(pages, kinds)

    def look(self, most: int) -> Pages:
        return self.inner.look(most)

    def choose(self, evict: int, mark: int) -> Choice:
        return self.inner.choose(evict, mark)

    def __len__(self) -> int:
        return len(self.inner)

    def knows(self, pages: Pages) -> np.ndarray:
        return self.inner.knows(pages)

    def validate(self) -> None:
        self.inner.validate()


class TestReplay:
    @pytest.mark.parametrize(("high", "low"), [(50, None), (50, 40)])
    @pytest.mark.parametrize("accessed", [False, True])
    @pytest.mark.parametrize("name", policy_names())
    def test_the_same_through_the_interface(self, name: str, accessed: bool, high: int, low: int | None) -> None:
        trace = make_trace("zipf-with-scans", PAGES)[:1500]
        quick = policy_class(name)(PAGES, high, accessed=accessed)
        slow = Foreign(name, PAGES, high, accessed=accessed)
        outcome = replay(quick, trace, PAGES, high, low, slots=6)
        assert outcome == replay(slow, trace, PAGES, high, low, slots=6)
        assert len(quick) == len(slow) <= high
        assert outcome.evicted == outcome.hard - len(quick)
        quick.validate()

    def test_a_buffer_turns_hard_faults_into_soft_ones(self) -> None:
        trace = make_trace("zipf", PAGES)
        walk = policy_class("idle-walk")
        with_buffer = replay(walk(PAGES, 50), trace, PAGES, 50, slots=10)
        assert with_buffer.soft > 0
        assert with_buffer.hard < replay(walk(PAGES, 50), trace, PAGES, 50, slots=1).hard

    def test_a_policy_without_victims(self) -> None:
        with pytest.raises(DmhError, match="IdleWalk names no victim although 50 pages are local"):
            replay(policy_class("idle-walk")(PAGES, 50), make_trace("loop", PAGES), PAGES, 50, slots=0)

    def test_pages_that_do_not_exist(self) -> None:
        with pytest.raises(DmhError, match="pages beyond the 10"):
            replay(policy_class("fifo")(10, 5), make_trace("loop", PAGES), 10, 5)

    def test_cost(self) -> None:
        outcome = Outcome(references=2000, hard=10, soft=100, marks=1000)
        assert outcome.cost_us == 10 * 103 + 100 * 33 + 1000
        assert outcome.per_thousand(outcome.hard) == 5


class TestGenerators:
    @pytest.mark.parametrize("name", GENERATORS)
    def test_sized_by_pages_and_the_same_for_the_same_seed(self, name: str) -> None:
        trace = make_trace(name, 512, seed=3)
        assert trace.dtype == np.uint64
        assert 0.75 * 512 <= len(np.unique(trace)) <= 512
        assert int(trace.max()) < 512
        assert 12 * 512 <= len(trace) <= 26 * 512
        assert (trace[1:] != trace[:-1]).all()
        assert np.array_equal(trace, make_trace(name, 512, seed=3))

    def test_there_are_enough(self) -> None:
        assert len(GENERATORS) >= 24


class TestDefault:
    """docs/policies.md has the same at 8192 pages (`dmh simulate --table`)."""

    @pytest.mark.parametrize(("marks", "most"), [(False, 0.95), (True, 0.88)])
    def test_beside_lru(self, marks: bool, most: float) -> None:
        subjects = [Subject.of(name, make_trace(name, 2048)) for name in GENERATORS]
        runs = study(subjects, [("auto", marks)], SHARES)
        assert len(runs) == len(GENERATORS) * len(SHARES)
        assert mean(run.to_lru for run in runs) <= most
        assert marks == (sum(run.outcome.marks for run in runs) > 0)


class TestTraces:
    def test_sparse_page_numbers_are_moved_together_in_order(self) -> None:
        it = Subject.of("x", np.array([10**12, 5, 10**12 + 1, 5], np.uint64))
        assert (it.pages, it.footprint, it.trace.tolist()) == (3, 3, [1, 0, 2, 0])

    def test_dense_ones_stay(self) -> None:
        it = Subject.of("x", np.array([7, 5, 6, 5], np.uint64))
        assert (it.pages, it.footprint, it.trace.tolist()) == (8, 3, [7, 5, 6, 5])

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            (np.zeros((2, 2), int), "one dimension"),
            (np.array([0.5]), "whole numbers"),
            (np.array([3, -1]), "it has -1"),
        ],
    )
    def test_other_arrays_are_refused(self, tmp_path: Path, content: np.ndarray, why: str) -> None:
        np.save(tmp_path / "t.npy", content)
        with pytest.raises(DmhError, match=why):
            load_trace(tmp_path / "t.npy")

    def test_other_files_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "t").write_text("1\n2\n")
        with pytest.raises(DmhError, match=r"cannot be read as a trace, a \.npy file"):
            load_trace(tmp_path / "t")


class TestCommand:
    def test_figures_for_programs(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        np.save(tmp_path / "t.npy", make_trace("loop", PAGES))
        arguments = ["simulate", str(tmp_path / "t.npy"), "--policy", "fifo,random", "--limit", "50%,20", "--json"]
        assert main(arguments) == 0
        runs = json.loads(capsys.readouterr().out)
        assert [(run["policy"], run["limit_pages"]) for run in runs] == [
            ("fifo", 100), ("random", 100), ("fifo", 20), ("random", 20),
        ]  # fmt: skip
        assert all(run["opt"]["hard"] <= run["hard"] for run in runs)
        assert runs[0]["hard"] == runs[0]["lru"]["hard"] == runs[0]["references"]

    def test_a_table_for_people(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["simulate", "zipf", "--pages", "256", "--marks"]) == 0
        text = capsys.readouterr().out
        assert all(word in text for word in ("OPT", "LRU", "auto, marks", "pgr", "hard / 1000"))

    def test_the_table_of_the_documentation(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["simulate", "loop", "zipf", "--pages", "256", "--table"]) == 0
        table = capsys.readouterr().out
        assert table.startswith("| policy | all | 10% | 25% | 50% | 75% |")
        assert all(f"| {name} |" in table for name in policy_names() if name != "duel")

    @pytest.mark.parametrize(
        ("arguments", "status", "message"),
        [
            (["nonsense"], 1, "'nonsense' is neither a file nor a generator"),
            (["loop", "--policy", "lru"], 2, "no policy 'lru' is installed; there are auto"),
            (["loop", "--limit", "0%"], 2, "--limit: a percentage below 100"),
            ([], 2, "name a trace"),
        ],
    )
    def test_mistakes(
        self, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
    ) -> None:
        assert main(["simulate", *arguments]) == status
        assert message in capsys.readouterr().err


def test_markdown_says_where_the_default_loses() -> None:
    subjects = [Subject.of("sawtooth", make_trace("sawtooth", 512))]
    text = as_markdown(study(subjects, [("auto", False), ("fifo", False), ("fifo", True), ("auto", True)], SHARES))
    assert "| sawtooth |" in text

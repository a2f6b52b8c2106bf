"""The simulated service: what it has in common with the plain replay, and where thresholds, batches, the victim buffer
and the budget for marks make it another.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmh.cli.main import main
from dmh.config.limits import Limits
from dmh.errors import DmhError
from dmh.evict.policies import Policy, policy_class
from dmh.evict.policies.base import Choice, Event, Kinds, Pages
from dmh.simulate.generators import make_trace
from dmh.simulate.live import Pace, Setting, replay_live
from dmh.simulate.replay import Outcome, replay

PAGES = 400
AT_ONCE = Pace(wake=0, late=0, batch=0, capture=0, write=0, call=0, mark=0, look=0)
"""LPET is done with everything before the program's next use."""


def setting(
    limit: int = 200,
    *,
    buffer: int = 20,
    high: int = 180,
    low: int = 150,
    batch: int = 256,
    adaptive: bool = False,
    idle: str = "none",
    budget: float = 1.0,
) -> Setting:
    """Of a service; thresholds that stay where they are, unless they are to move."""
    limits = Limits(limit, buffer, limit - buffer, high, low, 0, min(batch, buffer), adaptive)
    limits.validate()
    return Setting(limits, idle, budget)


def run(name: str, trace: Pages, of: Setting, pace: Pace | None = None, *, filled: bool = False) -> Outcome:
    """A run of a policy by its name."""
    policy = policy_class(name)(PAGES, of.reckoned, accessed=of.accessed)
    outcome = replay_live(policy, trace, PAGES, of, pace, filled=filled)
    policy.validate()
    assert len(policy) <= of.limits.limit
    return outcome


class Watched(Policy):
    """A policy that notes what it is asked and told."""

    def __init__(self, name: str, of: Setting) -> None:
        super().__init__(PAGES, of.reckoned, accessed=of.accessed)
        self.inner = policy_class(name)(PAGES, of.reckoned, accessed=of.accessed)
        self.asked: list[int] = []
        self.local: list[int] = []
        self.told: list[int] = []

    def learn(self, pages: Pages, kinds: Kinds) -> None:
        self.inner.learn(pages, kinds)
        if (kinds == Event.FAULT).any():
            self.told.append(len(pages))

    def look(self, most: int) -> Pages:
        return self.inner.look(most)

    def choose(self, evict: int, mark: int) -> Choice:
        choice = self.inner.choose(evict, mark)
        if evict:
            self.asked.append(evict)
            self.local.append(len(self.inner))
        return choice

    def __len__(self) -> int:
        return len(self.inner)

    def knows(self, pages: Pages) -> np.ndarray:
        return self.inner.knows(pages)

    def validate(self) -> None:
        self.inner.validate()


@pytest.mark.parametrize(
    ("name", "idle"),
    [("auto", "none"), ("auto", "unmap"), ("auto", "buffer"), ("s3fifo", "unmap"), ("idle-walk", "buffer")],
)
def test_policies_from_elsewhere_run_as_well(name: str, idle: str) -> None:
    trace, of = make_trace("zipf-with-scans", PAGES), setting(adaptive=True, idle=idle)
    assert replay_live(Watched(name, of), trace, PAGES, of) == run(name, trace, of)


@pytest.mark.parametrize("name", ["zipf", "scan-with-hot-set", "quick-sort"])
@pytest.mark.parametrize(("high", "low"), [(170, 169), (170, 150), (100, 40)])
def test_an_lpet_that_takes_no_time_does_what_the_plain_replay_does(name: str, high: int, low: int) -> None:
    """FIFO does not mind that LPET runs after the fault that rang, and not before it."""
    trace = make_trace(name, PAGES)
    of = setting(high=high, low=low, buffer=20)
    outcome = run("fifo", trace, of, AT_ONCE)
    plain = replay(policy_class("fifo")(PAGES, high), trace, PAGES, high, low)
    assert (outcome.hard, outcome.soft, outcome.waits) == (plain.hard, 0, 0)


def test_it_evicts_in_batches_from_the_high_threshold_to_the_low_one() -> None:
    of = setting(high=170, low=140, batch=8)
    policy = Watched("fifo", of)
    replay_live(policy, make_trace("loop", PAGES), PAGES, of, AT_ONCE)
    assert set(policy.asked) == {8, 6}  # 30 = 8 + 8 + 8 + 6
    assert min(policy.local) == 141  # the fault that rang has its page besides
    assert set(policy.told) == {30, 171}, "arrivals are told of once a run, all that there were"


def test_what_lpet_takes_too_long_for_is_waited_for_at_the_hard_bound() -> None:
    of = setting(high=170, low=150)
    late = replace(AT_ONCE, wake=10_000.0, late=10_000.0)
    policy = Watched("fifo", of)
    trace = make_trace("loop", PAGES)
    outcome = replay_live(policy, trace, PAGES, of, late)
    assert outcome.waits == pytest.approx(outcome.evicted / 30, abs=2), "each run has one fault waiting for it"
    assert max(policy.told) == of.limits.resident_max == 180
    prompt = run("fifo", trace, setting(high=160, low=150), replace(AT_ONCE, wake=100.0))
    assert prompt.waits == 0


def test_a_page_is_taken_back_while_it_is_on_its_way_out() -> None:
    slow = replace(AT_ONCE, write=400.0)
    outcome = run("random", make_trace("zipf", PAGES), setting(), slow)
    assert outcome.soft > 20
    assert run("random", make_trace("zipf", PAGES), setting(), AT_ONCE).soft == 0


def test_the_thresholds_follow_the_fault_rate_where_they_are_fractions() -> None:
    """With faults that come ten times as fast more is kept free, and a loop finds less of it local."""
    trace = make_trace("loop", PAGES)
    of = setting(high=180, low=100, adaptive=True)
    seldom, often = (run("random", trace, of, Pace(hard=us)) for us in (2000.0, 20.0))
    assert often.hard > 1.05 * seldom.hard


class TestMarks:
    HOT = make_trace("scan-with-hot-set", PAGES)

    def test_they_spare_what_is_in_use(self) -> None:
        with_marks = run("clock", self.HOT, setting(idle="unmap"))
        assert with_marks.marks > 500
        assert with_marks.hard < 0.9 * run("clock", self.HOT, setting(idle="none")).hard

    def test_they_tell_of_the_uses_since(self) -> None:
        """With marks that cost nothing CLOCK keeps as much as in the plain replay, which marks at once."""
        trace = make_trace("zipf", PAGES)
        outcome = run("clock", trace, setting(high=170, low=169, idle="unmap"), AT_ONCE)
        plain = replay(policy_class("clock")(PAGES, 170, accessed=True), trace, PAGES, 170, 169)
        fifo = replay(policy_class("fifo")(PAGES, 170), trace, PAGES, 170, 169)
        assert outcome.hard == pytest.approx(plain.hard, rel=0.02)
        assert plain.hard < 0.95 * fifo.hard

    def test_they_end_with_the_budget(self) -> None:
        little, much = (run("clock", self.HOT, setting(idle="unmap", budget=share)) for share in (0.001, 1.0))
        assert 0 < little.marks < 0.7 * much.marks
        assert run("clock", self.HOT, setting(idle="unmap", budget=0.0)).marks == 0

    def test_they_move_pages_where_nothing_else_tells(self) -> None:
        """`idle-walk` marks with `buffer`: a use of a marked page is a soft fault."""
        outcome = run("idle-walk", self.HOT, setting(idle="buffer", buffer=60, high=180, low=150, limit=240))
        assert outcome.soft > 100
        assert outcome.marks > outcome.soft


def test_filled_before() -> None:
    """What comes in before the trace begins does not count, and a policy knows that it was there."""
    trace = np.arange(100, dtype=np.uint64)
    assert run("auto", trace, setting(), filled=True) == Outcome(100, hard=100)
    of = setting()
    policy = Watched("fifo", of)
    replay_live(policy, trace, PAGES, of, filled=True)
    assert sum(policy.told) == PAGES


def test_pages_that_do_not_exist() -> None:
    with pytest.raises(DmhError, match="pages beyond the 400"):
        run("fifo", np.array([400], np.uint64), setting())


def test_a_policy_without_victims() -> None:
    class Idle(Watched):
        def choose(self, evict: int, mark: int) -> Choice:
            return Choice()

    of = setting()
    with pytest.raises(DmhError, match="Idle names no victim although 180 pages are local"):
        replay_live(Idle("fifo", of), make_trace("loop", PAGES), PAGES, of)


class TestCommand:
    def simulate(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
        assert main(["simulate", "loop", "--pages", "1024", "--policy", "random", "--json", *arguments]) == 0
        found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
        return found

    def test_a_service_has_less_than_all_of_the_memory(self, capsys: pytest.CaptureFixture[str]) -> None:
        (ideal,), (live,) = (self.simulate(capsys, "--limit", "50%", *more) for more in ([], ["--live"]))
        assert live["hard"] > 1.05 * ideal["hard"]
        assert live["limit_pages"] == ideal["limit_pages"] == 512

    def test_settings_count(self, capsys: pytest.CaptureFixture[str]) -> None:
        settings = "memory.high=500 pages", "memory.low=100 pages", "evictor.idle=none"
        (deep,) = self.simulate(capsys, "--limit", "512", *(part for it in settings for part in ("--set", it)))
        (usual,) = self.simulate(capsys, "--limit", "512", "--set", "evictor.idle=none")
        assert deep["hard"] > 1.05 * usual["hard"]
        assert not deep["accessed"]

    def test_a_file_says_how_much_memory_there_is(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        path = tmp_path / "c.yaml"
        path.write_text(
            "region: {name: x, size: 64MiB, page_size: 16384}\nmemory: {limit: 4MiB}\nstore: {url: 'memory:'}\n"
        )
        (run,) = self.simulate(capsys, "-c", str(path))
        assert run["limit_pages"] == 256
        assert [it["limit_pages"] for it in self.simulate(capsys, "-c", str(path), "--limit", "10%,100")] == [102, 100]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["loop", "--live", "--marks"], "--marks: what tells of use in a service is evictor.idle"),
            (["--live", "--table"], "--table: is not of a service"),
            (["loop", "--set", "memory.low=2"], "memory.low"),
            (["loop", "--set", "evictor.idol=unmap"], "evictor.idol"),
        ],
    )
    def test_mistakes(self, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
        assert main(["simulate", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_the_duel_is_not_reopened_by_chance() -> None:
    """In a loop larger than memory both leaders miss alike at first; each change of sides then would cost something."""
    pages = 2048
    of = setting(1024, buffer=64, high=960, low=716, adaptive=True)
    trace = make_trace("loop", pages)[: 12 * pages]
    hard = []
    for pace in (7.5, 10.0, 15.0, 30.0):
        policy = policy_class("auto")(pages, of.reckoned)
        hard.append(replay_live(policy, trace, pages, of, Pace(use=0.0, hard=pace), filled=True).hard)
    assert max(hard) < 1.05 * min(hard), hard

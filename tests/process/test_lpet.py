"""LPET on the live system: every idle source keeps the pages that are used, no write is lost while pages are marked and
evicted, and faults do not wait for evictions.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from regions import inside, settings, wait_until

import dmh
from dmh.bench.work import address, touch_at
from dmh.cli.main import main
from dmh.errors import KernelError
from dmh.evict.idle import choose_source
from dmh.evict.policies import policy_class
from dmh.lspt.states import State
from dmh.lspt.steps import NUMBERS
from dmh.simulate.generators import make_trace
from dmh.simulate.live import Pace, Setting, replay_live
from dmh.simulate.replay import replay

OpenRegion = Callable[..., dmh.Region]


@pytest.fixture(params=["page_idle", "unmap", "buffer", "none"])
def idle(request: pytest.FixtureRequest) -> str:
    try:
        return choose_source(str(request.param), 4096)
    except KernelError as error:
        pytest.skip(str(error))


def test_no_write_is_lost_while_pages_are_marked_and_evicted(open_region: OpenRegion, idle: str) -> None:
    """Every page is added to again and again, in another order each time, with a quarter of them local."""
    region = open_region(
        f"evictor.idle={idle}", "evictor.policy=idle-walk", "memory.limit=512KiB", "evictor.mark_budget=1"
    )
    array = region.empty((512, 512), "u8")
    array[:] = np.arange(512)[:, None]
    rng = np.random.default_rng(7)
    for _ in range(12):
        for page in rng.permutation(512).tolist():
            array[page] += 1
    assert (array == np.arange(512)[:, None] + 12).all()
    stats = region.stats()
    assert stats.idle == idle
    assert stats.counters["evicted"] > 1000
    if idle != "none":
        assert stats.counters["marked"] > 500
    with inside(region) as look:
        look.validate()


def test_pages_in_use_stay_where_use_is_told(open_region: OpenRegion, idle: str) -> None:
    """A hot sixth of memory is used between the steps of a long scan: the cyclic walk spares it, if it can know."""
    if idle == "none":
        pytest.skip("nothing tells of use")
    region = open_region(
        f"evictor.idle={idle}", "evictor.policy=idle-walk", "memory.limit=1MiB", "evictor.buffer=64 pages", "evictor.mark_budget=1",
        "prefetch.enabled=false",
    )  # fmt: skip
    array = region.empty((1024, 4096), "u1")
    array[:] = 1
    region.evict(array)
    before = region.stats().counters["hard"]
    for page in range(40, 1024):
        assert array[page, 0] == 1
        if page % 8 == 0:
            assert array[:40, 0].sum() == 40
    hard = region.stats().counters["hard"] - before
    # Without marks the hot pages leave once in each round of memory: 4 rounds of 40 on top of the scan.
    assert hard < (1024 - 40) + 40 + 60


def test_a_source_that_is_not_there_is_refused_at_the_start(open_region: OpenRegion) -> None:
    try:
        choose_source("page_idle", 4096)
    except KernelError:
        with pytest.raises(KernelError, match=r"evictor\.idle=page_idle.*CONFIG_IDLE_PAGE_TRACKING"):
            open_region("evictor.idle=page_idle")
    else:
        assert open_region("evictor.idle=page_idle").stats().idle == "page_idle"


def test_thresholds_follow_the_fault_rate_where_they_are_fractions(open_region: OpenRegion) -> None:
    region = open_region("memory.limit=1MiB", "prefetch.enabled=false")
    first = region.stats()
    array = region.empty((1024, 4096), "u1")
    array[:] = 1
    busy = region.stats()
    assert busy.high < first.high
    assert busy.low < busy.high
    fixed = open_region("memory.limit=1MiB", "memory.high=240 pages", "memory.low=200 pages")
    other = fixed.empty((1024, 4096), "u1")
    other[:] = 1
    after = fixed.stats()
    assert (after.high, after.low) == (240, 200)


@pytest.mark.parametrize("policy", ["fifo", "auto"])
def test_a_simulated_service_has_the_hard_faults_of_a_live_one(open_region: OpenRegion, idle: str, policy: str) -> None:
    """Within a tenth, in one of three runs: at this size chance decides some of the duel's first rounds.  The plain
    replay, which has all of memory.limit, is further away.
    """
    pages, share = 2048, 0.5
    accesses = make_trace("loop" if policy == "auto" else "zipf", pages)[: 12 * pages]
    overrides = (
        "region.size=16MiB", f"memory.limit={int(share * pages) * 4096}", "memory.low=0.7", "prefetch.enabled=false",
        f"evictor.policy={policy}", f"evictor.idle={idle}",
    )  # fmt: skip
    setting = Setting.of(settings(*overrides), idle)
    for _ in range(3):
        region = open_region(*overrides)
        array = region.empty((pages, 512), "u8")
        array[:] = 1
        region.evict(array)
        before, began = region.stats().counters["hard"], time.monotonic()
        touch_at(address(array), accesses * np.uint64(4096))
        seconds = time.monotonic() - began
        hard = region.stats().counters["hard"] - before

        pace = Pace(use=0.0, hard=1e6 * seconds / hard)
        assert setting.limits.buffer == region.stats().slots
        made = policy_class(policy)(pages, setting.reckoned, accessed=setting.accessed)
        simulated = replay_live(made, accesses, pages, setting, pace, filled=True).hard
        if hard == pytest.approx(simulated, rel=0.1):
            break
    assert hard == pytest.approx(simulated, rel=0.1)
    limit = setting.limits.limit
    made = policy_class(policy)(pages, limit, accessed=setting.accessed)
    ideal = replay(made, accesses, pages, limit, slots=setting.limits.buffer).hard
    assert abs(np.log(hard / simulated)) < abs(np.log(hard / ideal))


def test_bench_policies_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "policies", "--quick", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    simulated = {row["case"]: row["median"] for row in rows if row["subject"] == "default, simulated"}
    live = {row["case"]: row["median"] for row in rows if row["subject"] == "default" and "hard" in row["metric"]}
    assert set(live) == set(simulated) == {"zipf 50%"}
    for case, value in live.items():
        assert value == pytest.approx(simulated[case], rel=0.25)


def test_a_page_that_is_taken_back_before_it_is_written(open_region: OpenRegion) -> None:
    """Its slot is free then, and the next pages of the same batch may be in it when the batch is written."""
    region = open_region("region.size=8MiB", "memory.limit=4MiB", "evictor.buffer=300 pages", "prefetch.enabled=false")
    array = region.empty((600, 512), "u8")
    first = region.offset_of(array) // region.page_size
    array[:] = np.arange(600)[:, None]
    with inside(region) as look:
        raw = look.table.raw
        raw.park = NUMBERS["settled"] + 1
        evicting = threading.Thread(target=region.evict, args=(array,))
        evicting.start()
        wait_until(lambda: raw.parked != 0, "the evictor has captured pages, and written none")
        staged = [page for page in range(600) if look.table.state(first + page) is State.STAGED]
        assert 0 < len(staged) < 600, "the batch has more pages than one group"
        assert (array[staged[0]] == staged[0]).all()  # a soft fault: it is taken back
        raw.parked = 0
        evicting.join()
    for _ in range(2):
        region.evict(array)
        assert (array == np.arange(600)[:, None]).all()

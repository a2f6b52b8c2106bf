"""Read-ahead's guesses: a simulated scan faults at its markers only, and access without a pattern makes no windows."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmh.lspt.states import State
from dmh.native import ffi, lib
from dmh.prefetch.streams import Streams, Window

FIRST_WINDOW, FARTHEST, KEPT = 4, 64, 8


class Scan:
    """Touches pages where every window is there at once and nothing leaves."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self.local: set[int] = set()
        self.brought = 0
        self.faults: list[int] = []

    def touch(self, pages: Iterable[int], thread: int = 1) -> int:
        """Returns how many of them faulted."""
        before = len(self.faults)
        for page in pages:
            if page not in self.local:
                self.faults.append(page)
                self.local.add(page)
                for window in self.streams.observe(thread, page):
                    ahead = {window.first + window.stride * i for i in range(window.pages)}
                    assert 0 < window.pages <= self.streams.limit
                    assert page not in ahead
                    self.brought += len(ahead - self.local)
                    self.local |= ahead
        return len(self.faults) - before


class Bounded(Scan):
    """The same where of what was brought ahead of use only the newest `most` pages stay."""

    def __init__(self, streams: Streams, most: int) -> None:
        super().__init__(streams)
        self.most = most
        self.ahead: deque[int] = deque()

    def touch(self, pages: Iterable[int], thread: int = 1) -> int:
        before = len(self.faults)
        for page in pages:
            known = set(self.local)
            super().touch([page], thread)
            self.ahead.extend(sorted(self.local - known - {page}))
            while len(self.ahead) > self.most:
                self.local.discard(self.ahead.popleft())
        return len(self.faults) - before


@pytest.mark.parametrize("stride", [1, -1, 2, -3, 7, FARTHEST])
def test_a_scan_faults_at_its_markers_only(stride: int) -> None:
    start = 100_000
    touched = [start + stride * i for i in range(10_000)]
    scan = Scan(Streams(limit=256))
    # Two or three to see the stride, six while the window doubles, then one for every 128 pages.
    assert scan.touch(touched) <= 3 + 6 + 10_000 // 128 + 1
    assert len(scan.local) <= 10_000 + 256
    assert all((page - start) % stride == 0 for page in scan.local)


def test_the_next_window_is_asked_for_while_the_program_walks_through_this_one() -> None:
    """After every fault of a scan the pages up to the next marker were asked for at least one fault earlier."""
    streams, page, asked = Streams(limit=64), 1000, dict[int, int]()
    late = 0
    for step in range(40):
        for window in streams.observe(1, page):
            asked |= {window.first + i: step for i in range(window.pages)}
        page += 1
        while page in asked:
            late += step > 8 and asked[page] == step
            page += 1
    assert late == 0


@pytest.mark.parametrize("arrays", [2, 3, 4, KEPT])
def test_interleaved_scans_of_one_thread(arrays: int) -> None:
    """a = b + c * d walks four arrays at once: each is a stream of its own."""
    touched = [base * 1_000_000 + i for i in range(2000) for base in range(arrays)]
    assert Scan(Streams(limit=128)).touch(touched) <= arrays * (3 + 7 + 2000 // 64 + 1)


@pytest.mark.parametrize("arrays", [1, 2, 3, 4, KEPT])
def test_streams_share_what_may_be_ahead(arrays: int) -> None:
    """What leaves in the order in which it came, beyond so many, is still there when the program comes to it."""
    ahead = 384
    scan = Bounded(Streams(limit=256, ahead=ahead), ahead * 4 // 3)
    touched = [base * 1_000_000 + i for i in range(4000) for base in range(arrays)]
    faults = scan.touch(touched)
    window = min(128, ahead // (2 * arrays))
    assert faults <= arrays * (3 + 9 + 4000 // window + 4000 // window // 4), faults
    assert scan.streams.wasted < 0.02 * len(touched)


def test_a_stream_that_has_ended_leaves_its_share_to_the_others() -> None:
    streams = Streams(limit=256, ahead=256)
    scan = Scan(streams)
    scan.touch(base * 1_000_000 + i for i in range(1000) for base in range(4))
    before = len(scan.faults)
    scan.touch(range(5_000_000, 5_006_000))
    # At first its windows are a quarter; 16 markers later it has all of it.
    assert len(scan.faults) - before <= 3 + 5 + 16 + 6000 // 128


def test_interleaved_scans_in_both_directions() -> None:
    touched = [page for i in range(1000) for page in (10_000 + i, 900_000 - i, 500_000 + 5 * i)]
    assert Scan(Streams(limit=64)).touch(touched) <= 3 * (3 + 6 + 1000 // 32 + 1)


def test_at_least_95_percent_of_a_scan_is_there_before_it_is_asked_for() -> None:
    for pattern in (range(5000), range(5000, 0, -1), range(0, 15_000, 3)):
        scan = Scan(Streams(limit=256))
        assert scan.touch(pattern) < 0.05 * len(pattern)


@pytest.mark.parametrize("pages", [2_000, 100_000])
def test_random_access_wastes_little(pages: int) -> None:
    generator = random.Random(7)
    scan = Scan(Streams(limit=256))
    for _ in range(20):  # of which at most a tenth is local at a time
        scan.local.clear()
        scan.touch(generator.sample(range(pages), pages // 10))
    assert scan.brought < 0.05 * len(scan.faults)


def test_zipf_access_wastes_little() -> None:
    generator = np.random.default_rng(3)
    ranks = np.arange(1, 20_001) ** -0.99
    order = generator.permutation(20_000)
    touched = order[generator.choice(20_000, 40_000, p=ranks / ranks.sum())]
    scan = Scan(Streams(limit=256))
    for first in range(0, len(touched), 4000):
        scan.local.clear()
        scan.touch(touched[first : first + 4000].tolist())
    assert scan.brought < 0.05 * len(scan.faults)


def test_short_runs_teach_to_read_a_short_way_ahead() -> None:
    """Records of 24 pages at random places: what is brought in beyond their ends becomes less."""
    generator = random.Random(5)
    starts = [100 * place for place in generator.sample(range(100_000), 600)]
    scan = Scan(Streams(limit=256))
    beyond = []
    for start in starts:
        scan.touch(range(start, start + 24))
        beyond.append(len(scan.local & set(range(start + 24, start + 100))))
    assert sum(beyond[-100:]) < 0.7 * sum(beyond[:10]) * 10
    assert sum(beyond[-100:]) <= 0.5 * 24 * 100


def test_a_limit_of_zero_reads_nothing_ahead() -> None:
    streams = Streams(limit=0)
    assert [streams.observe(1, page) for page in range(100)] == [[]] * 100


@pytest.mark.parametrize(("limit", "most"), [(1, 52), (2, 52), (3, 52), (4, 52), (8, 30)])
def test_a_narrow_limit(limit: int, most: int) -> None:
    assert Scan(Streams(limit)).touch(range(100)) <= most


def test_threads_do_not_disturb_each_other() -> None:
    streams, one_thread = Streams(limit=32), Streams(limit=32)
    alone = [one_thread.observe(1, page) for page in (5, 6)]
    together = [(streams.observe(1, page), streams.observe(2, 1000 * page))[0] for page in (5, 6)]
    assert together == alone
    assert streams.observe(3, 7) == []  # what thread 1 did is no hint for thread 3


def test_the_window_collapses_when_the_scan_ends() -> None:
    scan = Scan(Streams(limit=256))
    scan.touch(range(1000))
    assert scan.streams.observe(1, 500_000) == []
    assert [window.pages for window in scan.streams.observe(1, 500_001)] == [FIRST_WINDOW - 1]


def test_a_scan_that_was_cut_short_goes_on() -> None:
    """Less than the window came, for want of room, or left again: the fault before the marker asks again, for half."""
    streams = Streams(limit=64)
    for page in (0, 1, 5, 13):
        windows = streams.observe(1, page)
    assert windows == [Window(14, 1, 15), Window(30, 1, 15)]
    assert streams.observe(1, 17) == []
    assert streams.observe(1, 18) == [Window(19, 1, 7), Window(27, 1, 7)]
    # Before the second fault 3 + 7 pages had been used, and since 4 of the 30 that were asked for after the last marker.
    assert (streams.used, streams.wasted) == (3 + 7 + 4, 26)


def test_a_scan_that_has_walked_through_local_pages_goes_on() -> None:
    """It faults nowhere there, so no fault before this one could vote for it."""
    streams, words = Streams(limit=64), np.full(1000, State.STORED, np.uint64)
    windows, outlook = ffi.new("struct dmh_window[2]"), ffi.new("struct dmh_outlook *")
    outlook.words, outlook.pages = ffi.from_buffer("uint64_t[]", words), len(words)

    def observe(page: int) -> list[tuple[int, int]]:
        n = lib.dmh_streams_observe(streams.pointer, 1, page, outlook, windows)
        return [(w.first, w.count) for w in windows[0:n]]

    for page in (0, 1, 5, 13):
        observe(page)
    words[14:600] = State.RESIDENT
    words[400] = State.STORED
    assert observe(601) == []  # it cannot have come there: page 400 would have faulted
    words[400] = State.RESIDENT
    assert observe(600) == [(601, 15), (617, 15)]


def test_a_scan_that_began_among_local_pages_is_one_stream() -> None:
    """Where every third page is missing it looks like a strided one; several of those would share it for ever after."""
    streams, words = Streams(limit=256, ahead=384), np.full(20_000, State.STORED, np.uint64)
    windows, outlook = ffi.new("struct dmh_window[2]"), ffi.new("struct dmh_outlook *")
    outlook.words, outlook.pages = ffi.from_buffer("uint64_t[]", words), len(words)
    words[:3000] = State.RESIDENT
    words[0:3000:3] = State.STORED
    faults, asked = [], 0
    for page in range(16_000):
        if words[page] == State.RESIDENT:
            continue
        faults.append(page)
        words[page] = State.RESIDENT
        for window in windows[0 : max(lib.dmh_streams_observe(streams.pointer, 1, page, outlook, windows), 0)]:
            words[window.first : window.first + window.stride * window.count : window.stride] = State.RESIDENT
            asked += window.count
    late = [page for page in faults if page >= 4000]
    assert len(late) <= 12_000 // 128 + 4, len(late)
    assert asked < 1.2 * 16_000


def test_a_page_that_is_local_is_no_marker() -> None:
    """It would not fault, and the scan would run into pages that nobody asked for."""
    streams = Streams(limit=64)
    words = np.full(1000, State.STORED, np.uint64)
    words[29:32] = State.RESIDENT
    windows = ffi.new("struct dmh_window[2]")
    outlook = ffi.new("struct dmh_outlook *")
    outlook.words, outlook.pages = ffi.from_buffer("uint64_t[]", words), len(words)
    for page in (0, 1, 5, 13):
        n = lib.dmh_streams_observe(streams.pointer, 1, page, outlook, windows)
    assert [(w.first, w.count) for w in windows[0:n]] == [(14, 15), (33, 15)]  # the marker is page 32


def test_a_fault_in_a_window_that_is_still_to_come_waits_behind_it() -> None:
    streams = Streams(limit=64)
    windows, outlook, completed = (
        ffi.new("struct dmh_window[2]"),
        ffi.new("struct dmh_outlook *"),
        ffi.new("uint64_t[4]"),
    )
    outlook.completed = completed
    completed[2] = 6

    def observe(page: int) -> int:
        return int(lib.dmh_streams_observe(streams.pointer, 1, page, outlook, windows))

    assert [observe(page) for page in (0, 1)] == [0, 1]
    lib.dmh_streams_given(streams.pointer, 2, 7)
    assert [observe(page) for page in (2, 3, 4)] == [-2, -2, -2]
    assert observe(900) == 0  # another page has nothing to do with it
    completed[2] = 7
    assert observe(2) == 1  # it did not come: it is asked for again


def test_forgotten_threads_leave_room_for_new_ones() -> None:
    streams = Streams(limit=8)
    for thread in range(1, 5000):
        streams.observe(thread, thread * 1000)
        assert streams.observe(thread, thread * 1000 + 1) != []


def test_the_thread_that_faults_most_recently_is_remembered() -> None:
    """A scan must survive thousands of other threads that fault once each while it goes on."""
    scan = Scan(Streams(limit=256))
    scan.touch(range(1000))
    for other in range(3000):
        scan.streams.observe(10 + other, other * 5000)
        scan.touch(range(1000 + other * 10, 1010 + other * 10))
    assert len(scan.faults) <= 9 + 31_000 // 128 + 1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 300)), max_size=300), st.integers(0, 40))
def test_any_faults_give_sane_windows(seen: list[tuple[int, int]], limit: int) -> None:
    streams = Streams(limit)
    asked = 0
    for thread, page in seen:
        windows = streams.observe(thread, page)
        assert len(windows) <= 2
        for window in windows:
            assert 0 < window.pages <= limit
            assert 1 <= abs(window.stride) <= FARTHEST
            assert (window.first - page) % window.stride == 0
            assert 0 < (window.first - page) // window.stride <= 2 * limit + KEPT
            asked += window.pages
    assert streams.used + streams.wasted <= asked

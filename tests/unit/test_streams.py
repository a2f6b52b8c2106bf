"""Read-ahead's guesses: a simulated scan faults where its window ends, and random access makes no windows."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmh.prefetch.streams import FIRST_WINDOW, MAX_STRIDE, STREAMS, THREADS, Streams


def faults(streams: Streams, touched: Iterable[int], thread: int = 1) -> tuple[int, set[int]]:
    """Touch pages where every window is brought in at once and nothing leaves; returns (faults, pages brought in)."""
    local: set[int] = set()
    count = 0
    for page in touched:
        if page in local:
            continue
        count += 1
        stride, window = streams.observe(thread, page)
        assert 0 <= window <= streams.limit
        local |= {page, *(page + stride * (i + 1) for i in range(window))}
    return count, local


@pytest.mark.parametrize("stride", [1, -1, 2, -3, 7, MAX_STRIDE])
def test_a_scan_faults_once_a_window(stride: int) -> None:
    start = 100_000
    touched = [start + stride * i for i in range(10_000)]
    count, local = faults(Streams(limit=256), touched)
    # Two or three to see the stride, six while the window doubles, then one for every 257 pages.
    assert count <= 3 + 7 + 10_000 // 257 + 1
    assert len(local) <= 10_000 + 256
    if abs(stride) > 1:
        assert all((page - start) % stride == 0 for page in local)


@pytest.mark.parametrize("arrays", [2, 3, 4, STREAMS])
def test_interleaved_scans_of_one_thread(arrays: int) -> None:
    """a = b + c * d walks four arrays at once: each is a stream of its own."""
    touched = [base * 1_000_000 + i for i in range(2000) for base in range(arrays)]
    count, _ = faults(Streams(limit=128), touched)
    assert count <= arrays * (3 + 7 + 2000 // 129 + 1)


def test_interleaved_scans_in_both_directions() -> None:
    touched = [page for i in range(1000) for page in (10_000 + i, 900_000 - i, 500_000 + 5 * i)]
    count, _ = faults(Streams(limit=64), touched)
    assert count <= 3 * (3 + 6 + 1000 // 65 + 1)


def test_random_access_makes_no_windows() -> None:
    chosen = random.Random(7).sample(range(1 << 30), 3000)
    streams = Streams(limit=256)
    assert (
        sum(streams.observe(1, page)[1] for page in chosen) <= FIRST_WINDOW * 3
    )  # a coincidence in a gigapage is rare


def test_a_limit_of_zero_reads_nothing_ahead() -> None:
    streams = Streams(limit=0)
    assert {streams.observe(1, page) for page in range(100)} == {(1, 0)}


def test_a_limit_of_one_page() -> None:
    count, _ = faults(Streams(limit=1), range(100))
    assert count <= 52


def test_threads_do_not_disturb_each_other() -> None:
    streams, one_thread = Streams(limit=32), Streams(limit=32)
    alone = [one_thread.observe(1, page) for page in (5, 6)]
    together = [(streams.observe(1, page), streams.observe(2, 1000 * page))[0] for page in (5, 6)]
    assert together == alone
    assert streams.observe(3, 7) == (1, 0)  # what thread 1 did is no hint for thread 3


def test_the_window_collapses_when_the_scan_ends() -> None:
    streams = Streams(limit=256)
    for page in (0, 1, 6, 15, 32):
        _, window = streams.observe(1, page)
    assert window == 32
    assert streams.observe(1, 500_000) == (1, 0)
    assert streams.observe(1, 500_001) == (1, FIRST_WINDOW)


def test_a_scan_that_was_cut_short_goes_on() -> None:
    """The resolver brings in less than the window where there is no room: the fault before the expected page is no
    surprise.
    """
    streams = Streams(limit=64)
    for page in (0, 1, 6):
        streams.observe(1, page)
    stride, window = streams.observe(1, 9)
    assert stride == 1
    assert window > 8


def test_forgotten_threads_do_not_pile_up() -> None:
    streams = Streams(limit=8)
    for thread in range(THREADS + 500):
        streams.observe(thread, thread * 1000)
    assert len(streams._threads) <= THREADS


def test_the_thread_that_faults_most_recently_is_remembered() -> None:
    """A scan must survive a thousand other threads that fault once each while it goes on."""
    streams = Streams(limit=256)
    page, window = 0, 0
    for other in range(3 * THREADS):
        stride, window = streams.observe(1, page)
        page += stride * (window + 1)
        streams.observe(10 + other, other * 5000)
    assert window == 256


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 300)), max_size=300), st.integers(0, 40))
def test_any_faults_give_sane_windows(seen: list[tuple[int, int]], limit: int) -> None:
    streams = Streams(limit)
    for thread, page in seen:
        stride, window = streams.observe(thread, page)
        assert 0 <= window <= limit
        assert 1 <= abs(stride) <= MAX_STRIDE
        for state in streams._threads.values():
            assert len(state.streams) <= STREAMS
            for stream in state.streams:
                assert stream.expected == stream.last + stream.stride * (stream.window + 1)

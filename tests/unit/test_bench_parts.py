"""The benchmarks' pure parts: what words hold, what runs must find, rows, the search for a control group."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmh.bench.cgroup import hierarchies
from dmh.bench.mapped import why_no_swap
from dmh.bench.rows import Row, interleave, not_measured, summarize
from dmh.bench.subject import MismatchError, verify
from dmh.bench.words import CHUNK, FACTOR, MASK, Script, fill, total, uniform, value, zipf


class TestWords:
    def test_filled_words_are_what_value_and_total_say(self) -> None:
        words = np.empty(CHUNK + 1000, np.uint64)
        fill(words)
        numbers = np.array([0, 1, CHUNK - 1, CHUNK, len(words) - 1], np.uint64)
        assert words[numbers].tolist() == value(numbers).tolist() == [int(n) * FACTOR & MASK for n in numbers]
        assert int(words.sum()) == total(0, len(words))
        assert int(words[700:90_000].sum()) == total(700, 90_000)

    @given(
        st.lists(st.tuples(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.booleans()), min_size=1, max_size=4)
    )
    def test_a_script_knows_what_every_run_finds(self, runs: list[tuple[list[int], bool]]) -> None:
        script = Script(7)
        words = [i * FACTOR for i in range(7)]
        for numbers, write in runs:
            plan = script.run(np.array(numbers, np.uint64), write=write)
            found = 0
            for i, number in enumerate(numbers):
                found += words[number]
                if write and i % 2:
                    words[number] += 1
            assert plan.expected == found & MASK
        assert script.total() == sum(words) & MASK

    def test_popular_pages_follow_zipf(self, rng: np.random.Generator) -> None:
        pages = zipf(rng, 1000, 8, 200_000, 0.99) // np.uint64(8)
        counts = np.sort(np.bincount(pages.astype(np.int64), minlength=1000))[::-1]
        assert counts[0] / counts[9] == pytest.approx(10**0.99, rel=0.1)
        assert counts[0] / len(pages) == pytest.approx(1 / (1 / np.arange(1, 1001) ** 0.99).sum(), rel=0.05)

    def test_uniform_accesses_stay_within(self, rng: np.random.Generator) -> None:
        numbers = uniform(rng, 10, 1000)
        assert set(numbers.tolist()) == set(range(10))

    def test_a_wrong_sum_is_an_error(self) -> None:
        with pytest.raises(MismatchError, match="dmh: the words that were read"):
            verify("dmh", 1, 2)


class TestRows:
    def test_subjects_run_in_turn_after_a_round_that_is_not_counted(self) -> None:
        turns: list[str] = []

        def subject(name: str, figure: float):
            def turn() -> np.ndarray:
                turns.append(name)
                return np.array([figure])

            return turn

        results = interleave({"a": subject("a", 1.0), "b": subject("b", 2.0)}, 2, lambda text: None)
        assert turns == ["a", "b", "b", "a", "a", "b"]
        assert [len(results[name]) for name in "ab"] == [2, 2]

    def test_ratio_spread_and_percentile(self) -> None:
        results = {
            "floor": [np.array([1.0, 1.0, 1.0])],
            "dmh": [np.array([2.0, 3.0, 4.0]), np.array([3.0, 4.0, 5.0])],
        }
        floor, dmh, swap = summarize("b", "c", "m", "µs", results, "floor", missing={"swap": "there is none"})
        assert (floor.ratio, floor.baseline, floor.spread) == (None, None, 0)
        assert (dmh.median, dmh.ratio, dmh.baseline, dmh.runs) == (3.5, 3.5, "floor", 2)
        assert dmh.spread == pytest.approx(1 / 3.5)
        assert dmh.p99 == pytest.approx(4.95)
        assert (swap.median, swap.runs, swap.note) == (None, 0, "there is none")

    def test_of_a_rate_the_low_end_counts(self) -> None:
        (row,) = summarize("b", "c", "m", "1/s", {"dmh": [np.arange(101.0)]}, "floor", rate=True)
        assert row.p99 == 1.0

    def test_rows_survive_the_wire(self) -> None:
        row = not_measured("b", "c", "swap", "m", "µs", "why")
        assert Row.from_wire(row.to_wire()) == row


class TestWhereAGroupCanBeMade:
    V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
    V2 = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:3 - cgroup2 cgroup2 rw"

    def test_version_1_and_2_the_own_group_first(self) -> None:
        found = hierarchies(f"{self.V1}\n{self.V2}", "4:memory:/user/me\n0::/slice/one")
        assert [(one.version, [str(place) for place in one.places]) for one in found] == [
            (2, ["/sys/fs/cgroup/unified/slice/one", "/sys/fs/cgroup/unified"]),
            (1, ["/sys/fs/cgroup/memory/user/me", "/sys/fs/cgroup/memory"]),
        ]

    def test_other_controllers_are_none(self) -> None:
        assert hierarchies(self.V1.replace("rw,memory", "rw,cpu"), "1:cpu:/") == []

    def test_a_container_sees_its_part_of_the_hierarchy(self) -> None:
        (found,) = hierarchies(self.V1.replace(" / /sys", " /docker/x /sys"), "4:memory:/docker/x/inner")
        assert str(found.places[0]) == "/sys/fs/cgroup/memory/inner"


def test_swap_is_used_only_where_it_suffices() -> None:
    meminfo = "MemTotal: 100 kB\nSwapTotal: {} kB\nSwapFree: {} kB"
    assert why_no_swap(1 << 20, meminfo.format(0, 0)) == "this machine has no swap"
    assert why_no_swap(1 << 20, meminfo.format(4096, 1024)) is None
    assert "would be needed" in (why_no_swap(2 << 20, meminfo.format(4096, 1024)) or "")

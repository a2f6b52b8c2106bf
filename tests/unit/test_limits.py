"""The memory settings in pages: the rounding rules, the invariants, and what contradicts itself."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dmh.config import Amount, Config, Limits
from dmh.config.limits import contradictions
from dmh.errors import ConfigError

KIB = 1024


def config(limit: object, *, page_size: int = 4096, size: int = 1 << 40, **settings: Any) -> Config:
    """A configuration; keyword arguments such as high=0.9, buffer=..., window=... go to their sections."""
    of_section = {"high": "memory", "low": "memory", "buffer": "evictor", "batch": "evictor"}
    raw: dict[str, dict[str, Any]] = {
        "region": {"size": size, "page_size": page_size},
        "memory": {"limit": limit},
        "store": {"url": "memory:"},
    }
    for key, value in settings.items():
        raw.setdefault(of_section.get(key, "prefetch"), {})[key] = value
    return Config.model_validate(raw)


def refused(configuration: Config) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Limits.of(configuration)
    return list(caught.value.problems)


# -- known values --


@pytest.mark.parametrize(
    ("limit", "buffer", "resident_max", "high", "low", "window", "batch"),
    [
        (8, 1, 7, 7, 6, 0, 1),
        (9, 1, 8, 8, 7, 1, 1),
        (16, 1, 15, 15, 14, 1, 1),
        (100, 6, 94, 94, 88, 11, 6),
        (262144, 5242, 256902, 256901, 230686, 1024, 256),
    ],
)
def test_defaults(limit: int, buffer: int, resident_max: int, high: int, low: int, window: int, batch: int) -> None:
    expected = Limits(limit, buffer, resident_max, high, low, window, batch)
    assert Limits.of(config(limit * 4096)) == expected


def test_the_references_thresholds() -> None:
    limits = Limits.of(config(40 * 4096, high="20 pages", low="10 pages", buffer="20 pages", batch=64))
    assert limits == Limits(limit=40, buffer=20, resident_max=20, high=20, low=10, window=2, batch=20, adaptive=False)
    limits = Limits.of(config("32KiB", high="4 pages", low="2 pages"))
    assert (limits.high, limits.low) == (4, 2)


def test_a_limit_that_is_no_whole_number_of_pages_is_rounded_down() -> None:
    assert Limits.of(config(9 * 65536 - 1, page_size=65536)).limit == 8


def test_sizes_are_rounded_down_to_pages() -> None:
    limits = Limits.of(config(1 << 20, page_size=65536, high=15 * 65536 - 1, low=9 * 65536 + 1, buffer="300KiB"))
    assert (limits.limit, limits.high, limits.low, limits.buffer) == (16, 14, 9, 4)


def test_thresholds_less_than_a_page_apart_stay_apart() -> None:
    assert Limits.of(config(40 * 4096, high=81921, low=81920)).low == 19
    limits = Limits.of(config(40 * 4096, high=0.501, low=0.5))
    assert (limits.high, limits.low) == (20, 19)


def test_tiny_fractions_are_raised_to_what_works() -> None:
    limits = Limits.of(config(8 * 4096, high=0.01, low=0.001, buffer=0.001))
    assert (limits.high, limits.low, limits.buffer) == (2, 1, 1)


def test_the_window() -> None:
    assert Limits.of(config(1 << 30, window="10 pages")).window == 10
    assert Limits.of(config(1 << 30, window=40 * KIB + 1)).window == 10
    assert Limits.of(config(1 << 30, window="10 pages", enabled=False)).window == 0
    assert Limits.of(config(100 * 4096, window="50 pages")).window == 11
    # 1 MiB of 2 MiB pages: reading ahead is on, so it is one page.
    assert Limits.of(config(1 << 30, window=1 << 20, page_size=2 << 20)).window == 1


# -- contradictions --


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"limit": 8 * 4096 - 1},
            "memory.limit: must be at least 8 pages, 32KiB with region.page_size 4KiB, is 32767B",
        ),
        (
            {"page_size": 2 << 20},
            "memory.limit: must be at least 8 pages, 16MiB with region.page_size 2MiB, is 1MiB",
        ),
        (
            {"size": 1 << 19},
            "memory.limit: must be at most region.size (512KiB), is 1MiB: with the limit above the region nothing "
            "would ever be paged; lower the limit or enlarge the region",
        ),
        (
            {"size": (1 << 20) + 1},
            "region.size: must be a multiple of region.page_size (4KiB), is 1048577B: the nearest are 1MiB and 1028KiB",
        ),
        ({"low": 0.9, "high": 0.9}, "memory.low: must be below memory.high (0.9), is 0.9"),
        ({"low": "9 pages", "high": "8 pages"}, "memory.low: must be below memory.high (8 pages), is 9 pages"),
        ({"low": "64 pages", "high": 0.25}, "memory.low: must be below memory.high (0.25 = 64 pages), is 64 pages"),
        (
            {"low": "252KiB", "high": "60 pages"},
            "memory.low: must be below memory.high (60 pages), is 252KiB = 63 pages",
        ),
        ({"high": "257 pages"}, "memory.high: must be from 2 to 256 pages of 4KiB (memory.limit), is 257 pages"),
        ({"high": "1 page"}, "memory.high: must be from 2 to 256 pages of 4KiB (memory.limit), is 1 page"),
        (
            {"high": 20},
            'memory.high: must be from 2 to 256 pages of 4KiB (memory.limit), is 20B: for pages write "20 pages"',
        ),
        (
            {"low": 4095},
            'memory.low: must be from 1 to 256 pages of 4KiB (memory.limit), is 4095B: for pages write "4095 pages"',
        ),
        (
            {"buffer": 0.5},
            "evictor.buffer: must be below 0.5 of memory.limit, is 0.5: the rest is for the program's pages; to give "
            'it more all the same, write a size or a page count such as "20 pages"',
        ),
        (
            {"buffer": "255 pages"},
            "evictor.buffer: must be from 1 to 254 pages of 4KiB (2 fewer than memory.limit), is 255 pages",
        ),
        (
            {"buffer": "1MiB"},
            "evictor.buffer: must be from 1 to 254 pages of 4KiB (2 fewer than memory.limit), is 1MiB",
        ),
    ],
)
def test_contradictions(settings: dict[str, Any], message: str) -> None:
    assert refused(config(**{"limit": 1 << 20, **settings})) == [message]


def test_bounds_that_just_hold() -> None:
    Limits.of(config(8 * 4096, size=8 * 4096)).validate()
    assert Limits.of(config(1 << 20, buffer="254 pages")).resident_max == 2
    assert Limits.of(config(1 << 20, high="256 pages", low="255 pages")).high == 256
    assert Limits.of(config(1 << 20, high="2 pages", low="1 page")).low == 1


def test_several_at_once() -> None:
    told = refused(config(1 << 20, size=(1 << 19) + 1, low=0.9, high=0.8, buffer="256 pages"))
    assert [line.split(":")[0] for line in told] == ["region.size", "memory.limit", "evictor.buffer", "memory.low"]


def test_checks_leave_out_what_is_unusable() -> None:
    wrong = config(1 << 20, size=(1 << 19) + 1, low="9 pages", high=0.01, buffer="256 pages")

    def concerned(*unusable: str) -> list[str]:
        return [problem.settings[0] for problem in contradictions(wrong, unusable)]

    assert concerned() == ["region.size", "memory.limit", "evictor.buffer", "memory.low"]
    assert concerned("region.size") == ["evictor.buffer", "memory.low"]
    assert concerned("region.page_size") == ["memory.limit"]
    assert concerned("memory.limit") == ["region.size"]
    assert concerned("memory.high", "evictor.buffer") == ["region.size", "memory.limit"]
    assert list(contradictions(config(1 << 20, buffer=0.7), ["evictor.buffer"])) == []


# -- properties --

fractions = st.floats(0, 1, exclude_min=True).map(lambda value: Amount(value, "fraction"))
page_counts = st.integers(1, 5000).map(lambda value: Amount(value, "pages"))
byte_counts = st.integers(1, 5000 * 4096).map(lambda value: Amount(value, "bytes"))
amounts = fractions | page_counts | byte_counts
page_sizes = st.integers(12, 21).map(lambda bits: 1 << bits)


@given(
    page_size=page_sizes,
    limit=st.integers(1, 1 << 36),
    region_pages=st.integers(1, 1 << 24),
    high=amounts,
    low=amounts,
    buffer=amounts,
    batch=st.integers(1, 4096),
    window=page_counts | byte_counts,
    enabled=st.booleans(),
)
def test_any_settings_give_good_limits_or_a_config_error(
    page_size: int, limit: int, region_pages: int, **settings: Any
) -> None:
    subject = config(limit, page_size=page_size, size=region_pages * page_size, **settings)
    try:
        limits = Limits.of(subject)
    except ConfigError as error:
        told = error.problems
    else:
        limits.validate()
        return
    assert told == tuple(f"{problem.settings[0]}: {problem.message}" for problem in contradictions(subject))


@given(data=st.data(), page_size=page_sizes, limit=st.integers(8, 1 << 20), spare=st.integers(0, 4095))
def test_valid_settings_are_accepted_and_rounded_as_stated(
    data: st.DataObject, page_size: int, limit: int, spare: int
) -> None:
    def amount(least: int, most: int, upper: float = 1.0) -> Amount:
        """An amount that is itself fine: pages or bytes from `least` to `most` pages, or a fraction up to `upper`."""
        return data.draw(
            st.one_of(
                st.floats(0, upper, exclude_min=True, exclude_max=upper < 1).map(lambda f: Amount(f, "fraction")),
                st.integers(least, most).map(lambda n: Amount(n, "pages")),
                st.integers(least * page_size, most * page_size).map(lambda n: Amount(n, "bytes")),
            )
        )

    high, low, buffer = amount(2, limit), amount(1, limit), amount(1, limit - 2, 0.5)
    limit_bytes = limit * page_size + spare % page_size

    def exact(written: Amount) -> Fraction:
        """In bytes, by a way of its own."""
        factor = {"fraction": limit_bytes, "pages": page_size, "bytes": 1}[written.unit]
        return Fraction(str(written.value)) * factor

    def least_or(pages: int, written: Amount) -> Fraction:
        least = Fraction(pages * page_size)
        return least if exact(written) < least else exact(written)

    assume(exact(low) < exact(high))
    limits = Limits.of(config(limit_bytes, size=1 << 42, page_size=page_size, high=high, low=low, buffer=buffer))
    limits.validate()
    assert limits.limit == limit
    for pages, written, least in ((limits.high, high, 2), (limits.buffer, buffer, 1)):
        # Never above what was written, save for the least that works; never a page or more below it.
        assert pages * page_size <= least_or(least, written)
        assert (pages + 2) * page_size > exact(written)
    assert limits.low * page_size <= least_or(1, low)
    assert limits.low == limits.high - 1 or (limits.low + 2) * page_size > exact(low)
    if buffer.unit == "fraction":
        assert limits.buffer < limit / 2


@given(page_size=page_sizes, limit=st.integers(8, 1 << 24))
def test_the_defaults_work_at_every_limit(page_size: int, limit: int) -> None:
    limits = Limits.of(config(limit * page_size, page_size=page_size, size=min(page_size << 31, 1 << 46)))
    limits.validate()
    # Otherwise the region would be full before eviction started.
    assert limits.high <= limits.resident_max

"""The configuration: what is accepted, and that every mistake is told at once, where it stands, with its mend."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import dmh.cli.config as cli
from dmh.config import (
    IDLE_SOURCES,
    POLICIES,
    Amount,
    Config,
    Limits,
    config_schema,
    format_duration,
    format_size,
    load,
    loads,
    parse_duration,
    parse_size,
    store_schemes,
    without_password,
)
from dmh.errors import ConfigError, DmhError, ProtocolError

SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
# pydantic says by a warning that a value is not of its declared type.
pytestmark = pytest.mark.filterwarnings("error")

SCHEMES = ("file", "memory", "redis", "rediss", "unix")

MINIMAL = """\
region:
  size: 1GiB
memory:
  limit: 64MiB
store:
  url: file:///var/tmp/x
"""


@pytest.fixture(autouse=True)
def _schemes(monkeypatch: pytest.MonkeyPatch) -> None:
    # These tests are about the configuration; which stores are installed must not decide them.
    monkeypatch.setattr(sys.modules["dmh.config.loader"], "store_schemes", lambda: SCHEMES)


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loads(text, overrides, name="c.yaml")
    assert isinstance(caught.value, DmhError)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)


def problem(text: str, *overrides: str) -> str:
    (only,) = problems(text, *overrides)
    return only


def with_(section: str, *lines: str) -> str:
    """MINIMAL with more lines at the end of a section, or a section more."""
    extra = "".join(f"  {line}\n" for line in lines)
    if f"{section}:\n" not in MINIMAL:
        return f"{MINIMAL}{section}:\n{extra}"
    head, found, tail = MINIMAL.partition(f"{section}:\n")
    first, newline, rest = tail.partition("\n")
    return head + found + first + newline + extra + rest


# -- what is accepted --


def test_defaults() -> None:
    config = loads(MINIMAL)
    assert config.model_dump() == {
        "region": {"name": "dmh", "size": 1 << 30, "page_size": 4096, "seal": False, "fork": "auto"},
        "memory": {"limit": 64 << 20, "high": 0.98, "low": 0.88},
        "workers": {"resolvers": 2, "inline": True, "spin_us": "auto", "cpus": "auto"},
        "evictor": {"policy": "auto", "idle": "auto", "buffer": 0.02, "mark_budget": 0.1, "batch": 256},
        "prefetch": {"enabled": True, "window": "4MiB"},
        "store": {"url": "file:///var/tmp/x", "timeout": 30.0, "on_failure": "wait", "encrypt": "none"},
        "service": {"grace": 5.0, "grace_launcher": 600.0, "metrics": "off"},
        "record": {"file": "", "max_size": 1 << 30},
    }
    assert POLICIES == ("auto", "clock", "duel", "fifo", "idle-walk", "lirs", "pgr", "random", "s3fifo")
    assert IDLE_SOURCES == ("auto", "page_idle", "unmap", "buffer", "none")


def test_every_setting_can_be_written() -> None:
    config = loads("""
region: {name: a.b_C-1, size: 2 GiB, page_size: 64KiB, seal: yes}
memory: {limit: 100MB, high: 80 MiB, low: 20 pages}
workers: {resolvers: 64, inline: off, spin_us: 1000, cpus: [0, 3]}
evictor: {policy: idle-walk, idle: buffer, buffer: 5 pages, batch: 4096}
prefetch: {enabled: false, window: 1 page}
store: {url: "memory:", timeout: 250ms, on_failure: poison}
""")
    assert (config.region.name, config.region.size, config.region.page_size) == ("a.b_C-1", 2 << 30, 65536)
    assert config.region.seal is True
    assert config.memory.limit == 100_000_000
    assert (config.memory.high, config.memory.low) == (Amount(80 << 20, "bytes"), Amount(20, "pages"))
    assert (config.workers.resolvers, config.workers.inline, config.workers.spin_us) == (64, False, 1000)
    assert config.workers.cpus == (0, 3)
    assert (config.evictor.policy, config.evictor.buffer, config.evictor.batch) == (
        "idle-walk",
        Amount(5, "pages"),
        4096,
    )
    assert config.prefetch.window == Amount(1, "pages")
    assert not config.prefetch.enabled
    assert (config.store.url, config.store.timeout, config.store.on_failure) == ("memory:", 0.25, "poison")


def test_an_empty_section_means_its_defaults() -> None:
    assert loads(MINIMAL + "evictor:\nprefetch: {}\n") == loads(MINIMAL)


def test_a_name_that_looks_like_a_date_is_text() -> None:
    assert loads(with_("region", "name: 2026-11-23")).region.name == "2026-11-23"


def test_it_is_frozen() -> None:
    config = loads(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.memory.limit = 5


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("TMPDIR", "HOME", "REDIS_PASSWORD"):
        monkeypatch.delenv(variable, raising=False)
    config = load(path)
    limits = Limits.of(config)
    limits.validate()
    assert limits.high <= limits.resident_max
    assert config.memory.limit * 4 <= config.region.size


def test_shipped_configs_are_the_three_and_quickstart_holds_the_example() -> None:
    assert [path.name for path in SHIPPED] == ["quickstart.yaml", "redis.yaml", "stress.yaml"]
    assert load(SHIPPED[0]).region.size > 20_000 * 20_000 * 8


# -- sizes, durations, amounts --


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1), (4096, 4096), ("4096", 4096), ("17B", 17), ("1KiB", 1024), ("4GiB", 4 << 30), ("512 MiB", 512 << 20),
        ("1.5GiB", 3 << 29), ("2TiB", 2 << 40), ("100MB", 10**8), ("1kB", 1000), ("3GB", 3 * 10**9),
        ("1 TB ", 10**12), ("0.1kB", 100),
    ],
)  # fmt: skip
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("4G", "write 4GiB (powers of 1024) or 4GB (powers of 1000)"),
        ("1k", "write 1KiB (powers of 1024) or 1kB (powers of 1000)"),
        ("4gib", "write 4GiB"),
        ("4KB", "write 4kB"),
        ("4 apples", "the units are B, KiB"),
        ("0.3KiB", "whole number of bytes"),
        (0, "at least one byte"),
        ("-4KiB", "must be a size"),
        (4.0, "must be a size"),
        ("4e9", "must be a size"),
        ("9" * 5000, "must be a size"),
        (True, "is true"),
        (None, "is empty"),
        ([], "is []"),
        ("", "must be a size"),
    ],
)
def test_sizes_refused_with_a_mend(text: object, hint: str) -> None:
    with pytest.raises(ValueError, match=r"^must be a size such as ") as caught:
        parse_size(text)
    assert hint in str(caught.value)
    assert len(str(caught.value)) < 250


@given(st.integers(1, 2**60))
def test_a_size_reads_back_as_it_is_shown(size: int) -> None:
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("30s", 30), ("5min", 300), ("1.5 h", 5400), (30, 30), (0.5, 0.5), ("2", 2), ("24h", 86400)],
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds
    assert parse_duration(format_duration(seconds)) == seconds


@pytest.mark.parametrize(
    "text", [0, -1, "0s", "25h", "0.5ms", float("nan"), float("inf"), True, None, "1d", "soon", "-5s", [1]]
)
def test_durations_refused(text: object) -> None:
    with pytest.raises(ValueError, match="must be a duration from 1ms to 24h"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        (0.94, Amount(0.94, "fraction")), (1.0, Amount(1.0, "fraction")), (1, Amount(1.0, "fraction")),
        ("80KiB", Amount(81920, "bytes")), (81920, Amount(81920, "bytes")), (2, Amount(2, "bytes")),
        ("20 pages", Amount(20, "pages")), ("1page", Amount(1, "pages")),
    ],
)  # fmt: skip
def test_amounts(text: object, amount: Amount) -> None:
    assert Amount.parse(text) == amount
    assert Amount.parse(amount.plain()) == amount


@pytest.mark.parametrize("text", [0, 0.0, 1.01, -0.5, True, "0 pages", "1.5 pages", "94%", float("nan"), None])
def test_amounts_refused(text: object) -> None:
    with pytest.raises(ValueError, match="must be a fraction above 0 and up to 1, a size such as"):
        Amount.parse(text)


def test_an_extent_is_no_fraction() -> None:
    assert Amount.parse_extent(Amount(5, "pages")) == Amount.parse_extent("5 pages") == Amount(5, "pages")
    for fraction in (0.5, Amount(0.5, "fraction")):
        with pytest.raises(ValueError, match="must be a size such as 1MiB or a page count"):
            Amount.parse_extent(fraction)


def test_a_fraction_is_taken_as_its_decimal_digits() -> None:
    assert int(0.29 * 100) == 28
    assert Amount(0.29, "fraction").whole_pages(100, 4096) == 29


# -- one mistake, one message --


@pytest.mark.parametrize(
    ("section", "line", "message"),
    [
        ("region", "name: ../x", "region.name: must be 1 to 64 letters, digits"),
        ("region", "name: ..", "region.name: must be 1 to 64"),
        ("region", f"name: {'x' * 65}", "region.name: must be 1 to 64"),
        ("region", "name: é", "region.name: must be 1 to 64"),
        ("region", "name: 12", "first, is 12: put it in quotes"),
        ("region", "page_size: 3000", "region.page_size: must be a power of two from 4KiB to 2MiB, is 3000"),
        ("region", "page_size: 2KiB", "region.page_size: must be a power of two from 4KiB to 2MiB, is '2KiB'"),
        ("region", "page_size: 4MiB", "region.page_size: must be a power of two"),
        ("region", "page_size: 12KiB", "region.page_size: must be a power of two"),
        ("region", "seal: 1", "region.seal: must be true or false, is 1"),
        ("memory", "high: 1.5", "memory.high: must be a fraction above 0 and up to 1, a size such as 80KiB, or a page"),
        ("memory", "low: 0.99", "memory.low: must be below memory.high (0.98 by default), is 0.99"),
        ("memory", "high: 0.5", "memory.low: must be below memory.high (0.5), is 0.88 by default: set memory.low"),
        ("workers", "resolvers: 0", "workers.resolvers: must be an integer from 1 to 64, is 0"),
        ("workers", "resolvers: 65", "workers.resolvers: must be an integer from 1 to 64, is 65"),
        ("workers", "resolvers: 2.0", "workers.resolvers: must be an integer from 1 to 64, is 2.0"),
        ("workers", "resolvers: true", "workers.resolvers: must be an integer from 1 to 64, is true"),
        ("workers", "resolvers: '2'", "workers.resolvers: must be an integer from 1 to 64, is '2'"),
        ("workers", "inline:", "workers.inline: must be true or false, is empty"),
        ("workers", "spin_us: 1001", 'workers.spin_us: must be "auto" or an integer from 0 to 1000, is 1001'),
        ("workers", "spin_us: any", "workers.spin_us: must be \"auto\" or an integer from 0 to 1000, is 'any'"),
        ("workers", "spin_us: true", "workers.spin_us: must be"),
        ("workers", "cpus: all", 'workers.cpus: must be "auto", "any" or a list of CPU numbers such as [0, 2], is'),
        ("workers", "cpus: []", "workers.cpus: must be"),
        ("workers", "cpus: [0, 0]", "workers.cpus: must be"),
        ("workers", "cpus: [-1]", "workers.cpus: must be"),
        ("workers", "cpus: [true]", "workers.cpus: must be"),
        (
            "evictor",
            "policy: lru",
            "evictor.policy: must be one of auto, clock, duel, fifo, idle-walk, lirs, pgr, random, s3fifo, is 'lru'",
        ),
        (
            "evictor",
            "policy: 1",
            "evictor.policy: must be one of auto, clock, duel, fifo, idle-walk, lirs, pgr, random, s3fifo, is 1",
        ),
        ("evictor", "idle: idle", "evictor.idle: must be one of auto, page_idle, unmap, buffer, none, is 'idle'"),
        ("evictor", "batch: 4097", "evictor.batch: must be an integer from 1 to 4096, is 4097"),
        ("evictor", "buffer: 0.5", "evictor.buffer: must be below 0.5 of memory.limit, is 0.5"),
        ("prefetch", "enabled: 'no'", "prefetch.enabled: must be true or false, is 'no'"),
        ("prefetch", "window: 0.5", "prefetch.window: must be a size such as 1MiB or a page count"),
        ("prefetch", "window: 0", "prefetch.window: must be a size such as 1MiB or a page count"),
        ("store", "timeout: 1 week", "store.timeout: must be a duration from 1ms to 24h such as 250ms, 30s or 5min"),
        ("store", "on_failure: panic", "store.on_failure: must be one of wait, poison, is 'panic'"),
        ("store", "on_failure: {a: 1}", "store.on_failure: must be one value or a list of values, is or holds a map"),
        ("store", "timeout: [[1]]", "store.timeout: must be one value or a list of values, is or holds a list"),
        ("store", "timeout: !!python/name:os.system x", "store.timeout: must be plain text, true, false or a number"),
        ("store", f"timeout: {'9' * 5000}", "store.timeout: must be plain text, true, false or a number below 2**64"),
        ("store", f"timeout: 0x{'f' * 5000}", "store.timeout: must be plain text, true, false or a number below 2**64"),
        ("store", "timeot: 5s", "store.timeot: unknown setting, did you mean store.timeout? allowed in store: url, "),
        ("store", "resolvers: 5", "store.resolvers: unknown setting, did you mean workers.resolvers? allowed in"),
        ("store", "zzz: 5", "store.zzz: unknown setting; allowed in store: url, timeout, on_failure"),
        ("store", "<<: {timeout: 5}", "store.<<: unknown setting; allowed in store"),
        ("store", "? [a]\n  : 5", "store: a key must be a single word"),
    ],
)
def test_one_mistake(section: str, line: str, message: str) -> None:
    text = with_(section, line)
    told = problem(text)
    at = text[: text.index(f"  {line}\n")].count("\n") + 1
    assert told.startswith(f"c.yaml:{at}: ")
    assert message in told
    assert len(told) < 300


def test_the_largest_region() -> None:
    at_limit = MINIMAL.replace("1GiB", "64TiB\n  page_size: 32KiB")
    assert loads(at_limit).region.size == 2**46
    assert problem(at_limit.replace("32KiB", "8KiB")) == (
        "c.yaml:3: region.page_size: must be at least 32KiB for a region of 64TiB, is 8KiB: a policy tells at most "
        "2^32 - 2 pages apart"
    )
    assert problem(at_limit.replace("64TiB", "65TiB")) == (
        "c.yaml:2: region.size: must be at most 64TiB (what a process can address), is '65TiB'"
    )


def test_unknown_sections() -> None:
    told = problems(MINIMAL + "wrokers: {resolvers: 900}\nlimit: 5\nmemory.limit: 5\nzzz:\n1: 2\n")
    allowed = "allowed sections: region, memory, workers, evictor, prefetch, store, service, record"
    assert told == [
        f"c.yaml:7: wrokers: unknown section, did you mean workers? {allowed}",
        f"c.yaml:8: limit: unknown section, did you mean memory.limit? {allowed}",
        "c.yaml:9: memory.limit: no section: write limit: indented under memory:",
        f"c.yaml:10: zzz: unknown section; {allowed}",
        f"c.yaml:11: 1: unknown section; {allowed}",
    ]


def test_duplicates_are_refused_with_both_lines() -> None:
    text = MINIMAL + "evictor:\n  batch: 5\n  batch: 5\nmemory:\n  limit: 32MiB\n  high: 0.9\n"
    assert problems(text) == [
        "c.yaml:9: evictor.batch: given twice, first at line 8: remove one",
        "c.yaml:10: memory: given twice, first at line 3: put both under one heading",
        "c.yaml:11: memory.limit: given twice, first at line 4: remove one",
    ]


def test_missing_settings_are_all_named_at_their_section() -> None:
    told = problems("# nothing yet\nstore:\n  timeout: 5s\n")
    assert [line[: line.index(": missing: ")] for line in told] == [
        "c.yaml:1: region.size",
        "c.yaml:1: memory.limit",
        "c.yaml:2: store.url",
    ]
    assert problems("")[0].startswith("c.yaml:1: region.size: missing: Bytes of address space")


def test_a_section_that_is_no_mapping_is_told_once() -> None:
    text = MINIMAL.replace("memory:\n  limit: 64MiB", "memory: 64MiB\n")
    assert problem(text) == "c.yaml:3: memory: must be a mapping with the keys limit, high, low"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "c.yaml:1: not a configuration: must be a mapping with the sections region, memory"),
        ("a: 1\nb: c: d", "c.yaml:2: not YAML: mapping values are not allowed here"),
        ("a: 1\n\tb: 2", "c.yaml:2: not YAML: while scanning"),
        ("a: 1\n---\nb: 2", "c.yaml:2: not YAML: expected a single document"),
        ("a: *b", "c.yaml:1: not YAML: found undefined alias"),
        ("a: 1\nb: \0", "c.yaml:2: not YAML: the character U+0000 is not allowed"),
        ('a: "\\UFFFFFFFF"', "c.yaml:1: not YAML: an escape in quotes that is no character"),
        ("[" * 5000, "c.yaml:1: not YAML: nested too deeply"),
    ],
)
def test_text_that_is_no_configuration(text: str, message: str) -> None:
    assert problem(text).startswith(message)


def test_an_alias_of_its_own_section_ends() -> None:
    told = problem(MINIMAL.replace("store:\n", "store: &s\n  timeout: *s\n"))
    assert told == "c.yaml:6: store.timeout: must be one value or a list of values, is or holds a mapping"


# -- all mistakes at once --


def test_every_mistake_at_once_in_the_order_of_the_file() -> None:
    text = """\
region:
  name: a b
  size: 4G
memory:
  limit: 16KiB
  high: 0.9
  low: 0.95
  hihg: 1
wrokers: {}
evictor:
  policy: lru
  policy: fifo
  buffer: 0.7
store:
  url: ftp://x
  timeout: -1
"""
    told = problems(text, "prefetch.window=0", "memory.lmit=1", "workers.resolvers=99")
    assert [line.partition(": ")[0] for line in told] == [
        *(f"c.yaml:{n}" for n in (2, 3, 5, 7, 8, 9, 11, 12, 13, 15, 16)),
        "--set prefetch.window=0",
        "--set memory.lmit=1",
        "--set workers.resolvers=99",
    ]
    assert told[2] == ("c.yaml:5: memory.limit: must be at least 8 pages, 32KiB with region.page_size 4KiB, is 16KiB")
    assert told[3] == "c.yaml:7: memory.low: must be below memory.high (0.9), is 0.95"


def test_checks_between_settings_wait_for_their_settings_only() -> None:
    # The region's size is refused, so nothing can be said of the limit against it, but thresholds can be compared.
    told = problems(MINIMAL.replace("1GiB", "big").replace("64MiB", "64TiB\n  high: 5 pages\n  low: 6 pages"))
    assert [line.split(": ")[1] for line in told] == ["region.size", "memory.low"]
    # A missing limit leaves fractions comparable, but no page counts against it.
    told = problems(MINIMAL.replace("limit: 64MiB", "high: 0.5").replace("/x", "/x\nevictor: {buffer: 9999999 pages}"))
    assert [line.split(": ")[1] for line in told] == ["memory.limit", "memory.low"]
    told = problems(MINIMAL.replace("limit: 64MiB", "high: 5 pages"))
    assert [line.split(": ")[1] for line in told] == ["memory.limit"]


def test_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load(path) == loads(MINIMAL)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert caught.value.problems == (f"{path}: cannot be read: {reason}",)
    path = tmp_path / "latin1.yaml"
    path.write_bytes(b"a: 1\nb: \xe9\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.problems == (f"{path}:2: not UTF-8 text: byte 0xe9",)


@given(st.text())
@example("region: {name: !!int ''}")
@example("region: {size: !!float 'x', page_size: !!bool x, name: !!binary x, seal: !!null x}")
@example("store: {url: !!str {}, timeout: 1:2:3.5}")
def test_any_text_is_a_configuration_or_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        loads(text)


_scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["4GiB", "64MiB", "20 pages", "auto", "30s", "memory:", "fifo", "wait", 0.5, [0, 1], {"a": [1]}]),
)  # fmt: skip
_keys = st.sampled_from(
    [*Config.model_json_schema()["$defs"]["MemoryConfig"]["properties"], "size", "url", "cpus", "x"]
)


@given(
    st.dictionaries(st.sampled_from(["region", "memory", "workers", "store", "x"]), st.dictionaries(_keys, _scalars))
)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_any_mapping_is_a_configuration_or_a_config_error(raw: dict[str, dict[str, object]]) -> None:
    try:
        config = loads(json.dumps(raw))
    except ConfigError as error:
        told = error.problems
    else:
        Limits.of(config).validate()
        return
    assert told
    assert all(line.startswith("<text>:1: ") for line in told)


# -- overrides --


def test_overrides_replace_and_the_last_one_wins() -> None:
    config = loads(
        with_("evictor", "batch: nonsense"),
        [
            "evictor.batch=7", "memory.limit=32MiB", "memory.limit = 16MiB", "store.url=memory:", "workers.cpus=[0, 2]",
            "region.seal=true", "memory.high=20 pages", "memory.low=0.001", 'region.name="x"', "store.timeout=5",
        ],
    )  # fmt: skip
    assert (config.evictor.batch, config.memory.limit, config.store.url) == (7, 16 << 20, "memory:")
    assert (config.workers.cpus, config.region.seal, config.region.name) == ((0, 2), True, "x")
    assert (config.memory.high, config.memory.low) == (Amount(20, "pages"), Amount(0.001, "fraction"))
    assert config.store.timeout == 5.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("memory.limit=lots", ': must be a size such as 4GiB, "512 MiB" or 100MB, or a number of bytes, is \'lots\''),
        ("memory.limit=", ": must be a size such as 4GiB, "),
        ("memory.limit", ": must be section.key=value; the settings here are memory.limit, memory.high, memory.low"),
        ("memory=5", ": must be section.key=value; the settings here are memory.limit, memory.high, memory.low"),
        ("verbose", ": must be section.key=value, such as memory.limit=64MiB"),
        ("", ": must be section.key=value, such as memory.limit=64MiB"),
        ("memory.limt=5", ": memory.limt: unknown setting, did you mean memory.limit? allowed in memory: limit, "),
        ("limit=5", ": limit: unknown section, did you mean memory.limit? allowed sections: region"),
        ("memory.limit.x=5", ": memory.limit.x: unknown setting, did you mean memory.limit?"),
        ("workers.cpus=[0", ": not YAML: while parsing a flow sequence"),
        ("workers.cpus=[[0]]", ": must be one value or a list of values"),
        ("workers.cpus={0: 1}", ': must be "auto", "any" or a list of CPU numbers'),
        ("memory.high=0.5", ": memory.low: must be below memory.high (0.5), is 0.88 by default: set memory.low as wel"),
        ("region.page_size=16MiB", ": must be a power of two from 4KiB to 2MiB, is '16MiB'"),
        ("memory.limit=2GiB", ": must be at most region.size (1GiB), is 2GiB: with the limit above the region nothing"),
        ("memory.high=20", ": must be from 2 to 16384 pages of 4KiB (memory.limit), is 20B: for pages write"),
    ],
)  # fmt: skip
def test_an_override_is_its_own_place(override: str, message: str) -> None:
    assert problem(MINIMAL, override).startswith(f"--set {override}{message}")


def test_a_contradiction_with_an_override_is_told_at_the_override() -> None:
    # The file was consistent without it.
    told = problem(with_("memory", "low: 0.8"), "memory.high=0.5")
    assert told == "--set memory.high=0.5: memory.low: must be below memory.high (0.5), is 0.8"


def test_a_password_is_not_shown() -> None:
    told = problem(MINIMAL, "store.url=radis://me:s3cr3t@host/0?password=s3cr3t")
    assert told.startswith("--set store.url=radis://me:***@host/0?password=***: no store for the scheme 'radis'")
    assert "s3cr3t" not in told
    assert "s3cr3t" not in problem(MINIMAL.replace("file:///var/tmp/x", "//me:s3cr3t@host/0"))
    assert without_password("redis://:p@ss/w@h:1/0") == "redis://:***@h:1/0"
    assert without_password("redis://127.0.0.1:6379/0") == "redis://127.0.0.1:6379/0"


# -- the store's URL --


@pytest.mark.parametrize(
    ("written", "url"),
    [
        ("file:///a/b", "file:///a/b"),
        ("file:/a/b", "file:///a/b"),
        ("file:b.pages", "file://{cwd}/b.pages"),
        ("file:d/../b.pages", "file://{cwd}/b.pages"),
        ("FILE:b?x=1", "file://{cwd}/b?x=1"),
        ("file:~/b", "file:///home/me/b"),
        ("file://~/b", "file:///home/me/b"),
        ("file:${DIR}/b~", "file:///data/b~"),
        ("file:///x/${NAME}.pages", "file:///x/n.pages"),
        ("unix://~/redis.sock?db=1", "unix:///home/me/redis.sock?db=1"),
        ("redis://:${SECRET}@h:1/0", "redis://:a$b@h:1/0"),
        ("redis://:$SECRET@h:1/0", "redis://:$SECRET@h:1/0"),
        ('"memory:"', "memory:"),
    ],
)
def test_urls(written: str, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"HOME": "/home/me", "DIR": "/data", "NAME": "n", "SECRET": "a$b"}.items():
        monkeypatch.setenv(name, value)
    config = loads(MINIMAL.replace("file:///var/tmp/x", written))
    assert config.store.url == url.replace("{cwd}", str(tmp_path))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("ftp://x", "no store for the scheme 'ftp'; known: file, memory, redis, rediss, unix"),
        ("/var/tmp/x", "must be a URL such as file:///var/tmp/dmh.pages or redis://127.0.0.1:6379/0, is '/var/tmp/x': "
         "for a page file write file:/var/tmp/x"),
        ("x", "must be a URL such as"),
        ("5", "must be a URL such as"),
        ("", "must be a URL such as"),
        ("file://var/tmp/x", "two slashes name a host ('var'), and a page file is local: write file:///var/tmp/x"),
        ("file:", "names no file: write file:///directory/name or file:name"),
        ("file:///var/tmp/", "names no file"),
        ("file:${NONE_1}/${NONE_2}", "environment variables ${NONE_1}, ${NONE_2} not set: set and export it"),
        ("file:${}/x", "environment variable ${} not set"),
    ],
)  # fmt: skip
def test_urls_refused(written: str, message: str) -> None:
    quoted = f"'{written}'" if written.endswith(":") else written
    assert problem(MINIMAL.replace("file:///var/tmp/x", quoted)).startswith(f"c.yaml:6: store.url: {message}")


def test_variables_are_replaced_in_the_url_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("N", "5")
    assert problem(with_("evictor", "batch: ${N}")).endswith("is '${N}'")


def test_without_any_store_the_mend_is_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["dmh.config.loader"], "store_schemes", lambda: ())
    assert "known: none: install dmh with pip" in problem(MINIMAL)


def test_the_schemes_are_those_of_the_installed_stores() -> None:
    try:
        distribution("dmh")
    except PackageNotFoundError:
        pytest.skip("dmh is not installed (pip install -e .), so there are no entry points")
    assert set(store_schemes()) >= set(SCHEMES)


# -- wire and schema --


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_round_trip_over_the_wire(path: Path) -> None:
    config = load(path)
    assert Config.from_wire(config.to_wire()) == config
    json.loads(config.to_wire())


@pytest.mark.parametrize("high", ["1", "1.0", "0.9400000000000001", "81921", "20 pages"])
@pytest.mark.parametrize("cpus", ["any", "[0, 5]"])
def test_round_trip_keeps_units(high: str, cpus: str) -> None:
    config = loads(MINIMAL, [f"memory.high={high}", "memory.low=4 pages", f"workers.cpus={cpus}", "workers.spin_us=5"])
    again = Config.from_wire(config.to_wire().encode())
    assert again == config
    assert again.memory.high.unit == config.memory.high.unit
    assert again.workers.cpus == config.workers.cpus


@pytest.mark.parametrize("buffer", [[], ["evictor.buffer=0.02"]])
def test_what_was_left_to_its_default_stays_so_over_the_wire(buffer: list[str]) -> None:
    """A default victim buffer has at least 64 slots, one of two hundredths that was asked for has not."""
    config = loads(MINIMAL, ["region.size=64MiB", "memory.limit=4MiB", *buffer])
    again = Config.from_wire(config.to_wire())
    assert Limits.of(again) == Limits.of(config)
    assert Limits.of(again).buffer == (20 if buffer else 64)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"region": {"size": 1}}', "\udcff"])
def test_a_damaged_wire_form(text: str) -> None:
    with pytest.raises(ProtocolError, match="another version wrote, or damaged"):
        Config.from_wire(text)


def test_the_schema_describes_every_setting() -> None:
    schema = config_schema()
    json.dumps(schema)
    assert schema["required"] == ["region", "memory", "store"]
    assert schema["additionalProperties"] is False
    for name, section in schema["$defs"].items():
        assert section["additionalProperties"] is False
        for key, setting in section["properties"].items():
            assert len(setting["description"]) > 15, (name, key)
            assert "type" in setting or "anyOf" in setting, (name, key)
    settings_of = {name: section["properties"] for name, section in schema["$defs"].items()}
    assert settings_of["EvictorConfig"]["policy"]["enum"] == list(POLICIES)
    assert settings_of["MemoryConfig"]["high"]["default"] == 0.98
    assert settings_of["PrefetchConfig"]["window"]["default"] == "4MiB"


# -- dmh config --


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers(dest="command"))
    return cli.run(parser.parse_args(["config", *argv]))


def test_check_shows_what_the_settings_come_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL)
    assert run("check", str(path), "--set", "memory.limit=1MiB", "--set", "store.url=redis://:pw@h/0") == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = dict(line.split(maxsplit=1) for line in out.splitlines()[:-1])
    assert rows["region.size"].split(maxsplit=1) == ["1GiB", "262,144 pages = 1 GiB"]
    assert rows["memory.limit"].split(maxsplit=1) == ["1MiB", "256 pages = 1 MiB, 240 of them for resident pages"]
    assert rows["memory.high"].split(maxsplit=1) == ["0.98", "240 pages = 960 KiB: eviction starts"]
    assert rows["prefetch.window"].split(maxsplit=1) == ["4MiB", "30 pages = 120 KiB ahead at most"]
    assert rows["store.url"] == "redis://:***@h/0"
    assert rows["store.timeout"] == "30s"
    assert len(rows) == sum(len(section) for section in loads(MINIMAL).model_dump().values())
    assert out.splitlines()[-1] == f"{path}: OK"


def test_check_reports_every_problem_on_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(with_("evictor", "batch: 0"))
    assert run("check", str(path), "--set", "memory.limit=1") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.partition(": ")[0] for line in err.splitlines()] == [f"{path}:8", "--set memory.limit=1"]


def test_schema_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("schema") == 0
    assert json.loads(capsys.readouterr().out) == config_schema()

"""The memory settings in pages, and what makes settings contradict each other.

Pure.  Owns the rounding from fractions and bytes to pages and every check that needs two settings; the checks of one
setting alone stand in `model`.  `load` reports the problems found here with their places; the launcher, the evictor and
the resolvers work with `Limits` and never with the fractions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from dmh.config.model import Config
from dmh.config.quantity import Amount, format_size
from dmh.errors import ConfigError

REGION_PAGES_MAX = 2**32 - 2
# Fewer leave no room for one instruction's pages (a copy between two unaligned operands touches four) next to the
# victim buffer, the page being fetched and the one on its way out.
LIMIT_PAGES_MIN = 8
# The default victim buffer has at least so many slots, or a sixteenth of the limit.
BUFFER_PAGES = 64
# What a victim buffer of an explicit size must leave to the program.
RESIDENT_PAGES_MIN = 2


class Problem(NamedTuple):
    """A contradiction between settings; `settings` are those concerned, the one to change first."""

    settings: tuple[str, ...]
    message: str


@dataclass(frozen=True, slots=True)
class Limits:
    """How many pages may be where.  "Local" pages are the resident ones and those staged in the victim buffer."""

    limit: int  # 8 <= limit <= pages of the region; local <= limit always
    buffer: int  # victim slots: 1 <= buffer <= limit - RESIDENT_PAGES_MIN
    resident_max: int  # == limit - buffer; resident <= resident_max always
    high: int  # eviction starts at local >= high: 2 <= high <= limit (may exceed resident_max)
    low: int  # eviction stops at local <= low: 1 <= low < high
    window: int  # prefetch at most so many pages ahead: 0 <= window <= resident_max // 8; 0 without prefetch
    batch: int  # capture at most so many pages in one go: 1 <= batch <= buffer
    adaptive: bool = True  # high and low are fractions, and LPET moves the thresholds with the fault rate

    @classmethod
    def of(cls, config: Config) -> Limits:
        """The limits that a configuration means.

        Raises:
            ConfigError: its settings contradict each other (a `Config` from `load` has been checked for that).
        """
        if problems := list(contradictions(config)):
            raise ConfigError([f"{p.settings[0]}: {p.message}" for p in problems])
        page_size = config.region.page_size
        limit = config.memory.limit // page_size

        def pages(amount: Amount) -> int:
            return amount.whole_pages(limit, page_size)

        buffer = max(1, pages(config.evictor.buffer))
        if "buffer" not in config.evictor.model_fields_set:
            # Two hundredths of little memory would have pages leave in batches too small to keep up with faults.
            buffer = max(buffer, min(BUFFER_PAGES, limit // 16))
        resident_max = limit - buffer
        high = max(2, pages(config.memory.high))
        if "high" not in config.memory.model_fields_set:
            high = min(high, resident_max)
        # Two fractions may round to one page number; what was written apart stays apart.
        low = max(1, min(pages(config.memory.low), high - 1))
        # A window below one page (1 MiB of 2 MiB pages) still means that reading ahead is wanted.
        window = min(max(1, pages(config.prefetch.window)), resident_max // 8) if config.prefetch.enabled else 0
        adaptive = config.memory.high.unit == config.memory.low.unit == "fraction"
        return cls(limit, buffer, resident_max, high, low, window, min(config.evictor.batch, buffer), adaptive)

    def validate(self) -> None:
        """Check the invariants that stand beside the fields (those that need no region).

        Raises:
            AssertionError: one does not hold.
        """
        assert self.limit >= LIMIT_PAGES_MIN, self
        assert 1 <= self.buffer <= self.limit - RESIDENT_PAGES_MIN, self
        assert self.resident_max == self.limit - self.buffer, self
        assert 2 <= self.high <= self.limit, self
        assert 1 <= self.low < self.high, self
        assert 0 <= self.window <= self.resident_max // 8, self
        assert 1 <= self.batch <= self.buffer, self


def contradictions(config: Config, unusable: Collection[str] = ()) -> Iterator[Problem]:
    """Every contradiction between settings.

    Args:
        config: settings, each of which is fine alone.
        unusable: settings ("memory.low") whose value in `config` only stands in for a refused one; checks that need
            them are left out.
    """

    def usable(*settings: str) -> bool:
        return not any(setting in unusable for setting in settings)

    size, page_size, limit_bytes = config.region.size, config.region.page_size, config.memory.limit
    if usable("region.size", "region.page_size") and size % page_size:
        below = size // page_size * page_size
        near = [format_size(n) for n in (below, below + page_size) if n]
        yield Problem(
            ("region.size", "region.page_size"),
            f"must be a multiple of region.page_size ({format_size(page_size)}), is {format_size(size)}: "
            f"the nearest {'are' if len(near) > 1 else 'is'} {' and '.join(near)}",
        )
    if usable("region.size", "region.page_size") and size // page_size > REGION_PAGES_MAX:
        least = next(page for page in (page_size << n for n in range(1, 10)) if size // page <= REGION_PAGES_MAX)
        yield Problem(
            ("region.page_size", "region.size"),
            f"must be at least {format_size(least)} for a region of {format_size(size)}, is {format_size(page_size)}: "
            "a policy tells at most 2^32 - 2 pages apart",
        )
    if usable("memory.limit", "region.size") and limit_bytes > size:
        yield Problem(
            ("memory.limit", "region.size"),
            f"must be at most region.size ({format_size(size)}), is {format_size(limit_bytes)}: with the limit above "
            "the region nothing would ever be paged; lower the limit or enlarge the region",
        )
    wrong: set[str] = set()
    if usable("memory.limit", "region.page_size"):
        if limit_bytes < LIMIT_PAGES_MIN * page_size:
            yield Problem(
                ("memory.limit", "region.page_size"),
                f"must be at least {LIMIT_PAGES_MIN} pages, {format_size(LIMIT_PAGES_MIN * page_size)} with "
                f"region.page_size {format_size(page_size)}, is {format_size(limit_bytes)}",
            )
        else:
            for problem in _amount_problems(config, usable):
                wrong.add(problem.settings[0])
                yield problem
    if not wrong & {"memory.low", "memory.high"}:
        yield from _threshold_problems(config, usable)
    if usable("evictor.buffer") and config.evictor.buffer.unit == "fraction" and config.evictor.buffer.value >= 0.5:
        yield Problem(
            ("evictor.buffer",),
            f"must be below 0.5 of memory.limit, is {config.evictor.buffer}: the rest is for the program's pages; "
            'to give it more all the same, write a size or a page count such as "20 pages"',
        )


def _threshold_problems(config: Config, usable: Callable[..., bool]) -> Iterator[Problem]:
    """memory.low against memory.high, as they were written: rounding has its own rule in `Limits.of`."""
    low, high, page_size = config.memory.low, config.memory.high, config.region.page_size
    # Thresholds of one unit compare whatever the limit is.
    to_convert = () if low.unit == high.unit else ("memory.limit", "region.page_size")
    if not usable("memory.low", "memory.high", *to_convert):
        return
    limit = Fraction(config.memory.limit, page_size)
    low_pages, high_pages = low.in_pages(limit, page_size), high.in_pages(limit, page_size)
    if low_pages < high_pages:
        return

    def told(amount: Amount, pages: Fraction, key: str) -> str:
        converted = "" if low.unit == high.unit or amount.unit == "pages" else f" = {float(pages):g} pages"
        return f"{amount}{converted}{'' if key in config.memory.model_fields_set else ' by default'}"

    mend = "" if "low" in config.memory.model_fields_set else ": set memory.low as well"
    yield Problem(
        ("memory.low", "memory.high"),
        f"must be below memory.high ({told(high, high_pages, 'high')}), is {told(low, low_pages, 'low')}{mend}",
    )


def _amount_problems(config: Config, usable: Callable[..., bool]) -> Iterator[Problem]:
    """Sizes and page counts against the limit; fractions of it are within it, and `Limits.of` rounds them."""
    page_size = config.region.page_size
    limit = config.memory.limit // page_size
    spared = limit - RESIDENT_PAGES_MIN
    for setting, amount, least, most, reason in (
        ("memory.high", config.memory.high, 2, limit, "memory.limit"),
        ("memory.low", config.memory.low, 1, limit, "memory.limit"),
        ("evictor.buffer", config.evictor.buffer, 1, spared, f"{RESIDENT_PAGES_MIN} fewer than memory.limit"),
    ):
        if amount.unit == "fraction" or not usable(setting):
            continue
        if not least <= amount.whole_pages(limit, page_size) <= most:
            # 20 without a unit is bytes, and hardly ever meant.
            slip = amount.unit == "bytes" and amount.value < page_size
            hint = f': for pages write "{amount.value} pages"' if slip else ""
            yield Problem(
                (setting, "memory.limit", "region.page_size"),
                f"must be from {least} to {most} pages of {format_size(page_size)} ({reason}), is {amount}{hint}",
            )

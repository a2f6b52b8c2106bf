"""Sizes, durations and amounts: from what a person writes to a number, and back.

Pure.  Owns the units and the sentences that refuse a value; owns no setting (`model`) and no limit (`limits`).  Called
by `model` while it validates, and by whoever shows a setting to a person.
"""

from __future__ import annotations

import math
import re
import reprlib
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_SIZE_UNITS = {
    "": 1, "B": 1,
    "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB,
    "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip
_SECONDS = {
    "": Fraction(1),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "min": Fraction(60),
    "h": Fraction(3600),
}
# The number of digits is bounded because Python refuses to convert thousands of them, in words of its own.
_QUANTITY = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)\s*")

SIZE_FORM = 'a size such as 4GiB, "512 MiB" or 100MB, or a number of bytes'
DURATION_FORM = "a duration from 1ms to 24h such as 250ms, 30s or 5min, or a number of seconds"
AMOUNT_FORM = 'a fraction above 0 and up to 1, a size such as 80KiB, or a page count such as "20 pages"'
EXTENT_FORM = 'a size such as 1MiB or a page count such as "16 pages"'

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 60


def show(value: object) -> str:
    """How a refused value is quoted in a message: as YAML has it, and never long."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    return _brief.repr(value)


def refusal(value: object, form: str, hint: str = "") -> ValueError:
    """The error for a value that is not of the wanted form; `hint` names a mend that fits this value."""
    return ValueError(f"must be {form}, is {show(value)}{': ' if hint else ''}{hint}")


def parse_size(value: object, form: str = SIZE_FORM) -> int:
    """Bytes, from an integer or from text with a unit (KiB MiB GiB TiB binary, kB MB GB TB decimal).

    Raises:
        ValueError: not a size, not a positive whole number of bytes, or a unit that could mean two things.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise refusal(value, form)
    if isinstance(value, int):
        size = Fraction(value)
    else:
        match = _QUANTITY.fullmatch(value)
        if match is None:
            raise refusal(value, form)
        number, unit = match.groups()
        if unit not in _SIZE_UNITS:
            raise refusal(value, form, _unit_hint(number, unit))
        size = Fraction(number) * _SIZE_UNITS[unit]
    if size < 1:
        raise refusal(value, form, "it must be at least one byte")
    if size.denominator != 1:
        raise refusal(value, form, "that is no whole number of bytes")
    return int(size)


def _unit_hint(number: str, unit: str) -> str:
    """What to write in place of a unit that is none, or that people read in two ways."""
    if len(unit) == 1 and unit in "kKmMgGtT":
        binary, decimal = (f"{number}{u}" for u in _SIZE_UNITS if u and u[0].lower() == unit.lower())
        return f"write {binary} (powers of 1024) or {decimal} (powers of 1000)"
    near = [u for u in _SIZE_UNITS if u and u.lower() == unit.lower()]
    return f"write {number}{near[0]}" if near else f"the units are {', '.join(u for u in _SIZE_UNITS if u)}"


def format_size(size: int) -> str:
    """A size that `parse_size` reads back exactly: the largest binary unit that divides it, else bytes."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size and size % _SIZE_UNITS[unit] == 0:
            return f"{size // _SIZE_UNITS[unit]}{unit}"
    return f"{size}B"


def about(size: int) -> str:
    """A size to four digits or so, for reading only."""
    unit, count = "KiB", size / KIB
    for larger in ("MiB", "GiB", "TiB"):
        if count < 1024:
            break
        unit, count = larger, count / 1024
    return f"{count:.4g} {unit}"


def parse_duration(value: object) -> float:
    """Seconds, from a number of seconds or from text with a unit (ms, s, min, h).

    Raises:
        ValueError: not a duration, or outside 1 ms to 24 h.
    """
    seconds: Fraction | float
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise refusal(value, DURATION_FORM)
    if isinstance(value, str):
        match = _QUANTITY.fullmatch(value)
        if match is None or match[2] not in _SECONDS:
            raise refusal(value, DURATION_FORM)
        seconds = Fraction(match[1]) * _SECONDS[match[2]]
    else:
        seconds = value
    # Written so that NaN fails; and the endless time-out is refused because store.on_failure decides what follows one.
    if not 0.001 <= seconds <= 86400:
        raise refusal(value, DURATION_FORM)
    return float(seconds)


def format_duration(seconds: float) -> str:
    """A duration in the largest unit that makes it at least 1."""
    unit = next((u for u in ("h", "min", "s") if seconds >= _SECONDS[u]), "ms")
    return f"{seconds / float(_SECONDS[unit]):g}{unit}"


@dataclass(frozen=True, slots=True)
class Amount:
    """A share of `memory.limit`, a size, or a number of pages; which one it is stays known, so messages can quote it.

    Attributes:
        value: the fraction (0 < value <= 1), or the bytes or pages (a positive integer).
        unit: what `value` counts.
    """

    value: int | float
    unit: Literal["fraction", "bytes", "pages"]

    @classmethod
    def parse(cls, value: object) -> Amount:
        """A fraction (0.94), a size ("80KiB", 81920) or a page count ("20 pages").

        Raises:
            ValueError: none of the three, or out of its range.
        """
        if isinstance(value, Amount):
            return value
        if isinstance(value, float) or (isinstance(value, int) and value == 1):  # nobody means one byte by 1
            if isinstance(value, bool) or not 0 < value <= 1:
                raise refusal(value, AMOUNT_FORM)
            return cls(float(value), "fraction")
        return cls._parse_absolute(value, AMOUNT_FORM)

    @classmethod
    def parse_extent(cls, value: object) -> Amount:
        """As `parse`, without fractions: for a setting that is no share of anything.

        Raises:
            ValueError: not a size or page count, or not positive.
        """
        if isinstance(value, Amount) and value.unit != "fraction":
            return value
        return cls._parse_absolute(value, EXTENT_FORM)

    @classmethod
    def _parse_absolute(cls, value: object, form: str) -> Amount:
        if isinstance(value, str) and (match := _QUANTITY.fullmatch(value)) and match[2] in ("page", "pages"):
            if not match[1].isdecimal() or int(match[1]) == 0:
                raise refusal(value, form, "pages are counted in whole numbers from 1")
            return cls(int(match[1]), "pages")
        return cls(parse_size(value, form), "bytes")

    def in_pages(self, limit: int | Fraction, page_size: int) -> Fraction:
        """This amount in pages, not rounded.

        Args:
            limit: `memory.limit` in pages: what a fraction is a fraction of.
            page_size: bytes a page.
        """
        match self.unit:
            case "fraction":
                # Through the decimal digits that were written: 0.29 of 100 pages is 29, which the binary double misses.
                return Fraction(repr(self.value)) * limit
            case "bytes":
                return Fraction(int(self.value), page_size)
            case "pages":
                return Fraction(self.value)

    def whole_pages(self, limit: int, page_size: int) -> int:
        """`in_pages`, rounded down: an amount of memory is never exceeded by rounding."""
        return math.floor(self.in_pages(limit, page_size))

    def plain(self) -> float | str:
        """The YAML or JSON value that `parse` reads back as this very amount."""
        return float(self.value) if self.unit == "fraction" else str(self)

    def __str__(self) -> str:
        """As a person would write it in the configuration."""
        if self.unit == "bytes":
            return format_size(int(self.value))
        if self.unit == "pages":
            return f"{self.value} page{'' if self.value == 1 else 's'}"
        return repr(self.value)

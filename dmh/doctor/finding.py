"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """What a finding says of dmh on this machine."""

    OK = "ok"
    """As dmh would have it."""
    INFO = "info"
    """Makes no difference here, or is a matter of taste."""
    LESS = "less"
    """dmh works, with something missing or slower."""
    BAD = "bad"
    """dmh cannot run like this."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found.

    Attributes:
        group: heading.
        name: what was looked at.
        value: what it is.
        level: what that says of dmh.
        meaning: why it matters.
        mend: how to change it; "" where there is nothing to change.
    """

    group: str
    name: str
    value: str
    level: Level
    meaning: str
    mend: str = ""

"""A program as the launcher knows it.  Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dmh.service.channel import Channel, Message

PROTOCOL = 1


@dataclass(slots=True)
class Client:
    """One program, or one connection of something else (`dmh stats`).

    Attributes:
        channel: its connection; None while it has none: a forked child that does not speak, or a program that has not
            found this launcher yet, which took over from another.
        pid: its process; 0 for a child that is not known by name.
        view: the number of its mapping, 0 without one; `uffd` and `base` are that mapping's.
        follows: its forks are announced.
        writes: its mapping can be written through.
        taken_down: it has said that its mapping is gone.
        owner: the service ends with it.
        leaving: it has ended, and what it held is given back as soon as its last children are known.
        blocks: first page -> [pages, how often it holds them], of its arrays.
        pins: (first page, pages), as often as they were pinned.
    """

    channel: Channel | None
    pid: int
    greeted: bool = False
    view: int = 0
    uffd: int = -1
    base: int = 0
    pidfd: int = -1
    follows: bool = False
    writes: bool = False
    taken_down: bool = False
    owner: bool = False
    leaving: bool = False
    blocks: dict[int, list[int]] = field(default_factory=dict)
    pins: list[tuple[int, int]] = field(default_factory=list)


Operation = Callable[[Client, Message, list[int]], Message | None]
"""What carries out a request: given who asks, the message and its descriptors, it returns the answer, or None where the
answer comes later or none is expected.  It takes the descriptors that it keeps out of the list.
"""


def outcome(reply: Message) -> Message:
    """What a program is told of a worker's answer."""
    return {"error": reply["error"], "kind": "RegionError"} if "error" in reply else {}

"""What a run did and what it found.  Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(slots=True)
class Verdict:
    """Facts of one run; `problems` is empty where all is well.

    Attributes:
        seed: to do the same again (as far as a scheduler lets anybody).
        seconds: from the first operation to the end of the verifying scan.
        operations: reads and writes of words.
        asked: requests by kind, of all threads.
        counters: dmh's own, at the end.
        kills: SIGKILLs by role; of the store, kills and pauses.
        longest_ms: the longest that one operation of a thread took: a fault, a dead worker, an absent store.
        highest: most bytes of local memory ever seen.
        limit: memory.limit, which it must not exceed.
        words: compared by the verifying scan.
        wrong: words that were not what they had to be.
        hangs: what made no progress.
        ended: processes that ended and must not have.
        leaks: descriptors, processes and files that are left over.
        exceeded: how the limit was.
        log: the last lines of what the service and the programs said, where something was wrong.
    """

    seed: int
    seconds: float = 0.0
    operations: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    counters: dict[str, int] = field(default_factory=dict)
    kills: Counter[str] = field(default_factory=Counter)
    longest_ms: float = 0.0
    highest: int = 0
    limit: int = 0
    words: int = 0
    wrong: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    exceeded: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Everything that must not be."""
        return self.wrong + self.hangs + self.ended + self.exceeded + self.leaks

    def to_wire(self) -> dict[str, Any]:
        """A JSON-able form."""
        # asdict would make counters of pairs of them.
        counted = {"asked": dict(self.asked), "kills": dict(self.kills)}
        return {"ok": not self.problems, **asdict(replace(self, asked=Counter(), kills=Counter())), **counted}


def wrong_word(lane: int, found: dict[str, int]) -> str:
    """A wrong word, for people: what it is tells where to look."""
    if found["older"]:
        what = f"{found['older']} writes old: a lost write"
    elif not found["got"]:
        what = "zeros in the place of data"
    elif found["got"] == found["again"]:
        what = "something that was never written there: another page's, or damaged"
    else:
        what = "something else"
    again = "" if found["got"] == found["again"] else f", read again {found['again']:#018x}"
    return (
        f"wrong: word {found['word']} of page {found['page']} (lane {lane}, version {found['version']}): expected "
        f"{found['expected']:#018x}, got {found['got']:#018x}{again}: {what}"
    )

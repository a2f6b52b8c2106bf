"""Who is killed when: random moments, random victims, from a seed.

Owns the choice and the signal.  On a slow machine fewer die than was asked for: a service whose workers are all on
their way back shows nothing.
"""

from __future__ import annotations

import os
import random
import signal
from collections import Counter

from dmh.stress.look import Look
from dmh.stress.server import Server

YOUNG_KILLS = 2
"""So often in a row a worker may be killed that has not taken its predecessor's place yet: the launcher gives up on one
that dies like that again and again.
"""
YOUNG_SHARE = 0.2
"""Of the kills, as many hit one of those, if there is any."""
STORE_SECONDS = 6.0
"""Between two things that happen to the store, on average."""
LONGEST_OUTAGE = 2.0


class Workers:
    """SIGKILLs for workers, `rate` a second on average, but never when fewer than half of them are up."""

    def __init__(self, look: Look, rate: float, rng: random.Random, now: float) -> None:
        self.kills: Counter[str] = Counter()
        self._look, self._rate, self._rng = look, rate, rng
        self._killed_at: dict[int, int] = {}
        """Worker number -> how many successors it had had when it was killed last."""
        self._young: Counter[int] = Counter()
        self._next = now + rng.expovariate(rate) if rate else float("inf")

    def is_up(self, number: int) -> bool:
        """Whoever was killed last under this number has its successor at work."""
        return self._look.successors(number) > self._killed_at.get(number, -1)

    def all_up(self) -> bool:
        """Every dead worker has its successor."""
        return all(map(self.is_up, range(self._look.table.workers)))

    def turn(self, now: float) -> None:
        """Kill whoever is due."""
        if now >= self._next:
            self._next = now + self._rng.expovariate(self._rate)
            self._kill()

    def _kill(self) -> None:
        workers = self._look.workers()
        up = [number for number in workers if self.is_up(number)]
        if 2 * len(up) <= self._look.table.workers:
            return
        coming = [number for number in workers if number not in up and self._young[number] < YOUNG_KILLS]
        number = self._rng.choice(coming if coming and self._rng.random() < YOUNG_SHARE else up)
        try:
            os.kill(workers[number], signal.SIGKILL)
        except ProcessLookupError:
            return
        self._young[number] = 0 if number in up else self._young[number] + 1
        self._killed_at[number] = self._look.successors(number)
        self.kills[self._look.role(number)] += 1
        self._look.remember()


class Store:
    """The store's server: killed and started again, or stopped and continued, in turn at random."""

    def __init__(self, server: Server, rng: random.Random, now: float) -> None:
        self.kills: Counter[str] = Counter()
        self._server, self._rng = server, rng
        self._paused = False
        self._back = float("inf")
        self._next = now + rng.expovariate(1 / STORE_SECONDS)

    def turn(self, now: float) -> None:
        """Take the server away when it is time, and give it back when it is time."""
        if now >= self._back:
            self.give_back()
            self._next = now + self._rng.expovariate(1 / STORE_SECONDS)
        elif now >= self._next:
            self._next = float("inf")
            self._back = now + self._rng.uniform(0.05, LONGEST_OUTAGE)
            self._paused = self._rng.random() < 0.5
            if self._paused:
                self._server.pause()
            else:
                self._server.kill()
            self.kills["store paused" if self._paused else "store"] += 1

    def give_back(self) -> None:
        """The server is there again."""
        if self._back < float("inf"):
            self._back = float("inf")
            if self._paused:
                self._server.resume()
            else:
                self._server.start()

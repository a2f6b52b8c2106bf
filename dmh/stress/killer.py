"""Who is killed when: random moments, random victims, from a seed.

Owns the choice and the signal.  A worker that dies again and again before it is up ends the service, by design, so one
that has only just started is spared when it was killed so young before.
"""

from __future__ import annotations

import os
import random
import signal
from collections import Counter

from dmh.stress.look import Look, age
from dmh.stress.server import Server

YOUNG_SECONDS = 3.0
"""Below this age a worker may not have taken its place yet."""
YOUNG_KILLS = 2
"""So often in a row a worker may be killed young."""
STORE_SECONDS = 6.0
"""Between two things that happen to the store, on average."""
LONGEST_OUTAGE = 2.0


class Workers:
    """SIGKILLs for workers, `rate` a second on average."""

    def __init__(self, look: Look, rate: float, rng: random.Random, now: float) -> None:
        self.kills: Counter[str] = Counter()
        self._look, self._rate, self._rng = look, rate, rng
        self._young: Counter[int] = Counter()
        self._next = now + rng.expovariate(rate) if rate else float("inf")

    def turn(self, now: float) -> None:
        """Kill whoever is due."""
        while now >= self._next:
            self._next += self._rng.expovariate(self._rate)
            self._kill()

    def _kill(self) -> None:
        workers = self._look.workers()
        ages = {number: age(pid) for number, pid in workers.items()}
        able = [n for n in workers if ages[n] > YOUNG_SECONDS or self._young[n] < YOUNG_KILLS]
        if not able:
            return
        number = self._rng.choice(able)
        self._young[number] = self._young[number] + 1 if ages[number] <= YOUNG_SECONDS else 0
        try:
            os.kill(workers[number], signal.SIGKILL)
        except ProcessLookupError:
            return  # killed a moment ago, and not replaced yet
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

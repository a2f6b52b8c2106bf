"""Back-off around a store: what fails is tried again, and an outage is told once at its start and once at its end.

Owns the retry rule of `store.timeout` and `store.on_failure`, and what one process knows of an outage; stores
themselves never retry.  Resolvers (reading) `call`, which waits.  The evictor (writing) only ever makes an `attempt`:
what it could not write stays in the victim buffer, and meanwhile it answers requests.

Any StoreError counts as an outage here, not only StoreUnavailable: a server that wants another password now, or a
disk that is full, is mended by somebody, and then work goes on by itself.  At the start of a service, before any
page depends on it, a store that refuses is an error at once (`Store.prepare`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from dmh.errors import StoreError

T = TypeVar("T")
log = logging.getLogger("dmh")

FIRST_PAUSE, LONGEST_PAUSE = 0.01, 2.0


class Stopped(Exception):  # noqa: N818 - not an error: the service is ending
    """The service is stopping, so the request was given up."""


@dataclass(slots=True)
class Retry:
    """Requests with back-off.

    Attributes:
        timeout: seconds until a store that fails counts as failed.
        wait: after that, go on trying (True) or raise the StoreError (False).
        stopping: ends every wait.
        on_retry: called at every failure (counting).
        on_outage: called when an outage begins, with its beginning on the monotonic clock, and when it ends, with 0.
        since: beginning of the outage that lasts, 0 where there is none.
        reason: what the store said last.
    """

    timeout: float
    wait: bool
    stopping: threading.Event
    on_retry: Callable[[], None]
    on_outage: Callable[[float], None] = lambda since: None
    since: float = 0.0
    reason: str = ""
    _pause: float = field(default=FIRST_PAUSE, repr=False)
    _next: float = field(default=0.0, repr=False)
    _failed_at: float = field(default=0.0, repr=False)

    @property
    def resting(self) -> float:
        """Seconds until it is worth asking the store again; 0 where it answers."""
        return max(self._next - time.monotonic(), 0.0) if self.since else 0.0

    def is_over(self, began: float) -> bool:
        """A request that began then has had its time, and a try, and the configuration does not say to wait."""
        return not self.wait and time.monotonic() - began > self.timeout and self._failed_at > began

    def attempt(self, doing: str, function: Callable[[], T]) -> T:
        """The function's result, or its StoreError, noted."""
        try:
            result = function()
        except StoreError as error:
            self._has_failed(doing, error)
            raise
        if self.since:
            log.warning("%s: the store answers again after %.1f s", doing, time.monotonic() - self.since)
            self._forget()
        return result

    def _forget(self) -> None:
        self.since, self.reason, self._pause = 0.0, "", FIRST_PAUSE
        self.on_outage(0.0)

    def call(self, doing: str, function: Callable[[], T], on_failure: Callable[[], bool] = lambda: True) -> T:
        """The function's result, however many attempts it takes.

        `on_failure` is called after each that failed, and says whether anybody still needs the result.
        """
        began = time.monotonic()
        while True:
            try:
                return self.attempt(doing, function)
            except StoreError as error:
                if not on_failure():
                    raise
                if self.is_over(began):
                    self._forget()  # nobody waits any more: whether the store is back shows at the next request
                    raise
                if self.stopping.wait(self.resting):
                    raise Stopped from error

    def _has_failed(self, doing: str, error: StoreError) -> None:
        now = time.monotonic()
        if not self.since:
            log.warning("%s: %s; trying again", doing, error)
            self.since = now
            self.on_outage(now)
        self.reason = str(error)
        self._failed_at, self._next = now, now + self._pause
        self._pause = min(self._pause * 2, LONGEST_PAUSE, self.timeout)
        self.on_retry()

"""Back-off around a store: what fails for now is tried again, and what stays away is told, not hidden.

Owns the retry rule of `store.timeout` and `store.on_failure`; stores themselves never retry.  Used by resolvers
(reading) and the evictor (writing).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from dmh.errors import StoreUnavailable

T = TypeVar("T")
log = logging.getLogger("dmh")

FIRST_PAUSE, LONGEST_PAUSE = 0.01, 2.0


class Stopped(Exception):  # noqa: N818 - not an error: the service is ending
    """The service is stopping, so the request was given up."""


@dataclass(slots=True)
class Retry:
    """Calls with back-off.

    Attributes:
        timeout: seconds until an unavailable store counts as failed.
        wait: after that, go on trying (True) or raise the StoreUnavailable (False).
        stopping: ends every wait.
        on_retry: called at every repetition (counting).
    """

    timeout: float
    wait: bool
    stopping: threading.Event
    on_retry: Callable[[], None]

    def call(self, doing: str, function: Callable[[], T]) -> T:
        """The function's result, however many tries it takes."""
        pause, began, told = FIRST_PAUSE, time.monotonic(), False
        while True:
            try:
                result = function()
            except StoreUnavailable as error:
                overdue = time.monotonic() - began > self.timeout
                if not told or (overdue and not self.wait):
                    log.warning("%s: %s; trying again", doing, error)
                    told = True
                if overdue and not self.wait:
                    raise
                self.on_retry()
                if self.stopping.wait(pause):
                    raise Stopped from error
                pause = min(pause * 2, LONGEST_PAUSE)
            else:
                if told:
                    log.warning("%s: the store answers again after %.1f s", doing, time.monotonic() - began)
                return result

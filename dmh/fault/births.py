"""What the monitor tells the launcher of forked programs.

Owns the descriptors of children's userfaultfds between the kernel and the launcher, which gives them to every worker.
Does not know which process a child is: the launcher learns that from the same messages.  Called by
`workers/monitor.py`; also from its control thread, when the launcher asks whether it knows of every birth.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from dmh.errors import ServiceError
from dmh.native import ffi, lib
from dmh.service.channel import Message

if TYPE_CHECKING:
    from dmh.service.worker import Worker


class Births:
    """Tells births in the order in which the kernel announced them."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._lock = threading.Lock()
        self._birth: Any = ffi.new("struct dmh_birth *")
        self._untold: list[tuple[Message, list[int]]] = []

    def tell(self) -> None:
        """Tell the launcher of every birth so far; what it cannot be told now, the next call tells."""
        with self._lock:
            while lib.dmh_next_birth(self._worker.context, self._birth):
                birth = self._birth
                descriptors = [birth.uffd] if birth.uffd >= 0 else []
                message = {"op": "birth", "view": birth.view, "base": birth.base, "pid": birth.pid}
                self._untold.append((message, descriptors))
            try:
                while self._untold:
                    message, descriptors = self._untold[0]
                    self._worker.channel.send(message, descriptors)
                    del self._untold[0]
                    for fd in descriptors:
                        os.close(fd)  # it comes back with the view
            except ServiceError:
                return

    def answer(self, message: Message) -> Message:
        """The launcher wants to know of every birth before this moment."""
        self.tell()
        return {}

"""Which pages a thread will want next, from the faults it has had.  Pure.

A thread has several *streams* (``a = b + c * d`` has four): a page it will fault on next if it goes on as before, a
stride and a window.  A fault that meets a stream's expectation extends the stream by a window twice as large; pages
that were brought in ahead do not fault, so the next fault of a scan that goes on is the first page after the window.
A fault that meets no expectation starts a stream when it is adjacent to a recent fault, or the third of three equally
spaced ones.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

STREAMS = 8
"""Streams kept for one thread; the one unused for longest goes."""
HISTORY = 8
"""Recent faults that met no stream, kept to find new ones."""
FIRST_WINDOW = 4
"""Pages ahead at a stream's start: a wrong guess costs little, and doubling makes a right one large soon."""
MAX_STRIDE = 64
"""Pages; further apart, a window would bring in mostly what lies between."""
THREADS = 1024
"""Threads remembered; the one that has not faulted for longest is forgotten."""


@dataclass(slots=True)
class Stream:
    """Invariant: expected == last + stride * (window + 1), clipped by nobody: the region's end is the resolver's
    business.
    """

    last: int
    stride: int
    window: int
    expected: int

    def meets(self, page: int) -> bool:
        """Is this fault the stream's continuation?  Short of the expectation is, too: the window was cut for want of
        room.
        """
        steps, rest = divmod(page - self.last, self.stride)
        return rest == 0 and 0 < steps <= self.window + 2

    def advance(self, page: int, limit: int) -> None:
        """Go on from `page` with a window that grows while windows are used up."""
        self.window = min(max(self.window * 2, FIRST_WINDOW), limit)
        self.last = page
        self.expected = page + self.stride * (self.window + 1)


@dataclass(slots=True)
class _Thread:
    streams: list[Stream] = field(default_factory=list)
    recent: deque[int] = field(default_factory=lambda: deque(maxlen=HISTORY))


class Streams:
    """The streams of every thread that faults.

    >>> s = Streams(limit=256)
    >>> [s.observe(1, page) for page in (100, 101, 106)]
    [(1, 0), (1, 4), (1, 8)]
    """

    def __init__(self, limit: int) -> None:
        """`limit`: pages of the largest window; 0 switches read-ahead off."""
        self.limit = limit
        self._threads: OrderedDict[int, _Thread] = OrderedDict()

    def observe(self, thread: int, page: int) -> tuple[int, int]:
        """A fault has happened; returns (stride, window): pages to bring in after it, none where window is 0."""
        if not self.limit:
            return 1, 0
        state = self._threads.get(thread)
        if state is None:
            state = self._threads[thread] = _Thread()
            if len(self._threads) > THREADS:
                self._threads.popitem(last=False)
        streams = state.streams
        for i, stream in enumerate(streams):
            if stream.meets(page):
                stream.advance(page, self.limit)
                if i:
                    streams.insert(0, streams.pop(i))
                return stream.stride, stream.window
        stride = self._new_stride(state.recent, page)
        state.recent.append(page)
        if not stride:
            return 1, 0
        self._threads.move_to_end(thread)
        window = min(FIRST_WINDOW, self.limit)
        streams.insert(0, Stream(page, stride, window, page + stride * (window + 1)))
        del streams[STREAMS:]
        return stride, window

    @staticmethod
    def _new_stride(recent: deque[int], page: int) -> int:
        if page - 1 in recent:
            return 1
        if page + 1 in recent:
            return -1
        for earlier in reversed(recent):
            stride = page - earlier
            if 1 < abs(stride) <= MAX_STRIDE and earlier - stride in recent:
                return stride
        return 0

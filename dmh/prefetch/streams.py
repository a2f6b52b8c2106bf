"""Which pages a thread will want next, from the faults it has had.  Pure.

Owns the rules and the state behind them; does not bring anything in (`workers/monitor.py` hands the windows on).  Every
fault passes here, so the decisions are C (``dmh/native/dmh_streams.c``); these are the rules:

* A thread has several *streams* (``a = b + c * d`` has four).  A fault that meets none votes: it starts a stream when
  the faults before it lead up to it in equal steps, one of them for a step of one page, two for longer ones (up to 64
  pages).
* A stream keeps two windows ahead of the program: the one it walks through, and the one it will need.  The first page
  of each window is left out: it is the *marker*.  Its fault, resolved by itself in a few microseconds, asks for the
  window after, which is fetched while the program works on this one.  A page that is local already would not fault,
  so it is no marker.
* Windows start at 4 pages and double at each marker, up to half the limit; a stream is proven when two markers were
  met.
* Where everything that a longer step passes over is local at two markers in a row, the stream goes on page by page:
  the program has just been there, too.
* All streams at work share what may be ahead: pages read ahead are the first to leave, and would leave unused if they
  were more than that.  At work are those whose markers were among the last 16 that were met.
* A fault elsewhere in a stream's windows: where a resolver has them still to do, the fault is put behind them,
  because a page alone costs as much as five in a window.  Otherwise pages did not come (there was no room), or left
  before they were used; when the faults before it vote for the stream, they are asked for again, in windows half as
  wide if most of them are not there.
* A scan faults nowhere while it walks through pages that are local: a fault that a stream leads up to through nothing
  but those (up to 1024) is its next one.  And pages of a window that are local already are told to the policy as
  expected, or they would leave just before they are used.
* What does not pay is given up: a stream that is never proven makes the thread's next one need a vote more (at most
  three); one that has wasted more than it used halves the thread's widest window.  Streams that go on earn both back.
"""

from __future__ import annotations

from typing import NamedTuple

from dmh.native import ffi, lib

UNLIMITED = 2**32 - 1


class Window(NamedTuple):
    """Pages to bring in: so many from `first`, `stride` apart."""

    first: int
    stride: int
    pages: int


class Streams:
    """The streams of every thread that faults.

    >>> s = Streams(limit=256)
    >>> s.observe(1, 100), s.observe(1, 101)
    ([], [Window(first=102, stride=1, pages=3)])
    >>> s.observe(1, 105)  # the page left out
    [Window(first=106, stride=1, pages=7)]
    >>> s.observe(1, 113)  # proven: one window to walk through, one for later
    [Window(first=114, stride=1, pages=15), Window(first=130, stride=1, pages=15)]
    >>> s.observe(1, 129)
    [Window(first=146, stride=1, pages=31)]
    """

    def __init__(self, limit: int, ahead: int | None = None) -> None:
        """`limit`: pages, the furthest that a stream reads ahead; 0 switches read-ahead off.  `ahead`: pages, for all
        streams together (None: unlimited).
        """
        self.limit = limit
        self.pointer = ffi.gc(lib.dmh_streams_new(limit, UNLIMITED if ahead is None else ahead), lib.dmh_streams_free)
        if self.pointer == ffi.NULL:
            raise MemoryError("no memory for the read-ahead streams")
        self._windows = ffi.new("struct dmh_window[2]")
        self._outlook = ffi.new("struct dmh_outlook *")

    def observe(self, thread: int, page: int) -> list[Window]:
        """A fault has happened where nothing is local; returns the windows to bring in."""
        n = lib.dmh_streams_observe(self.pointer, thread, page, self._outlook, self._windows)
        return [Window(w.first, w.stride, w.count) for w in self._windows[0:n]]

    @property
    def used(self) -> int:
        """Pages of windows that a scan has passed."""
        return int(lib.dmh_streams_used(self.pointer))

    @property
    def wasted(self) -> int:
        """Pages of windows whose stream ended before it came there."""
        return int(lib.dmh_streams_wasted(self.pointer))

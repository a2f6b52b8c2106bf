"""FIFO: the page that has been local for longest goes first.

    arrive(p):  append p
    choose(n):  the n pages at the front

Knows nothing about use.  It is the baseline that every other policy is measured against, and what CLOCK is without
accessed bits.
"""

from dmh.evict.policies.native import NativePolicy


class Fifo(NativePolicy):
    """First in, first out."""

    kernel = "fifo"
    profits_from_marks = False

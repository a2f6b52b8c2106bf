"""CLOCK, the second chance (Corbato, "A paging experiment with the Multics system", 1968).

    arrive(p):  p stands just behind the hand, and is marked
    hand at p:  p was used since its mark:  mark it again, go on
                otherwise:                  evict p

Without accessed information nothing is ever seen used, and it is FIFO.
"""

from dmh.evict.policies.native import NativePolicy


class Clock(NativePolicy):
    """One bit a page."""

    kernel = "clock"

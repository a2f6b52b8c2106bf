"""PGR: probation, ghost window, random-coldest.  Learns from faults alone.

start: probation target Pt = 2 % of M, ghost window 0.9 M, heat fades with eviction time (e^(-dt / 8M))

fault(p):  heat[p] = faded(heat[p]) + 1
           ghost = p was evicted at most 0.9 M evictions ago
           ghost:  Pt += 1 if p was evicted from probation, -1 if from main, within 1 % .. 90 % of M
           to main if ghost, or if probation has Pt pages while memory fills for the first time; else to probation
soft(p):   p was on its way out: to main
victim:    the front of probation if it has more than Pt pages (or main is empty),
           else the coldest of 4 random pages of main
"""

from dmh.evict.policies.native import NativePolicy

PROBATION, GHOST_WINDOW, SAMPLE, FADES_OVER, LEAST, MOST = 0.02, 0.9, 4, 8.0, 0.01, 0.9


class Pgr(NativePolicy):
    """One time stamp, one heat and one bit a page."""

    kernel = "pgr"
    profits_from_marks = False
    tuning = (PROBATION, GHOST_WINDOW, SAMPLE, FADES_OVER, LEAST, MOST)

"""Set duelling between CLOCK and random-coldest.

Duelling sets: Qureshi, Jaleel, Patt, Steely, Emer, "Adaptive insertion policies for high performance caching",
ISCA 2007.

    one page in 64 (8 in a small memory), spread evenly, leads with CLOCK, one with random-coldest; both kinds of
    leaders have their share of M for themselves.  The rest follows the leaders to whom fewer pages come back of late,
    by a margin: where both do equally well, changing sides costs more than either.

    arrive(p):  to main if p was evicted at most M / 4 evictions ago, or while memory fills for the first time;
                else to probation
                heat[p] = faded(heat[p]) + 1, fading with eviction time (e^(-dt / 8M))
    victim, from the group that is furthest above its share:
        CLOCK:           the page that arrived first
        random-coldest:  the front of probation if that has over 2 % of M, else the coldest of 4 random pages of main
        with accessed information, a page of these that was used since it was marked is spared and warmed (by CLOCK: to
        main, at its back), but for probation's: uses right after the first say nothing

Without accessed information CLOCK is FIFO.  It is good where programs come back to what they used last, and where the
working set moves; random-coldest where they loop and scan over more than fits.  Which a program does shows in what
comes back, even if nothing else can be seen.
"""

from dmh.evict.policies.native import NativePolicy

PROBATION, GHOST_WINDOW, SAMPLE, FADES_OVER = 0.02, 0.25, 4, 8.0
LEADERS = 32
"""There are fewer leaders among the pages as long as this many of each kind are local."""
HORIZON = 1.0
"""The score of the duel stays within this many times the leaders' share."""
MARGIN = 0.05
"""The followers change sides when the score is so many times the leaders' share on the other one."""
PATIENCE = 4
"""So many pages in use may be spared, one after another, before one is taken unseen."""


class Duel(NativePolicy):
    """Scan-resistant where that pays."""

    kernel = "duel"
    profits_from_marks = False
    tuning = (PROBATION, GHOST_WINDOW, SAMPLE, FADES_OVER, LEADERS, HORIZON, MARGIN, PATIENCE)

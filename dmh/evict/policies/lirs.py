"""LIRS (Jiang, Zhang, "LIRS: an efficient low inter-reference recency set replacement policy", SIGMETRICS 2002).

    LIR pages (99 % of M) have been used twice within a short time; HIR pages, the queue, have not
    stack: LIR pages, and HIR pages, local or not, that were used after the lowest LIR page was
    use of p:   LIR, or HIR in the stack: to the stack's top as LIR; the lowest LIR page becomes HIR, at the queue's end
                otherwise:                to the stack's top and the queue's end, as HIR
    victim:     the front of the queue; it stays in the stack if it is there (at most M such)
    what lies below the lowest LIR page leaves the stack

Without accessed information a use is a fault.  With marks, the lowest LIR page and the front of the queue are asked
about before they go: a use then counts as one at that moment, which is CLOCK-Pro's way of doing it.
"""

from dmh.evict.policies.native import NativePolicy

HIR, GHOSTS = 0.01, 1.0


class Lirs(NativePolicy):
    """Ranks pages by the time between their last two uses."""

    kernel = "lirs"
    tuning = (HIR, GHOSTS)

"""S3-FIFO (Yang, Zhang, Qiu, Yue, Rashmi, "FIFO queues are all you need for cache eviction", SOSP 2023).

    queues small (10 % of M), main (the rest), ghost (0.9 M page numbers)
    arrive(p):  p is in ghost: to main, else to small (to main if small is full and nothing was ever evicted)
    victim:     main is over its size, or small is empty:
                    front of main; one that was used goes to main's back instead, with one use less
                otherwise:
                    front of small, and its number to ghost; one that was used (twice, where every use is seen, once
                    since its mark, where marks tell) goes to main instead

Without accessed information a page is used again only when it faults again: small is a FIFO, and main what came back
within the ghost window.
"""

from dmh.evict.policies.native import NativePolicy

SMALL, GHOST, ENOUGH_USES = 0.1, 0.9, 2


class S3Fifo(NativePolicy):
    """Quick demotion: most pages that are used once leave by the small queue."""

    kernel = "s3fifo"
    tuning = (SMALL, GHOST, ENOUGH_USES)

"""Random: any local page goes.

    choose(n):  n pages, each as likely as any other

The floor for whoever claims to know something; and nothing can be built that it does worst on.
"""

from dmh.evict.policies.native import NativePolicy


class Random(NativePolicy):
    """No order at all; the same one for the same seed."""

    kernel = "random"
    profits_from_marks = False

"""The default: the policy that is best, or nearly so, on most of the traces in docs/policies.md.

That is set duelling, with accessed information and without; `dmh simulate --table` shows by how much, and where it
loses.
"""

from dmh.evict.policies.duel import Duel


class Auto(Duel):
    """What a region uses unless its configuration says otherwise."""

"""What becomes of regions in a forked child.

Owns the hook that runs in every child that Python forks (`os.fork`, multiprocessing's fork method, `subprocess` with a
`preexec_fn`), before any other code there.  What a region does then is `Region.in_forked_child`.
"""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING

from dmh.native import lib

if TYPE_CHECKING:
    from dmh.region.region import Region

regions: weakref.WeakSet[Region] = weakref.WeakSet()
"""This process's regions."""


def _in_child() -> None:
    lib.dmh_guardians_forget()
    for region in list(regions):
        region.in_forked_child()


os.register_at_fork(after_in_child=_in_child)

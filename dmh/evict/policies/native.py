"""A policy whose loops run in the native module: what dmh's own policies have in common in Python.

Owns the arrays that cross the border.  The algorithms are in dmh/native/dmh_policy_*.c; each is stated in the module of
its class, which names the kernel and gives its tuning.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from dmh.evict.policies.base import Choice, Kinds, Pages, Policy
from dmh.native import ffi, lib, pointer


class NativePolicy(Policy):
    """The class of a kernel."""

    kernel: ClassVar[str]
    """Its name in the native module."""
    tuning: ClassVar[tuple[float, ...]] = ()
    """The algorithm's constants, in the order in which the kernel reads them."""

    def __init__(self, pages: int, limit: int, *, accessed: bool = False, seed: int = 0) -> None:
        if not 1 <= limit <= pages < 2**32 - 1:
            raise ValueError(
                f"a policy for {limit:,} local of {pages:,} pages: at least one page must be local, at most all, and "
                "a region has at most 2^32 - 2 pages; use a larger region.page_size"
            )
        super().__init__(pages, limit, accessed=accessed, seed=seed)
        raw = lib.dmh_policy_new(
            self.kernel.encode(), pages, limit, accessed, seed, list(self.tuning), len(self.tuning)
        )
        if raw == ffi.NULL:
            raise MemoryError(f"no memory for the state of policy {self.kernel} over {pages:,} pages")
        self.raw: Any = ffi.gc(raw, lib.dmh_policy_free)
        self._counts = ffi.new("uint64_t[2]")

    def learn(self, pages: Pages, kinds: Kinds) -> None:
        if len(pages) != len(kinds):
            raise ValueError(f"{len(pages)} pages and {len(kinds)} events")
        pages, kinds = np.ascontiguousarray(pages, np.uint64), np.ascontiguousarray(kinds, np.uint8)
        lib.dmh_policy_learn(self.raw, pointer(pages, "uint64_t[]"), pointer(kinds), len(pages))

    def look(self, most: int) -> Pages:
        out = np.empty(most, np.uint64)
        return out[: lib.dmh_policy_look(self.raw, pointer(out, "uint64_t[]"), most)]

    def choose(self, evict: int, mark: int) -> Choice:
        chosen, marks = np.empty(evict, np.uint64), np.empty(mark, np.uint64)
        n = self._counts
        lib.dmh_policy_choose(
            self.raw, evict, mark, pointer(chosen, "uint64_t[]"), n, pointer(marks, "uint64_t[]"), n + 1
        )
        return Choice(mark=marks[: n[1]], evict=chosen[: n[0]])

    def __len__(self) -> int:
        return int(lib.dmh_policy_count(self.raw))

    def knows(self, pages: Pages) -> npt.NDArray[np.bool_]:
        return np.asarray(self.lists(pages) != 0)

    def lists(self, pages: Pages) -> npt.NDArray[np.uint8]:
        """For each page the number of the list it is in; 0: in none."""
        pages = np.ascontiguousarray(pages, np.uint64)
        out = np.empty(len(pages), np.uint8)
        lib.dmh_policy_lists(self.raw, pointer(pages, "uint64_t[]"), len(pages), pointer(out))
        return out

    def validate(self) -> None:
        wrong = lib.dmh_policy_validate(self.raw)
        assert wrong == ffi.NULL, ffi.string(wrong).decode()

    @property
    def bytes(self) -> int:
        """Memory that its state takes."""
        return int(lib.dmh_policy_bytes(self.raw))

"""Traces for the simulator: from a file, or from a generator.

Owns the file formats that are read and the renumbering of sparse traces.  Called by `dmh simulate` and the study.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmh.errors import DmhError
from dmh.observe.trace import is_recording, read_trace
from dmh.simulate.generators import GENERATORS, Trace, make_trace


@dataclass(frozen=True, slots=True)
class Subject:
    """A trace and what is said of it.

    Attributes:
        pages: page numbers are below it.
        footprint: how many pages it uses; memory sizes are fractions of this.
    """

    name: str
    trace: Trace
    pages: int
    footprint: int

    @classmethod
    def of(cls, name: str, trace: Trace) -> Subject:
        """Page numbers that are far apart are moved together, in order, so that a policy's state stays small."""
        if not len(trace):
            raise DmhError(f"the trace {name} is empty")
        used, dense = np.unique(trace, return_inverse=True)
        if int(used[-1]) >= 4 * len(used):
            return cls(name, dense.astype(np.uint64), len(used), len(used))
        return cls(name, np.ascontiguousarray(trace, np.uint64), int(used[-1]) + 1, len(used))


def subject(source: str, pages: int, seed: int) -> Subject:
    """What `source` names: a generator, or a file.

    Args:
        pages, seed: for generators.
    """
    if source in GENERATORS:
        return Subject.of(source, make_trace(source, pages, seed))
    path = Path(source)
    if not path.exists():
        raise DmhError(f"{source!r} is neither a file nor a generator; generators are {', '.join(GENERATORS)}")
    return Subject.of(path.name, load_trace(path))


def load_trace(path: Path) -> Trace:
    """The page numbers in a file, in the order of their use: a recording of dmh's (``--record``), or .npy, one
    dimension, whole numbers from 0.
    """
    if is_recording(path):
        return read_trace(path).accesses().astype(np.uint64)
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DmhError(
            f"{path} cannot be read as a trace, a .npy file of page numbers or a recording: {error}"
        ) from None
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
        raise DmhError(f"{path} is not a trace: it must hold one array of one dimension of whole numbers")
    if array.dtype.kind == "i" and len(array) and int(array.min()) < 0:
        raise DmhError(f"{path} is not a trace: page numbers are from 0, and it has {int(array.min())}")
    return array.astype(np.uint64)

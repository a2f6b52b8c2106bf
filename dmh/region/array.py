"""Arrays whose memory is a region's, and how they travel to another process: as a handle, not as content.

Owns the array type, the object behind each array by whose end the service learns that its pages are free, and what of
an array is pickled.  Does not own the calls about arrays (`dmh.region.region`).
"""

from __future__ import annotations

import math
import operator
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from dmh.errors import RegionError, ServiceError
from dmh.region.children import regions

if TYPE_CHECKING:
    from dmh.region.region import Region

Shape = int | Sequence[int]
_joined: dict[str, Region] = {}
"""Regions that this process has joined because an array of theirs came in: attached once, until the process ends."""


class Array(np.ndarray[Any, np.dtype[Any]]):
    """An ordinary NumPy array in a region.

    The type adds one thing: pickled, an array (or any view of it) is a handle of some hundred bytes, and whoever
    unpickles it has the same memory.  Results of operations are plain `numpy.ndarray`; so is ``numpy.asarray(a)``,
    which shares the memory and is pickled by content.

    The service keeps the pages for whoever holds the array: pickling lends one hold, which the first to unpickle takes
    over; later ones get another while anybody has one.  A loan that nobody takes ends with the program that lent it.
    """

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        if array is self:  # the target of an operation in place
            return self
        plain = array.view(np.ndarray)
        return plain[()] if return_scalar else plain

    def copy(self, order: Any = "C") -> Any:
        """As `numpy.ndarray.copy`: a plain array outside the region."""
        return np.asarray(self).copy(order)

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        """As `numpy.ndarray.astype`: a plain array outside the region, or a plain view where nothing is to be done."""
        return np.asarray(self).astype(dtype, *args, **kwargs)

    def flatten(self, order: Any = "C") -> Any:
        """As `numpy.ndarray.flatten`: a plain array outside the region."""
        return np.asarray(self).flatten(order)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        region = region_of(self)
        if region is None:  # a selection, say, whose elements were copied out of the region
            return np.asarray(self).__reduce_ex__(protocol)
        offset = self.__array_interface__["data"][0] - region._mapping.base
        block = _block_of(self)
        loan = 0 if block is None or block.first is None else region._lend(block.first)
        return receive, (region._handle(), loan, offset, self.shape, self.strides, self.dtype, self.flags.writeable)

    def __reduce__(self) -> Any:
        return self.__reduce_ex__(2)


class Block:
    """Memory of one array: what NumPy keeps alive as the base of every view, so that its end is the end of the last
    view.

    Attributes:
        first: the first page, where the block is a hold on pages; None where it only names a place.
    """

    __slots__ = ("__array_interface__", "__weakref__", "first", "region")

    def __init__(self, region: Region, offset: int, size: int, first: int | None = None) -> None:
        self.region = region
        self.first = first
        self.__array_interface__ = {
            "version": 3,
            "shape": (size,),
            "typestr": "|u1",
            "data": (region._mapping.base + offset, not region.writable),
        }
        if first is not None:
            weakref.finalize(self, region._free, weakref.ref(region), first).atexit = False


def layout(shape: Shape, kind: np.dtype[Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """A shape as a tuple, with the dimensions of a type that is itself an array appended, as NumPy does it."""
    try:
        dimensions: tuple[int, ...] = (operator.index(shape),)  # type: ignore[arg-type]
    except TypeError:
        dimensions = tuple(operator.index(n) for n in shape)  # type: ignore[union-attr]
    if any(n < 0 for n in dimensions):
        raise RegionError(f"shape {dimensions} has a negative dimension")
    return dimensions + kind.shape, kind.base


def array_over(block: Block, shape: tuple[int, ...], kind: np.dtype[Any]) -> Array:
    """An array of a block's first bytes."""
    size = math.prod(shape) * kind.itemsize
    return np.asarray(block)[:size].view(kind).reshape(shape).view(Array)


def region_of(array: npt.NDArray[Any]) -> Region | None:
    """The region of this process that an array's memory is in."""
    address = array.__array_interface__["data"][0]
    for region in regions:
        if not region._closed and region._mapping.base <= address < region._mapping.base + region.size:
            return region
    return None


def _block_of(array: Any) -> Block | None:
    while isinstance(array, (np.ndarray, memoryview)):
        array = array.base if isinstance(array, np.ndarray) else array.obj
    return array if isinstance(array, Block) else None


# ---- the receiving process

Handle = tuple[str, str, str, str]
"""Of a region: control socket, the service's id, its name, the mode of whoever sent it."""


def join(socket_path: str, service: str, name: str, mode: str) -> Region:
    """What a pickled region becomes: this process's region of that service, joined as the sender had it if it has none.
    Of several, the one of the sender's mode.
    """
    own = [r for r in regions if r._service == service and not r._closed and r._pid == os.getpid()]
    if own:
        return next((region for region in own if region.mode == mode), own[0])
    from dmh.region.region import attach_at  # it imports this module

    region = attach_at(Path(socket_path), mode)
    if region._service != service:
        region.close()
        raise ServiceError(f"the service {name!r} that this came from has ended; another runs under its name")
    _joined[service] = region
    return region


def receive(
    handle: Handle,
    loan: int,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    kind: np.dtype[Any],
    writeable: bool,
) -> Array:
    """What a pickled array becomes; not writeable in a process that has the region with mode "r"."""
    region = join(*handle)
    block, start = region._take_loan(loan) if loan else (Block(region, 0, region.size), 0)
    memory: Any = np.asarray(block)
    array = Array(shape, kind, buffer=memory, offset=offset - start, strides=strides)
    array.flags.writeable = writeable and region.writable
    return array

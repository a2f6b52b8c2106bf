"""Which class serves a store URL, and the trip of a `StoreSpec` to the workers.

Stores are found through the entry-point group ``dmh.stores`` (scheme -> class), so another package can add one.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from dmh.errors import StoreError
from dmh.store.base import Store, StoreSpec

GROUP = "dmh.stores"


def schemes() -> list[str]:
    """The URL schemes that a store is installed for."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def store_class(url: str) -> type[Store]:
    """The class that serves this URL."""
    scheme = url.partition(":")[0]
    for point in entry_points(group=GROUP, name=scheme):
        found: type[Store] = point.load()
        return found
    raise StoreError(
        f"no store is known for {scheme}: URLs; known are {', '.join(schemes()) or 'none (is dmh installed?)'}"
    )


def spec_to_wire(spec: StoreSpec) -> dict[str, Any]:
    """A JSON-able form of the spec."""
    return {name: getattr(spec, name) for name in StoreSpec.__slots__} | {"region_id": spec.region_id.hex()}


def spec_from_wire(wire: dict[str, Any]) -> StoreSpec:
    """The inverse of `spec_to_wire`."""
    return StoreSpec(**(wire | {"region_id": bytes.fromhex(wire["region_id"])}))


def open_store(spec: StoreSpec, descriptors: Sequence[int]) -> Store:
    """The store of `spec` for this process."""
    return store_class(spec.url).open(spec, descriptors)

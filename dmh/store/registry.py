"""Which class serves a store URL, which layers sit on it, and the trip of a `StoreSpec` to the workers.

Stores are found through the entry-point group ``dmh.stores`` (scheme -> class), so another package can add one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from dmh.errors import StoreError
from dmh.store.base import OpenStore, Store, StoreSpec
from dmh.store.layers import encrypt

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


def prepare(spec: StoreSpec) -> list[int]:
    """What `Store.prepare` and the layers make: the descriptors that each worker's `open_store` needs."""
    own = encrypt.prepare(spec) if encrypted(spec) else []
    try:
        return own + store_class(spec.url).prepare(_inner(spec))
    except BaseException:
        for fd in own:
            os.close(fd)
        raise


def open_store(spec: StoreSpec, descriptors: Sequence[int]) -> OpenStore:
    """The store of `spec` for this process, with its layers."""
    layers = encrypt.DESCRIPTORS if encrypted(spec) else 0
    store = store_class(spec.url).open(_inner(spec), descriptors[layers:])
    return encrypt.EncryptedStore(spec, descriptors[:layers], store) if layers else store


def remove(spec: StoreSpec) -> None:
    """`Store.remove`, for what `prepare` made."""
    store_class(spec.url).remove(_inner(spec))


def encrypted(spec: StoreSpec) -> bool:
    """The store holds something else than the pages' own bytes."""
    return spec.encrypt != "none"


def _inner(spec: StoreSpec) -> StoreSpec:
    return encrypt.inner_spec(spec) if encrypted(spec) else spec


def spec_to_wire(spec: StoreSpec) -> dict[str, Any]:
    """A JSON-able form of the spec."""
    return {name: getattr(spec, name) for name in StoreSpec.__slots__} | {"region_id": spec.region_id.hex()}


def spec_from_wire(wire: dict[str, Any]) -> StoreSpec:
    """The inverse of `spec_to_wire`."""
    return StoreSpec(**(wire | {"region_id": bytes.fromhex(wire["region_id"])}))

"""Page numbers, page contents and specifications for tests of stores."""

from __future__ import annotations

import numpy as np

from dmh.store.base import PageBytes, PageNumbers, StoreSpec

REGION_ID = bytes(range(100, 116))


def spec_for(
    url: str, *, region_id: bytes = REGION_ID, page_size: int = 4096, timeout: float = 5.0, encrypt: str = "none"
) -> StoreSpec:
    return StoreSpec(url, "heap", region_id, page_size, pages=1 << 20, timeout=timeout, encrypt=encrypt)


def numbers(*pages: int) -> PageNumbers:
    return np.array(pages, np.uint64)


def first_pages(count: int) -> PageNumbers:
    return np.arange(count, dtype=np.uint64)


def contents(rng: np.random.Generator, count: int, page_size: int = 4096) -> PageBytes:
    return rng.integers(0, 256, (count, page_size), np.uint8)


def empty(count: int, page_size: int = 4096) -> PageBytes:
    return np.empty((count, page_size), np.uint8)

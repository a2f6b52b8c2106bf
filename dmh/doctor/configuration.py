"""A configuration against this machine: does everything that it asks for fit, and does its store keep a page?

The store is tried out with a region's name space of its own, from which everything is deleted again; the page file of a
`file:` store is locked meanwhile, as a service would do it.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator

import numpy as np

from dmh.config import Config, about, without_password
from dmh.doctor.finding import Finding, Level
from dmh.errors import KernelError, ServiceError, StoreError
from dmh.evict.idle import choose_source
from dmh.machine import kernel, memory
from dmh.service.paths import check_length, running_services, service_directory
from dmh.service.requirements import most_programs, needs
from dmh.store import registry
from dmh.store.base import Found, StoreSpec

PATIENCE_SECONDS = 5.0


def findings(config: Config, file: str) -> Iterator[Finding]:
    """What this machine says to `config`, which was read from `file`."""
    group = f"configuration {file}"
    if error := kernel.capture_error(config.region.page_size):
        yield Finding(
            group,
            "region.page_size",
            about(config.region.page_size),
            Level.BAD,
            f"pages of this size cannot be captured here: {os.strerror(error)}",
            "take smaller pages",
        )
    try:
        source = choose_source(config.evictor.idle, config.region.page_size, config.evictor.policy)
        yield Finding(group, "evictor.idle", source, Level.OK, f"what {config.evictor.idle} comes to here")
    except KernelError as error:
        yield Finding(group, "evictor.idle", config.evictor.idle, Level.BAD, str(error), "evictor.idle=auto")
    for need in needs(config):
        if need.missing:
            exact = "" if need.unit else f" ({need.missing:,} bytes)"
            yield Finding(
                group,
                need.what,
                f"{need.show(need.missing)}{exact} missing",
                Level.BAD,
                f"{need.show(need.needed)} needed ({need.of}), {need.show(need.available)} {need.bound}",
                need.mend,
            )
        else:
            yield Finding(group, need.what, need.summary(), Level.OK, need.of)
    programs = most_programs(config.workers.resolvers)
    yield Finding(group, "programs", f"up to {max(programs, 0)} at a time", Level.INFO, "bounded by `ulimit -n`")
    yield from _arena(config, group)
    yield from _name(config, group)


def _arena(config: Config, group: str) -> Iterator[Finding]:
    """A store in this machine's memory may come to hold the whole region, outside of the limit."""
    rooms = memory.rooms()
    if config.store.url.startswith("memory:") and rooms:
        both = config.memory.limit + config.region.size
        fits = both <= rooms[0].bytes
        yield Finding(
            group,
            "memory: store",
            f"up to {about(config.region.size)}",
            Level.INFO if fits else Level.LESS,
            "evicted pages stay in this machine's memory, outside of memory.limit",
            "" if fits else f"only {about(rooms[0].bytes)} {rooms[0].bound}: take a file: store",
        )


def _name(config: Config, group: str) -> Iterator[Finding]:
    name = config.region.name
    try:
        check_length(service_directory(name))
    except ServiceError as error:
        yield Finding(group, "region.name", name, Level.BAD, str(error), "choose a shorter one")
    if name in running_services():
        yield Finding(
            group,
            "region.name",
            name,
            Level.INFO,
            "a service of this name runs already, or was killed; the store is left alone",
            "join it, or `dmh serve --stop`",
        )
    else:
        yield _store(config, group)


def _store(config: Config, group: str) -> Finding:
    """Write a page, read it back, delete it."""
    region, url = config.region, config.store.url
    timeout = min(config.store.timeout, PATIENCE_SECONDS)
    pages = region.size // region.page_size
    region_id = secrets.token_bytes(16)
    spec = StoreSpec(url, region.name, region_id, region.page_size, pages, timeout, config.store.encrypt)
    shown = without_password(url)
    try:
        descriptors = registry.prepare(spec)
        try:
            store = registry.open_store(spec, descriptors)
            try:
                number = np.array([pages - 1], np.uint64)
                page = np.frombuffer(secrets.token_bytes(region.page_size), np.uint8).reshape(1, -1)
                back = np.zeros_like(page)
                began = time.perf_counter()
                store.put_many(number, page)
                found = store.get_many(number, back)
                took = (time.perf_counter() - began) * 1000
                store.delete_many(number)
            finally:
                store.close()
        finally:
            registry.remove(spec)
    except StoreError as error:
        return Finding(group, "store", shown, Level.BAD, without_password(str(error)), "")
    if found[0] != Found.THERE or not np.array_equal(page, back):
        return Finding(
            group, "store", shown, Level.BAD, "a page that was written could not be read back", "another store"
        )
    return Finding(group, "store", shown, Level.OK, f"a page written and read back in {took:.1f} ms")

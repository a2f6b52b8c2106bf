"""The encryption layer over real stores: what a store gets to see, what it can do with it, and where the key shows."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from regions import launcher_of, pattern, processes_of, settings
from store_pages import contents, empty, first_pages, numbers, spec_for
from store_servers import RedisServer
from stored import StoredInRedis, StoredPages

import dmh
from dmh.errors import ConfigError, StoreError, StoreUnavailable
from dmh.store import registry
from dmh.store.base import Found, Mask, OpenStore, PageBytes, PageNumbers, StoreSpec
from dmh.store.layers.encrypt import EncryptedStore, prepare
from dmh.store.secrets import without_secrets

OpenRegion = Callable[..., dmh.Region]
SLOT = 4096 + 16


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_text(os.urandom(32).hex() + "\n")
    return path


@contextmanager
def opened(spec: StoreSpec) -> Iterator[tuple[OpenStore, list[int]]]:
    descriptors = registry.prepare(spec)
    store = registry.open_store(spec, descriptors)
    yield store, descriptors
    store.close()
    registry.remove(spec)


@pytest.mark.parametrize("kind", ["file", "memory", "redis"])
@pytest.mark.parametrize("page_size", [4096, 16384])
def test_pages_come_back_and_the_store_sees_nothing_of_them(
    kind: str, page_size: int, key_file: Path, tmp_path: Path, rng: np.random.Generator, request: pytest.FixtureRequest
) -> None:
    url = {"file": f"file://{tmp_path}/pages", "memory": "memory:"}.get(kind)
    server: RedisServer | None = None
    if url is None:
        server = request.getfixturevalue("redis_server")
        url = server.unix_url
    spec = spec_for(url, page_size=page_size, encrypt=f"file:{key_file}")
    with opened(spec) as (store, descriptors):
        pages, data = first_pages(40), contents(rng, 40, page_size)
        data[7] = 0x41  # a page that would be seen anywhere
        store.put_many(pages, data)
        out = empty(40, page_size)
        assert (store.get_many(pages, out) == Found.THERE).all()
        assert np.array_equal(out, data)
        assert store.get_many(numbers(3, 41), empty(2, page_size)).tolist() == [Found.THERE, Found.MISSING]
        size = page_size + 16
        stored = StoredInRedis(server, size) if server else StoredPages(os.dup(descriptors[2]), size)
        seen = b"".join(stored.read(page) for page in range(40))
        stored.close()
        assert all(row.tobytes()[at : at + 16] not in seen for row in data for at in (0, page_size - 16))
        assert len({seen[at : at + 16] for at in range(0, len(seen), 16)}) == len(seen) // 16  # nothing repeats
        store.delete_many(numbers(0, 1))
        assert store.get_many(numbers(0, 1, 2), empty(3, page_size)).tolist() == [0, 0, 1]


class Held(OpenStore):
    """A store of one batch, that remembers everything it was ever given, and may fail after it has taken it."""

    def __init__(self) -> None:
        self.rows: dict[int, bytes] = {}
        self.seen: list[bytes] = []
        self.failing = False

    def get_many(self, pages: PageNumbers, out: PageBytes) -> Mask:
        for row, page in zip(out, pages.tolist(), strict=True):
            if page in self.rows:
                row[:] = np.frombuffer(self.rows[page], np.uint8)
        return np.array([page in self.rows for page in pages.tolist()], np.uint8)

    def put_many(self, pages: PageNumbers, data: PageBytes) -> None:
        self.rows |= {page: row.tobytes() for page, row in zip(pages.tolist(), data, strict=True)}
        self.seen += [row.tobytes() for row in data]
        if self.failing:
            raise StoreUnavailable("its answer was lost")

    def delete_many(self, pages: PageNumbers) -> None:
        raise AssertionError

    def flush(self) -> None:
        raise AssertionError

    def close(self) -> None:
        pass


@pytest.fixture
def layer(key_file: Path) -> Iterator[tuple[EncryptedStore, Held, Callable[[], EncryptedStore]]]:
    spec, below = spec_for("memory:", encrypt=f"file:{key_file}"), Held()
    descriptors = prepare(spec)
    made = []

    def another() -> EncryptedStore:
        """As the next process to hold the same descriptors opens it."""
        made.append(EncryptedStore(spec, [os.dup(fd) for fd in descriptors], below))
        return made[-1]

    yield another(), below, another
    for store in made:
        store.close()
    for fd in descriptors:
        os.close(fd)


def test_no_nonce_is_used_twice(layer: Any) -> None:
    """With one nonce, equal pages would be equal bytes: so whatever was written, and by whom, all of it differs."""
    store, below, another = layer
    pages, same = first_pages(3), np.zeros((3, 4096), np.uint8)
    store.put_many(pages, same)
    below.failing = True
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            store.put_many(pages, same)
    below.failing = False
    successor = another()
    successor.put_many(pages, same)
    store.put_many(pages, same)
    assert len(below.seen) == 18
    blocks = [row[at : at + 16] for row in below.seen for at in range(0, 4096, 16)]
    assert len(set(blocks)) == len(blocks)
    assert (successor.get_many(pages, empty(3)) == Found.THERE).all()  # what another process wrote last


@pytest.mark.parametrize("at", [0, 1, 2047, 4095, 4096, 4111])
def test_one_bit_anywhere_is_noticed(layer: Any, rng: np.random.Generator, at: int) -> None:
    store, below, _ = layer
    pages, data, out = first_pages(3), contents(rng, 3), empty(3)
    store.put_many(pages, data)
    forged = bytearray(below.rows[1])
    forged[at] ^= 1
    below.rows[1] = bytes(forged)
    assert store.get_many(pages, out).tolist() == [Found.THERE, Found.DAMAGED, Found.THERE]
    assert np.array_equal(out[[0, 2]], data[[0, 2]])


def test_a_page_is_bound_to_its_place_its_version_and_its_region(
    layer: Any, rng: np.random.Generator, key_file: Path
) -> None:
    store, below, _ = layer
    store.put_many(first_pages(2), contents(rng, 2))
    older = dict(below.rows)
    store.put_many(first_pages(2), contents(rng, 2))
    good = dict(below.rows)
    for rows in ({0: good[1], 1: good[0]}, older, {0: bytes(SLOT), 1: bytes(SLOT)}):
        below.rows = rows
        assert store.get_many(first_pages(2), empty(2)).tolist() == [Found.DAMAGED] * 2
    other = spec_for("memory:", region_id=b"another region's", encrypt=f"file:{key_file}")
    elsewhere = Held()
    stranger = EncryptedStore(other, prepare(other), elsewhere)
    for _ in range(2):
        stranger.put_many(first_pages(2), contents(rng, 2))
    below.rows = elsewhere.rows
    assert store.get_many(first_pages(2), empty(2)).tolist() == [Found.DAMAGED] * 2
    below.rows = good
    assert store.get_many(first_pages(2), empty(2)).tolist() == [Found.THERE] * 2
    stranger.close()


class TestTheKey:
    RAW = bytes(range(200, 232))

    @pytest.mark.parametrize(
        "content", [RAW, RAW.hex().encode(), RAW.hex().upper().encode() + b"\n", base64.b64encode(RAW) + b"\n"]
    )
    def test_is_taken_in_every_form(self, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "key"
        path.touch(0o600)
        path.write_bytes(content)
        monkeypatch.setenv("THE_KEY", self.RAW.hex())
        keys = set()
        for source in (f"file:{path}", "env:THE_KEY"):
            key_fd, versions_fd = prepare(spec_for("memory:", encrypt=source))
            keys.add(os.pread(key_fd, 64, 0))
            os.close(key_fd)
            os.close(versions_fd)
        assert len(keys) == 1
        assert self.RAW not in keys  # a region's key is derived

    @pytest.mark.parametrize(
        ("content", "mode", "says"),
        [
            (RAW, 0o640, "chmod 600"),
            (RAW, 0o604, "chmod 600"),
            (RAW[:31], 0o600, "holds no key"),
            (b"", 0o600, "holds no key"),
            (b"correct horse battery staple", 0o600, "holds no key"),
            (RAW.hex().encode() + b"00", 0o600, "holds no key"),
        ],
    )
    def test_that_is_unfit_is_refused_and_not_shown(self, content: bytes, mode: int, says: str, tmp_path: Path) -> None:
        path = tmp_path / "key"
        path.touch(mode)
        path.write_bytes(content)
        with pytest.raises(StoreError, match=says) as refused:
            prepare(spec_for("memory:", encrypt=f"file:{path}"))
        assert str(path) in str(refused.value)
        assert "horse" not in str(refused.value)

    def test_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="No such file"):
            prepare(spec_for("memory:", encrypt=f"file:{tmp_path}/none"))
        with pytest.raises(StoreError, match="NO_SUCH_KEY is not set"):
            prepare(spec_for("memory:", encrypt="env:NO_SUCH_KEY"))

    def test_written_into_the_configuration_is_refused_and_not_repeated(self) -> None:
        with pytest.raises(
            ConfigError, match=r"store.encrypt=\.\.\.: must be none, file:PATH or env:VARIABLE"
        ) as refused:
            settings(f"store.encrypt={self.RAW.hex()}")
        assert self.RAW.hex() not in str(refused.value)


class TestSecrets:
    PASSWORD = "Pässw/rd-of-the-store"

    def test_are_nowhere_to_be_seen(
        self,
        open_region: OpenRegion,
        start_redis: Callable[..., RedisServer],
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """Not in the process list, the workers' environment, the log, the statistics, an error, the store."""
        server = start_redis(requirepass=self.PASSWORD)
        key = os.urandom(32).hex()
        quoted = quote(self.PASSWORD, safe="")
        monkeypatch.setenv("STORE_PASSWORD", quoted)
        monkeypatch.setenv("PAGE_KEY", key)
        region = open_region(
            f"store.url=unix://:${{STORE_PASSWORD}}@{server.socket_path}", "store.encrypt=env:PAGE_KEY",
            "store.timeout=500ms", "prefetch.enabled=false",
        )  # fmt: skip
        array = region.empty((128, 4096), "u1")
        for page in range(128):
            array[page] = pattern(page, 4096)
        assert all((array[page] == pattern(page, 4096)).all() for page in range(128))
        region.evict(array)
        shown = [repr(region.stats()), StoredInRedis(server, SLOT).everything().decode("latin-1")]
        launcher, *workers = processes_of(launcher_of(region))
        for pid in (launcher, *workers):
            shown.append(Path(f"/proc/{pid}/cmdline").read_bytes().decode("latin-1"))
        for pid in workers:
            shown.append(Path(f"/proc/{pid}/environ").read_bytes().decode("latin-1"))
        server.kill()
        with pytest.raises(OSError, match="Bad address"):
            os.pwrite(os.memfd_create("copy"), array[0].data, 0)
        shown.append(repr(region.stats()))
        region.close()
        shown.append(capfd.readouterr().err)
        assert "unavailable" in shown[-1]
        for text in shown:
            for secret in (self.PASSWORD, quoted, key, bytes.fromhex(key).decode("latin-1")):
                assert secret not in text
                assert secret.encode().decode("latin-1") not in text

    def test_stay_out_of_the_workers_environment_in_every_form(self) -> None:
        environment = {
            "A": "secret-word", "B": "x secret-word y", "C": "secret%2Dword", "D": "harmless", "E": "KEY", "F": "a KEY b",
        }  # fmt: skip
        left = without_secrets(environment, "redis://:secret%2Dword@host/0", "env:E")
        assert set(left) == {"D", "F"}
        assert set(without_secrets(environment, "redis://host?password=secret-word", "none")) == {"C", "D", "E", "F"}
        assert without_secrets(environment, "file:///var/tmp/pages", "file:/key") == environment

"""Encryption of pages: a store that is read by somebody else reveals none, one that is written to can forge none.

Owns the key, the versions and the form of an encrypted page; the store below holds whatever it is given.  Opened by
`dmh.store.registry`.

A page is AES-256-GCM: as many bytes as the page, then the tag of 16.  What it is bound to:

- The key is derived (HKDF-SHA256) from the user's key with the region's id as salt.  A region's id is random and new
  with every service, so one key file serves any number of regions and none has another's key.
- The nonce is the page's number and its version, 6 bytes each, and is not stored: whoever reads a page knows both.
  The version counts attempts to write the page, in shared memory that outlives any worker, and goes up *before* an
  attempt.  So no nonce is ever used twice with a key: not by a retry, not by the successor of an evictor that died.
- Region id, page number and version are the associated data as well.

So a page that was altered, moved to another page's place, taken from another region or replaced by an older version of
itself fails its tag.  What an observer does see: which pages are written and read, when, and how often.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import mmap
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from dmh.errors import StoreError
from dmh.store.base import Found, Mask, OpenStore, PageBytes, PageNumbers, StoreSpec

KEY_BYTES = 32
TAG_BYTES = 16
DESCRIPTORS = 2
"""Of this layer, before the store's own: the region's key, the versions."""

_FORMS = f"{KEY_BYTES} random bytes, or the same as {2 * KEY_BYTES} hexadecimal digits or in base64"


def inner_spec(spec: StoreSpec) -> StoreSpec:
    """What the store below is told: its pages are longer, and where the key is does not concern it."""
    return replace(spec, page_size=spec.page_size + TAG_BYTES, encrypt="none")


def prepare(spec: StoreSpec) -> list[int]:
    """The region's key and its versions, in memory that only holders of these descriptors can read.

    Raises:
        StoreError: the user's key is not there, or unfit.
    """
    derived = HKDF(SHA256(), KEY_BYTES, salt=spec.region_id, info=b"dmh page encryption 1").derive(_users_key(spec))
    key_fd = os.memfd_create("dmh-page-key", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(key_fd, derived)
    fcntl.fcntl(key_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    versions_fd = os.memfd_create("dmh-page-versions", os.MFD_CLOEXEC)
    os.ftruncate(versions_fd, spec.pages * 8)
    return [key_fd, versions_fd]


def _users_key(spec: StoreSpec) -> bytes:
    """The key that ``store.encrypt`` names.  No message quotes what was found there."""
    kind, _, place = spec.encrypt.partition(":")
    if kind == "env":
        text = os.environ.get(place)
        if text is None:
            raise _refusal(spec, "is not set: export the key in it", place)
        content = text.encode()
    else:
        path = Path(place).expanduser()
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                content = file.read(4096)
        except OSError as error:
            raise _refusal(spec, f"cannot be read: {error.strerror}", path) from None
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise _refusal(spec, f"can be read by others (mode {stat.S_IMODE(mode):04o}): chmod 600 it", path)
    key = _decoded(content)
    if key is None:
        raise _refusal(spec, f"holds no key: it must be {_FORMS}, as from `openssl rand -hex {KEY_BYTES}`", place)
    return key


def _decoded(content: bytes) -> bytes | None:
    if len(content) == KEY_BYTES:
        return content
    text = content.strip()
    if re.fullmatch(rb"[0-9A-Fa-f]{%d}" % (2 * KEY_BYTES), text):
        return binascii.unhexlify(text)
    try:
        key = base64.b64decode(text, validate=True)
    except binascii.Error:
        return None
    return key if len(key) == KEY_BYTES else None


def _refusal(spec: StoreSpec, what: str, place: object) -> StoreError:
    kind = "the environment variable" if spec.encrypt.startswith("env:") else "the key file"
    return StoreError(f"store.encrypt: {kind} {place} {what}", region=spec.region)


class EncryptedStore(OpenStore):
    """Pages encrypted on their way to another store, verified and decrypted on their way back.

    Invariant: a page's version does not change while its state is STORED or FETCHING from the store; only the evictor
    writes, and only pages that it has in the victim buffer.
    """

    def __init__(self, spec: StoreSpec, descriptors: Sequence[int], below: OpenStore) -> None:
        self._spec = spec
        self._below = below
        self.elsewhere = below.elsewhere
        self._key_fd, self._versions_fd = descriptors
        self._cipher = AESGCM(os.pread(self._key_fd, KEY_BYTES, 0))
        memory = mmap.mmap(self._versions_fd, spec.pages * 8)
        self._versions: npt.NDArray[np.uint64] = np.frombuffer(memory, np.uint64)
        self._sealed = np.empty((0, spec.page_size + TAG_BYTES), np.uint8)

    def get_many(self, pages: PageNumbers, out: PageBytes) -> Mask:
        sealed = self._room(len(pages))
        found = self._below.get_many(pages, sealed)
        decrypt = self._cipher.decrypt_into
        there = (found == Found.THERE).tolist()
        for i, (nonce, bound) in enumerate(self._bindings(pages)):
            if not there[i]:
                continue
            try:
                decrypt(nonce, sealed[i].data, bound, out[i].data)
            except InvalidTag:
                found[i] = Found.DAMAGED
        return found

    def put_many(self, pages: PageNumbers, data: PageBytes) -> None:
        # Before anything is encrypted: whatever becomes of this attempt, its nonces are used up.
        self._versions[pages] += np.uint64(1)
        sealed = self._room(len(pages))
        encrypt = self._cipher.encrypt_into
        for i, (nonce, bound) in enumerate(self._bindings(pages)):
            encrypt(nonce, data[i].data, bound, sealed[i].data)
        self._below.put_many(pages, sealed)

    def _room(self, count: int) -> PageBytes:
        if len(self._sealed) < count:
            self._sealed = np.empty((count, self._sealed.shape[1]), np.uint8)
        return self._sealed[:count]

    def _bindings(self, pages: PageNumbers) -> Iterator[tuple[bytes, bytes]]:
        """For each page, as its version is now: the nonce and the associated data."""
        numbers = pages.astype(">u8").tobytes()
        versions = self._versions[pages].astype(">u8").tobytes()
        region = self._spec.region_id
        for i in range(0, len(numbers), 8):
            number, version = numbers[i : i + 8], versions[i : i + 8]
            yield number[2:] + version[2:], region + number + version

    def delete_many(self, pages: PageNumbers) -> None:
        self._below.delete_many(pages)

    def flush(self) -> None:
        self._below.flush()

    def epoch(self) -> str | None:
        return self._below.epoch()

    def stats(self) -> dict[str, Any]:
        return self._below.stats() | {"encryption": "AES-256-GCM"}

    def close(self) -> None:
        self._below.close()
        os.close(self._key_fd)
        os.close(self._versions_fd)

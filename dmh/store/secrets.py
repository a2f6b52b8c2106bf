"""What of a store's settings is secret, and an environment without it.

Owns no secret and keeps none.  The launcher gives its workers what they need by socket and descriptor, so nothing
secret has to stand in their environment, where every process of the same user and every crash report would find it.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import parse_qs, unquote, urlsplit

LONG = 8
"""A secret of so many characters is looked for inside longer values too; a shorter one may stand there by chance."""


def passwords_in(url: str) -> set[str]:
    """Every form in which the password of a URL may stand somewhere: as written there, and as meant."""
    try:
        parts = urlsplit(url)
        found = {parts.password or "", *parse_qs(parts.query).get("password", [])}
    except ValueError:
        return set()
    return {form for text in found if text for form in (text, unquote(text))}


def without_secrets(environment: Mapping[str, str], url: str, encrypt: str) -> dict[str, str]:
    """The environment without the variables that hold the store's password or the key that ``store.encrypt`` names."""
    secrets = passwords_in(url)
    kind, _, place = encrypt.partition(":")
    if kind == "env" and (key := environment.get(place)):
        secrets.add(key)

    def tells(value: str) -> bool:
        return any(value == secret or (len(secret) >= LONG and secret in value) for secret in secrets)

    return {name: value for name, value in environment.items() if not tells(value)}

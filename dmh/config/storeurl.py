"""The store's URL: variables and `~` replaced, its scheme known, a file's path absolute, a password hidden.

Owns what of `store.url` depends on where the configuration is loaded; called by `load`, once, so that the workers,
which may run in another directory, all see the result.  What a URL means beyond that is its store's business.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.metadata import entry_points

from dmh.config.quantity import refusal

STORE_GROUP = "dmh.stores"

_FORM = "a URL such as file:///var/tmp/dmh.pages or redis://127.0.0.1:6379/0"


def store_schemes() -> tuple[str, ...]:
    """The URL schemes of the installed stores (entry-point group `dmh.stores`), sorted."""
    return tuple(sorted({entry.name for entry in entry_points(group=STORE_GROUP)}))


def resolve_url(value: object, environment: Mapping[str, str], schemes: tuple[str, ...]) -> str:
    """The URL that the workers use.

    Args:
        value: `store.url` as written.
        environment: where ${VARIABLE} is looked up.
        schemes: the schemes that have a store.

    Returns:
        The URL; a file store's is file:///absolute/path, not percent-encoded, its query kept.

    Raises:
        ValueError: not a URL, an unset variable, or a scheme that no store has.
    """
    if not isinstance(value, str) or not value:
        raise refusal(value, _FORM)
    url = _with_variables(value, environment)
    scheme, _, rest = url.partition(":")
    if scheme == url or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        hint = f"for a page file write file:{without_password(url)}" if "/" in url else ""
        raise refusal(without_password(url), _FORM, hint)
    scheme = scheme.lower()
    if scheme not in schemes:
        known = ", ".join(schemes) or "none: install dmh with pip, for stores are found by its entry points"
        raise ValueError(f"no store for the scheme {scheme!r}; known: {known}")
    slashes = "//" if rest.startswith("//~") else ""
    rest = slashes + os.path.expanduser(rest.removeprefix(slashes)) if rest.startswith(("~", "//~")) else rest
    return _file_url(rest) if scheme == "file" else f"{scheme}:{rest}"


def _with_variables(url: str, environment: Mapping[str, str]) -> str:
    """Replace every ${VARIABLE}; a bare $ stays, for a password may have one."""
    unset = []

    def value_of(match: re.Match[str]) -> str:
        if match[1] not in environment:
            unset.append(match[0])
            return ""
        return environment[match[1]]

    url = re.sub(r"\$\{([^}]*)\}", value_of, url)
    if unset:
        raise ValueError(
            f"environment variable{'s' if len(unset) > 1 else ''} {', '.join(unset)} not set: set and export it, or "
            "write its value"
        )
    return url


def _file_url(rest: str) -> str:
    """file:///absolute/path for what follows "file:", relative to the current directory."""
    path, question, query = rest.partition("?")
    if path.startswith("//"):
        host, _, tail = path[2:].partition("/")
        if host:
            raise ValueError(
                f"two slashes name a host ({host!r}), and a page file is local: write file:///{host}/{tail} for the "
                f"path from the root, or file:{host}/{tail} for the one from the current directory"
            )
        path = f"/{tail}"
    if not path or path.endswith("/"):
        raise ValueError("names no file: write file:///directory/name or file:name")
    return f"file://{os.path.abspath(path)}{question}{query}"


def without_password(text: str) -> str:
    """A URL, or text with one in it, as it may be shown."""
    text = re.sub(r"(//[^:/@]*):.*@", r"\1:***@", text)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", text)

"""From a YAML file and overrides to a `Config`, or to every problem at once.

Owns the order of the steps (parse, override, each setting alone, settings against each other) and that one run reports
all problems, each with the place where it was written.  Owns no rule about values: `model`, `limits` and `storeurl` do.
Called by the command line and by `dmh.open`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from pydantic import ValidationError

from dmh.config.document import Document, read_document
from dmh.config.limits import contradictions
from dmh.config.model import SECTIONS, Config, describe_native
from dmh.config.storeurl import resolve_url, store_schemes
from dmh.errors import ConfigError

# What stands in for a required setting that is missing or refused, so that the others can be checked against each
# other; no check looks at these values themselves.
_STAND_INS: dict[str, object] = {"region.size": 1 << 30, "memory.limit": 1 << 28, "store.url": "memory:"}


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The configuration in a file.

    Args:
        path: a YAML file.
        overrides: settings in place of the file's, as "memory.limit=64MiB"; the value is a YAML scalar or list.

    Raises:
        ConfigError: every problem of the file and the overrides, each with its place and its mend.

    Example:
        >>> config = load("configs/quickstart.yaml", ["memory.limit=512MiB"])
        >>> config.memory.limit
        536870912
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            content = file.read()
    except OSError as error:
        raise ConfigError([f"{name}: cannot be read: {error.strerror}"]) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{name}:{line}: not UTF-8 text: byte 0x{content[error.start]:02x}"]) from None
    return loads(text, overrides, name=name)


def loads(text: str, overrides: Sequence[str] = (), *, name: str = "<text>") -> Config:
    """The configuration in a text; `name` stands for the file in messages.  Otherwise as `load`.

    Raises:
        ConfigError: every problem of the text and the overrides.
    """
    document = read_document(text, name)
    for position, override in enumerate(overrides, 1):
        document.override(override, position)
    config, refused = _each_alone(document)
    for problem in contradictions(config, refused):
        _report(document, problem.message, *problem.settings)
    if document.problems:
        # The file from its top, then the overrides, whichever step found the problem.
        found = sorted(document.problems, key=lambda problem: problem[0])
        raise ConfigError([f"{place.text}: {message}" for place, message in found])
    return config


def _each_alone(document: Document) -> tuple[Config, set[str]]:
    """Check each setting by itself, and report to the document what is wrong.

    Returns:
        The configuration, with defaults and stand-ins for settings that have no usable value, and the set of those.
    """
    values = document.values
    # What the document refused is written somewhere and yet has no value.
    refused = {setting for setting in document.places if "." in setting} - values.keys()
    if "store.url" in values:
        try:
            values["store.url"] = resolve_url(values["store.url"], os.environ, store_schemes())
        except ValueError as error:
            _report(document, str(error), "store.url")
            refused.add("store.url")
            del values["store.url"]
    try:
        return Config.model_validate(_nested(values)), refused
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            section, key = map(str, detail["loc"])
            setting = f"{section}.{key}"
            if setting in refused:
                continue  # missing only because the document refused it, and told why
            refused.add(setting)
            if detail["type"] == "missing":
                _report(document, f"missing: {SECTIONS[section].model_fields[key].description}", setting)
            elif detail["type"] == "value_error":
                _report(document, str(detail["ctx"]["error"]), setting)
            else:
                _report(document, describe_native(section, key, detail["input"]), setting)
    usable = {setting: value for setting, value in values.items() if setting not in refused}
    return Config.model_validate(_nested(_STAND_INS | usable)), refused


def _report(document: Document, message: str, *settings: str) -> None:
    """Add a problem of the first of `settings`, at the first of them that is written anywhere."""
    place = document.place_of(*settings)
    # An override of that very setting names it in its place already.
    named = place.override and document.places.get(settings[0]) == place
    document.problems.append((place, message if named else f"{settings[0]}: {message}"))


def _nested(values: dict[str, object]) -> dict[str, dict[str, object]]:
    """{"memory.limit": 1} as {"memory": {"limit": 1}, ...}, with every section, so that only keys can be missing."""
    nested: dict[str, dict[str, object]] = {section: {} for section in SECTIONS}
    for setting, value in values.items():
        section, _, key = setting.partition(".")
        nested[section][key] = value
    return nested

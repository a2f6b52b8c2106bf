"""A configuration's text as raw settings, each with its place: YAML files and `--set` overrides.

Owns the YAML parsing, the refusal of duplicate and unknown keys, and where each setting was written.  What a value must
be is `model`'s business.  Pure: called by `load` with the text of a file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import yaml

from dmh.config.model import SECTIONS
from dmh.config.quantity import show
from dmh.config.storeurl import without_password
from dmh.errors import ConfigError

_YAML_TAG = "tag:yaml.org,2002:"


class Place(NamedTuple):
    """Where something was written; sorts as a person reads: the file from its top, then the overrides."""

    override: int  # 0: in the file; else its position among the overrides, from 1
    line: int
    text: str


@dataclass
class Document:
    """The settings as written, not yet validated.

    Attributes:
        name: what messages call the file.
        values: raw value by setting ("memory.limit").
        places: by setting and by section ("memory"), where it was written.
        problems: what was wrong already, with its place.
    """

    name: str
    values: dict[str, object] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    problems: list[tuple[Place, str]] = field(default_factory=list)

    def at(self, line: int) -> Place:
        """The place of a line (counted from 1) of the file."""
        return Place(0, line, f"{self.name}:{line}")

    def place_of(self, *settings: str) -> Place:
        """Where to mend a problem between these settings.

        At an override of one of them, for the file was fine without it; else where the first of them was written; else
        where the first one's section is, or the file begins.
        """
        written = [self.places[setting] for setting in settings if setting in self.places]
        overridden = [place for place in written if place.override]
        section = self.places.get(settings[0].partition(".")[0], self.at(1))
        return [*overridden, *written, section][0]

    def override(self, text: str, position: int) -> None:
        """Replace one setting by an override such as "memory.limit=64MiB"; the last one for a setting wins."""
        setting, equals, written = text.partition("=")
        setting = setting.strip()
        shown = (
            "store.encrypt=..." if setting == "store.encrypt" else without_password(text)
        )  # it may hold the key itself
        place = Place(position, 0, f"--set {shown}")
        section, _, key = setting.partition(".")
        if section in SECTIONS and (not key or not equals):
            keys = ", ".join(f"{section}.{k}" for k in _keys(section))
            self.problems.append((place, f"must be section.key=value; the settings here are {keys}"))
        elif not equals:
            self.problems.append((place, "must be section.key=value, such as memory.limit=64MiB"))
        elif section not in SECTIONS or key not in _keys(section):
            self.problems.append((place, _unknown(section, key)))
        else:
            try:
                self.values[setting] = _override_value(written.strip())
            except _NotAValueError as error:
                self.problems.append((place, str(error)))
                self.values.pop(setting, None)
            self.places[setting] = place


class _NotAValueError(Exception):
    """A YAML node that no setting takes."""


def read_document(text: str, name: str) -> Document:
    """Parse a configuration file's text.

    Raises:
        ConfigError: it is not YAML at all (every other problem is in the result).
    """
    document = Document(name)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except _UNREADABLE as error:
        raise ConfigError([f"{name}:{_line_of(error, text)}: not YAML: {_reason(error)}"]) from None
    if not isinstance(root, yaml.MappingNode | None):
        raise ConfigError([f"{name}:1: not a configuration: must be a mapping with the sections {', '.join(SECTIONS)}"])
    for section, line, node in _entries(document, root, ""):
        if section not in SECTIONS:
            document.problems.append((document.at(line), _unknown(section)))
            continue
        if section in document.places:
            first = document.places[section].line
            document.problems.append(
                (document.at(line), f"{section}: given twice, first at line {first}: put both under one heading")
            )
        document.places.setdefault(section, document.at(line))
        for key, key_line, value in _entries(document, node, section):
            _add(document, section, key, document.at(key_line), value)
    return document


def _add(document: Document, section: str, key: str, place: Place, node: yaml.Node) -> None:
    setting = f"{section}.{key}"
    if key not in _keys(section):
        document.problems.append((place, _unknown(section, key)))
    elif setting in document.places:
        first = document.places[setting].line
        document.problems.append((place, f"{setting}: given twice, first at line {first}: remove one"))
    else:
        document.places[setting] = place
        try:
            document.values[setting] = _plain(node)
        except _NotAValueError as error:
            document.problems.append((place, f"{setting}: {error}"))


def _entries(document: Document, node: yaml.Node | None, section: str) -> Iterator[tuple[str, int, yaml.Node]]:
    """(key, line, value) of a mapping; what is no mapping becomes a problem.  An empty section is an empty mapping."""
    if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == f"{_YAML_TAG}null"):
        return
    if not isinstance(node, yaml.MappingNode):
        place = document.at(node.start_mark.line + 1)
        document.problems.append((place, f"{section}: must be a mapping with the keys {', '.join(_keys(section))}"))
        # Whatever was meant stands here, so that nothing of the section is called missing as well.
        document.places.update({f"{section}.{key}": place for key in _keys(section)})
        return
    for key, value in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode):
            # The key as written: YAML would make a boolean of `on` and a number of `1`.
            yield key.value, line, value
        else:
            document.problems.append((document.at(line), f"{section or 'top level'}: a key must be a single word"))


def _plain(node: yaml.Node) -> object:
    """The Python value of a scalar or of a list of scalars.

    Not `yaml.SafeLoader`'s whole construction: no setting takes a date, a set or bytes, and text that looks like a date
    is a fine region name.
    """
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) if isinstance(item, yaml.ScalarNode) else _refuse(item) for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        return _refuse(node)
    constructor = yaml.constructor.SafeConstructor()
    try:
        match node.tag.removeprefix(_YAML_TAG):
            case "null":
                return None
            case "bool":
                return constructor.construct_yaml_bool(node)
            case "int":
                number = constructor.construct_yaml_int(node)
                if abs(number) < 1 << 64:  # above, Python might refuse to print it in a message
                    return number
            case "float":
                return constructor.construct_yaml_float(node)
            case "str" | "timestamp" | "value":
                return node.value
    except (ValueError, LookupError, ArithmeticError):
        pass  # a tag that does not fit its text (!!int abc), or a number that Python refuses for its length
    tag = node.tag.removeprefix(_YAML_TAG)
    raise _NotAValueError(f"must be plain text, true, false or a number below 2**64, is {show(node.value)} ({tag})")


def _refuse(node: yaml.Node) -> object:
    kind = "mapping" if isinstance(node, yaml.MappingNode) else "list"
    raise _NotAValueError(f"must be one value or a list of values, is or holds a {kind}")


def _override_value(text: str) -> object:
    """The value of an override, as a YAML scalar or list.

    Anything that does not begin as a list or a quotation is one scalar to its end: as YAML proper, `memory:` would be a
    mapping and `a #b` end at the comment, both surprising on a command line.
    """
    if text[:1] in ("[", '"', "'"):
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except _UNREADABLE as error:
            raise _NotAValueError(f"not YAML: {_reason(error)}") from None
        assert node is not None  # it has at least the character looked at
        return _plain(node)
    tag = yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    return _plain(yaml.ScalarNode(tag, text))


# What PyYAML raises for text that is none; the last two come from escapes beyond Unicode.
_UNREADABLE = (yaml.YAMLError, RecursionError, ValueError, OverflowError)


def _reason(error: Exception) -> str:
    """What is wrong, without PyYAML's copy of the text and its place, which the message has already."""
    match error:
        case yaml.MarkedYAMLError():
            return ", ".join(part for part in (error.context, error.problem) if part)
        case yaml.reader.ReaderError():
            return f"the character U+{error.character:04X} is not allowed"
        case RecursionError():
            return "nested too deeply"
        case ValueError() | OverflowError():
            return "an escape in quotes that is no character"
    return str(error)


def _line_of(error: Exception, text: str) -> int:
    """The line, from 1, where PyYAML stumbled; 1 when it does not say."""
    match error:
        case yaml.MarkedYAMLError():
            mark = error.problem_mark or error.context_mark
            return mark.line + 1 if mark else 1
        case yaml.reader.ReaderError():
            return text.count("\n", 0, error.position) + 1
    return 1


def _keys(section: str) -> tuple[str, ...]:
    return tuple(SECTIONS[section].model_fields)


def _unknown(section: str, key: str = "") -> str:
    """The message for an unknown section or key: the nearest known one, and all that are allowed there."""
    every = [f"{s}.{k}" for s in SECTIONS for k in _keys(s)]
    known = section in SECTIONS
    if not key and section in every:
        # The dotted form belongs to --set; in YAML it is one long key.
        return f"{section}: no section: write {section.partition('.')[2]}: indented under {section.partition('.')[0]}:"
    written = f"{section}.{key}" if key else section
    # A known key in the wrong place is the likeliest mistake, then a typing error.
    near = [setting for setting in every if (key or section) in (setting, setting.partition(".")[2])]
    if not near and known:
        near = [f"{section}.{k}" for k in difflib.get_close_matches(key, _keys(section), 1)]
    elif not near:
        near = difflib.get_close_matches(written, every if key else SECTIONS, 1)
    meant = f", did you mean {' or '.join(near)}?" if near else ";"
    where, allowed = (f"in {section}", _keys(section)) if known else ("sections", tuple(SECTIONS))
    return f"{written}: unknown {'setting' if key else 'section'}{meant} allowed {where}: {', '.join(allowed)}"

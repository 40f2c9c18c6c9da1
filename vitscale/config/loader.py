"""Reads a configuration: YAML plus ``key.path=value`` overrides become frozen sections, or one ConfigError.

The error holds every mistake at once, one line each: ``file:line: key.path: problem``. Scalars follow the
core schema of YAML 1.2 (``8e-4`` is a number, ``no`` is text), and ``1_000`` is a number too. Own design.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from vitscale.config.schema import TrainConfig
from vitscale.errors import ConfigError

T = TypeVar("T")
KeyPath = tuple[str | int, ...]

MAX_FILE_BYTES = 200_000
MAX_DEPTH = 50
_PLAIN, _ALIAS, _TEXT = "!plain", "!alias", "tag:yaml.org,2002:str"
_DEFAULT_TAGS: dict[type[yaml.Node], str] = {
    yaml.ScalarNode: _TEXT,
    yaml.SequenceNode: "tag:yaml.org,2002:seq",
    yaml.MappingNode: "tag:yaml.org,2002:map",
}
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_DECIMAL = re.compile(rf"[-+]?{_DIGITS}")
_FLOAT = re.compile(rf"[-+]?(?:\.{_DIGITS}|{_DIGITS}(?:\.(?:{_DIGITS})?)?)(?:[eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_WANTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
}


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Load a training configuration. ``overrides`` are ``key.path=value``; of two for one key the later wins.

    Raises:
        ConfigError: with every mistake in the file and in the overrides.
    """
    return load_section(TrainConfig, path, overrides)


def load_section(cls: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Load any class made by :func:`vitscale.config.section.section`, as :func:`load_config` does."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file (searched from {Path.cwd()}); check the path") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; name the YAML file in it") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; check the file") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes, so no configuration; check the path")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
    return parse_section(cls, text, str(path), overrides)


def parse_section(cls: type[T], text: str, source: str, overrides: Sequence[str] = ()) -> T:
    """Like :func:`load_section`, on text in memory; ``source`` stands for the file name in messages."""
    reading = _Reading(cls, source)
    root = reading.root(text)
    for override in overrides:
        reading.apply(root, override)
    try:
        config: T = _adapter(cls).validate_json(json.dumps(root.data()))  # type: ignore[arg-type]
    except ValidationError as error:
        reading.explain(root, error.errors(include_url=False, include_input=False))
    if reading.problems:
        # The file line by line, then the command line from left to right.
        turns = {None: -1} | {override: turn for turn, override in enumerate(overrides)}
        turn = {p: (turns.get(p.place.override, len(turns)), p.place.line or 0) for p in reading.problems}
        raise ConfigError("\n".join(str(problem) for problem in sorted(turn, key=lambda p: turn[p])))
    return config


def plain_scalar(text: str) -> bool | int | float | str | None:
    """The value of an unquoted YAML scalar: null, a boolean, a number or text."""
    if text in _WORDS or text in ("Null", "NULL", "True", "TRUE", "False", "FALSE"):
        return _WORDS[text.lower()]
    if re.fullmatch(r"0x[0-9a-fA-F]+|0o[0-7]+", text):
        return int(text, 0)
    # Python refuses to parse integers of thousands of digits; such a number is refused later as too large.
    if _DECIMAL.fullmatch(text):
        return int(text) if len(text) < 100 else math.inf
    if _FLOAT.fullmatch(text):
        return float(text)
    if special := _SPECIAL_FLOAT.fullmatch(text):
        return float("".join(special.groups()))
    return text


@functools.cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where something was written: a line of the file, the file as a whole, or one or more overrides."""

    source: str
    line: int | None = None
    override: str | None = None

    def at(self, line: int) -> _Place:
        return self if self.override is not None else dataclasses.replace(self, line=line)

    def __str__(self) -> str:
        if self.override is not None:
            return f"command line: {_cut(self.override, 100)}"
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclasses.dataclass(frozen=True)
class _Problem:
    place: _Place
    path: KeyPath
    text: str

    def __str__(self) -> str:
        key = f"{_dotted(self.path)}: " if self.path else ""
        line = f"{self.place}: {key}{self.text}"
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


@dataclasses.dataclass
class _Entry:
    """A value and its place. Nothing more is said about a broken one: its problem is known already."""

    value: bool | int | float | str | dict[str, _Entry] | list[_Entry] | None
    place: _Place
    broken: bool = False

    def data(self) -> Any:
        if isinstance(self.value, dict):
            return {key: entry.data() for key, entry in self.value.items()}
        return [entry.data() for entry in self.value] if isinstance(self.value, list) else self.value

    def child(self, key: str | int) -> _Entry | None:
        if isinstance(self.value, dict) and isinstance(key, str):
            return self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int) and key < len(self.value):
            return self.value[key]
        return None

    def along(self, path: KeyPath) -> list[_Entry]:
        """The entries from this one to the one at ``path``, as far as they exist."""
        entries = [self]
        for key in path:
            if (child := entries[-1].child(key)) is None:
                break
            entries.append(child)
        return entries


class _Composer(yaml.SafeLoader):
    """Nodes of a document with their lines. Aliases are marked, not expanded: they may grow without bound."""

    depth = 0

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        return _PLAIN if kind is yaml.ScalarNode and implicit[0] else _DEFAULT_TAGS[kind]

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()  # type: ignore[no-untyped-call]
            return yaml.ScalarNode(_ALIAS, event.anchor, event.start_mark, event.end_mark)
        if self.depth == MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Reading:
    """One file with its overrides on the way to ``cls``, and the problems found so far."""

    def __init__(self, cls: type, source: str) -> None:
        self.cls = cls
        self.file = _Place(source)
        self.problems: list[_Problem] = []
        self.overrides: dict[KeyPath, str] = {}

    def problem(self, place: _Place, path: KeyPath, text: str) -> None:
        self.problems.append(_Problem(place, path, text))

    def root(self, text: str) -> _Entry:
        """The whole file; broken and empty if it is no mapping of keys."""
        root = self.value(text, self.file, ())
        required = [name for name, field in _fields_at(self.cls, ()).items() if _is_required(field)]
        if isinstance(root.value, dict):
            root.place = self.file
            return root
        if root.value is not None:
            self.problem(root.place, (), f"must be `key: value` lines, got {_shown(root.data())}")
        elif required and not root.broken:
            self.problem(self.file, (), f"the file is empty; required keys: {', '.join(required)}")
        return _Entry({}, self.file, broken=root.value is not None or root.broken or bool(required))

    def apply(self, root: _Entry, override: str) -> None:
        """Put the value of one override into the tree, making the sections on the way."""
        key, equals, text = override.partition("=")
        path = tuple(key.split("."))
        place = dataclasses.replace(self.file, override=override)
        if not equals or not all(path) or len(path) > MAX_DEPTH:
            return self.problem(place, (), "not an override; write key.path=value")
        here = root
        for depth, part in enumerate(path):
            if here.value is None:
                here.value = {}
            if not isinstance(here.value, dict):
                was = f"{_shown(here.data())} ({here.place})"
                return self.problem(place, path[:depth], f"has no keys to set, it is {was}; replace it as a whole")
            if depth + 1 == len(path):
                here.value[part] = self.value(text, place, path)
            else:
                here = here.value.setdefault(part, _Entry({}, self.file))
        kept = {other: text for other, text in self.overrides.items() if other[: len(path)] != path}
        self.overrides = {**kept, path: override}
        return None

    def value(self, text: str, place: _Place, path: KeyPath) -> _Entry:
        """Parse YAML. What is not YAML becomes a broken null."""
        try:
            composer = _Composer(text)
            node = composer.get_single_node()
        except yaml.MarkedYAMLError as error:
            self.problem(place.at(_line(error.problem_mark)), path, _yaml_problem(error))
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            self.problem(place.at(line), path, f"not YAML: character {text[error.position]!r} is not allowed")
        # PyYAML lets int() and chr() fail on escapes and directives with absurd numbers.
        except (ValueError, OverflowError):
            line = composer.line + 1
            self.problem(place.at(line), path, "not YAML: an escape or a directive with a number out of range")
        else:
            return self.entry(node, place, path) if node else _Entry(None, place)
        return _Entry(None, place, broken=True)

    def entry(self, node: yaml.Node, place: _Place, path: KeyPath) -> _Entry:
        place = place.at(_line(node.start_mark))
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, place, path)
        if node.tag != _DEFAULT_TAGS[type(node)]:
            self.problem(place, path, f"tag {node.tag} is not supported; remove it")
            return _Entry(None, place, broken=True)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, place, path)
        return _Entry([self.entry(item, place, (*path, i)) for i, item in enumerate(node.value)], place)

    def mapping(self, node: yaml.MappingNode, place: _Place, path: KeyPath) -> _Entry:
        entries: dict[str, _Entry] = {}
        for key_node, value_node in node.value:
            here = place.at(_line(key_node.start_mark))
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in (_PLAIN, _TEXT):
                self.problem(here, path, "a key must be a plain word")
            elif key in entries:
                first = entries[key].place.line
                self.problem(here, (*path, key), f"key given twice (first in line {first}); remove one")
            else:
                entries[key] = self.entry(value_node, place, (*path, key))
                entries[key].place = here
        return _Entry(entries, place)

    def scalar(self, node: yaml.ScalarNode, place: _Place, path: KeyPath) -> _Entry:
        value = plain_scalar(node.value) if node.tag == _PLAIN else node.value
        fault = None
        if node.tag == _ALIAS:
            fault = f"alias *{node.value} is not supported; write the value out"
        elif node.tag not in (_PLAIN, _TEXT):
            fault = f"tag {node.tag} is not supported; remove it"
        elif isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            fault = f"{_shown(value)} is not valid Unicode; write the character itself"
        elif isinstance(value, float) and not math.isfinite(value):
            fault = f"must be a finite number, and an integer at most 64 bits long, got {_cut(node.value)}"
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            fault = f"must be at most 64 bits long, got {_cut(node.value)}"
        if fault is None:
            return _Entry(value, place)
        self.problem(place, path, fault)
        return _Entry(None, place, broken=True)

    def explain(self, root: _Entry, errors: Sequence[ErrorDetails]) -> None:
        """Say in the file's terms what pydantic found."""
        groups: dict[KeyPath, list[ErrorDetails]] = {}
        located = [(*_locate(root, error), error) for error in errors]
        parents = {path[:length] for path, _, _ in located for length in range(len(path))}
        for path, in_union, error in located:
            # An error inside a list says more than that the other member of the union is no list.
            if not (in_union and path in parents):
                groups.setdefault(path, []).append(error)
        for path, group in groups.items():
            entries = root.along(path)
            if any(entry.broken for entry in entries):
                continue
            if group[0]["type"] == "value_error":
                self.refused(entries[-1], path, str(group[0]["ctx"]["error"]))
            else:
                self.problem(entries[-1].place, path, self.wrong(root, path, group))

    def refused(self, entry: _Entry, path: KeyPath, message: str) -> None:
        """A section's own check failed: name its line, and the overrides that the message speaks of."""
        in_file = entry.place != self.file
        below = {key: text for key, text in self.overrides.items() if key[: len(path)] == path != key}
        # Overrides alone made a section that has no line of its own; the root never has one.
        blamed = [text for key, text in below.items() if (path and not in_file) or _names(message, key[-1])]
        if blamed and not in_file:
            return self.problem(dataclasses.replace(self.file, override=" ".join(blamed)), path, message)
        note = f" (with {' '.join(blamed)} on the command line)" if blamed else ""
        return self.problem(entry.place, path, message + note)

    def wrong(self, root: _Entry, path: KeyPath, group: Sequence[ErrorDetails]) -> str:
        """What is wrong with one key, what was allowed, what to do. A union brings one error per member."""
        if group[0]["type"] == "unexpected_keyword_argument":
            return _unknown_key(self.cls, path)
        field = _fields_at(self.cls, path[:-1]).get(str(path[-1]))
        if group[0]["type"] == "missing" and not isinstance(group[0]["loc"][-1], int):
            return "required, but not given; add it"
        value = root.along(path)[-1].data()
        if value is None and field is not None and _is_required(field):
            return "required, but empty; give it a value"
        # Where one member of a union has the right type, only its own limits are worth telling.
        limits = [error for error in group if not error["type"].endswith("_type")]
        # A short list brings one error for each missing item; the last one tells the length.
        limits = limits[-1:] if limits and limits[-1]["type"] == "missing" else limits
        wanted = " or ".join(dict.fromkeys(_wanted(self.cls, path, error) for error in limits or group))
        return f"must be {wanted}, got {_shown(value)}{_advice(value, wanted)}"


def _locate(root: _Entry, error: ErrorDetails) -> tuple[KeyPath, bool]:
    """The path of an error in the file, and whether it passed a member of a union, which names no key."""
    path: KeyPath = ()
    keys = list(error["loc"])
    if error["type"] == "missing" and isinstance(keys[-1], int):
        keys.pop()
    for index, key in enumerate(keys):
        missing = error["type"] == "missing" and isinstance(key, str) and index + 1 == len(error["loc"])
        if missing or len(root.along((*path, key))) == len(path) + 2:
            path = (*path, key)
    return path, len(path) < len(keys)


def _wanted(cls: type, path: KeyPath, error: ErrorDetails) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in _WANTED:
        return _WANTED[kind]
    if kind == "dataclass_type":
        return f"a section with keys of: {', '.join(_fields_at(cls, path))}"
    if kind == "missing":
        return f"a list of {int(error['loc'][-1]) + 1}"
    if kind == "too_long" and context["field_type"] == "Tuple":
        return f"a list of {context['max_length']}"
    return error["msg"].removeprefix("Input should be ")


def _advice(value: Any, wanted: str) -> str:
    if value is None:
        return "; give a value or leave the key out"
    if isinstance(value, float) and value.is_integer() and "an integer" in wanted:
        return f"; write {int(value)}"
    if isinstance(value, int | float) and wanted in ("text", "a path"):
        return "; put it in quotes"
    if isinstance(value, str) and "text" not in wanted and not isinstance(plain_scalar(value), str | None):
        return "; remove the quotes"
    return ""


def _unknown_key(cls: type, path: KeyPath) -> str:
    known = list(_fields_at(cls, path[:-1]))
    if path[-1] in known:
        return "not a key of the kind that is chosen here; remove it"
    near = difflib.get_close_matches(str(path[-1]), known, n=1)
    near = near or [dotted for dotted in _dotted_keys(cls, "") if dotted.endswith(f".{path[-1]}")]
    hint = f"; did you mean {' or '.join(repr(key) for key in near)}?" if near else ""
    return f"unknown key{hint} (known: {', '.join(known)})"


@functools.cache
def _dotted_keys(cls: type, prefix: str) -> list[str]:
    keys = []
    for name, annotation in get_type_hints(cls).items():
        keys.append(prefix + name)
        for section in _sections(annotation):
            keys += _dotted_keys(section, f"{prefix}{name}.")
    return keys


def _sections(annotation: Any) -> list[type]:
    """The sections named by an annotation, also inside unions, lists and mappings."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return [annotation]
    return [found for part in get_args(annotation) for found in _sections(part)]


@functools.cache
def _fields_at(cls: type, path: KeyPath) -> dict[str, dataclasses.Field[Any]]:
    """The keys of the section at ``path``; of every possible one if a union stands there."""
    sections = [cls]
    for key in path:
        hints = [get_type_hints(section) for section in sections]
        inner = [found for hint in hints if key in hint for found in _sections(hint[str(key)])]
        # The keys of a mapping and the numbers of a list are no fields: their section is already found.
        sections = inner if any(key in hint for hint in hints) else sections
    return {field.name: field for section in sections for field in dataclasses.fields(section)}


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _names(message: str, key: str | int) -> bool:
    return re.search(rf"\b{re.escape(str(key))}\b", message) is not None


def _dotted(path: KeyPath) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def _shown(value: Any) -> str:
    """A value as the user would write it, cut to a length that fits a line."""
    return _cut(repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _cut(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _line(mark: yaml.Mark | None) -> int:
    return mark.line + 1 if mark else 1


def _yaml_problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "cannot be parsed"
    if error.context and problem.startswith("but "):
        return f"not YAML: {error.context}, {problem}"
    if "cannot start any token" in problem:
        return f"not YAML: {problem}; {'indent with spaces' if repr(chr(9)) in problem else 'quote the value'}"
    start = _line(error.context_mark)
    opened = start != _line(error.problem_mark) and error.context_mark
    return f"not YAML: {problem}" + (f" ({error.context} that starts in line {start})" if opened else "")

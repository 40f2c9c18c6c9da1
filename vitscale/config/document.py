"""Reads YAML and ``key.path=value`` overrides into plain data and remembers where each value was written.

Scalars follow the core schema of YAML 1.2 (``8e-4`` is a number, ``no`` is text). Beyond it, ``1_000`` is a number,
and numbers in hexadecimal or octal, infinite or too large for 64 bits are text. Tags and aliases are refused.
Own design.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from vitscale.config.problems import KeyPath, Place, shown, told

MAX_DEPTH = 50
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def plain_scalar(text: str) -> bool | int | float | str | None:
    """The value of an unquoted YAML scalar: null, a boolean, a number or text."""
    if text in _WORDS or text in ("Null", "NULL", "True", "TRUE", "False", "FALSE"):
        return _WORDS[text.lower()]
    # Python's own numbers, except for the words inf and nan and digits of other alphabets.
    if re.fullmatch(r"[-+]?\.?[0-9][-+.0-9_eE]*", text):
        for number, limit in ((int, 2**63), (float, math.inf)):
            with contextlib.suppress(ValueError):
                return value if abs(value := number(text)) < limit else text
    return text


class Document:
    """A file with its overrides, as plain data. Values that cannot be read are null in it."""

    def __init__(self, text: str, source: str, overrides: Sequence[str] = ()) -> None:
        self.problems: list[tuple[Place, str]] = []
        self.places: dict[KeyPath, Place] = {}
        # Nothing more is said about a broken value: its problem is known already.
        self.broken: set[KeyPath] = set()
        file = Place(0, 0, source)
        data = self._parse(text, file, ())
        if data is not None and not isinstance(data, dict):
            self._refuse(self.places[()], (), f"must be `key: value` lines, got {shown(data)}")
        self.data: dict[str, Any] = data if isinstance(data, dict) else {}
        self.places[()] = file
        for turn, override in enumerate(overrides, 1):
            self._override(override, Place(turn, 1, override))

    def problem(self, place: Place, path: KeyPath, text: str) -> None:
        """Note a mistake."""
        self.problems.append((place, told(place, path, text)))

    def place(self, path: KeyPath) -> Place:
        """Where the value at a path stands; for a missing one, where its section does."""
        return next(self.places[start] for start in _starts(path) if start in self.places)

    def is_broken(self, path: KeyPath) -> bool:
        """Whether the value at a path, or one that it lies in, could not be read."""
        return not self.broken.isdisjoint(_starts(path))

    def _refuse(self, place: Place, path: KeyPath, text: str) -> None:
        self.problem(place, path, text)
        self.broken.add(path)

    def _override(self, override: str, place: Place) -> None:
        """Put the value of one override into the data, making the sections on the way."""
        key, equals, text = override.partition("=")
        path = tuple(key.split("."))
        if not equals or not all(path) or len(path) > MAX_DEPTH:
            return self.problem(place, (), "not an override; write key.path=value")
        section = self.data
        for depth, part in enumerate(path[:-1], 1):
            here = path[:depth]
            if section.get(part) is None:
                section[part] = {}
                self.places.setdefault(here, place)
            section = section[part]
            if not isinstance(section, dict):
                was = f"{shown(section)} ({self.places[here]})"
                return self.problem(place, here, f"has no keys to set, it is {was}; replace it as a whole")
        self.places = {other: at for other, at in self.places.items() if path not in _starts(other)}
        self.broken = {other for other in self.broken if path not in _starts(other)}
        section[path[-1]] = self._parse(text, place, path)
        return None

    def _parse(self, text: str, place: Place, path: KeyPath) -> Any:
        """The value of one YAML document."""
        self.places[path] = place
        try:
            parser = yaml.SafeLoader(text)
            events: Iterator[Any] = iter(parser.get_event, None)
            starts = (event for event in events if isinstance(event, yaml.DocumentStartEvent))
            data = self._read(next(events), events, place, path) if next(starts, None) else None
            if another := next(starts, None):
                raise _fault(another, "expected a single document in the stream, but found another document")
            return data
        except yaml.MarkedYAMLError as error:
            line, problem = _line(error.problem_mark), _yaml_problem(error)
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            problem = f"character {text[error.position]!r} is not allowed"
        # PyYAML lets int() and chr() fail on escapes and directives with absurd numbers.
        except (ValueError, OverflowError):
            line, problem = parser.line + 1, "an escape or a directive with a number out of range"
        return self._refuse(place._replace(line=line), path, f"not YAML: {problem}")

    def _read(self, event: Any, events: Iterator[Any], place: Place, path: KeyPath) -> Any:
        """The value that starts with an event; takes the rest of it from ``events``."""
        if len(path) > MAX_DEPTH:
            raise _fault(event, f"nested deeper than {MAX_DEPTH} levels")
        place = self.places[path] = place._replace(line=_line(event.start_mark))
        # Aliases may grow without bound where they are expanded.
        if isinstance(event, yaml.AliasEvent):
            return self._refuse(place, path, f"alias *{event.anchor} is not supported; write the value out")
        if event.tag is not None:
            self._refuse(place, path, f"tag {event.tag} is not supported; remove it")
        if isinstance(event, yaml.SequenceStartEvent):
            items = _until(yaml.SequenceEndEvent, events)
            return [self._read(item, events, place, (*path, index)) for index, item in enumerate(items)]
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(events, place, path)
        value = plain_scalar(event.value) if event.implicit[0] else event.value
        if isinstance(value, str) and _HALF_CHARACTER.search(value):
            return self._refuse(place, path, f"{shown(value)} is not valid Unicode; write the character itself")
        return value

    def _mapping(self, events: Iterator[Any], place: Place, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for event in _until(yaml.MappingEndEvent, events):
            here = place._replace(line=_line(event.start_mark))
            key = event.value if isinstance(event, yaml.ScalarEvent) and event.tag is None else None
            if key is None or _HALF_CHARACTER.search(key):
                self.problem(here, path, "a key must be a plain word")
                if isinstance(event, yaml.CollectionStartEvent):
                    self._read(event, events, place, (*path, "?"))
            elif key in data:
                first = self.places[*path, key].line
                self.problem(here, (*path, key), f"key given twice (first in line {first}); remove one")
            else:
                data[key] = self._read(next(events), events, place, (*path, key))
                self.places[*path, key] = here
                continue
            # What a bad key holds is read over, not used.
            self._read(next(events), events, place, (*path, "?"))
        return data


def _until(end: type[yaml.Event], events: Iterator[Any]) -> Iterator[Any]:
    return itertools.takewhile(lambda event: not isinstance(event, end), events)


def _starts(path: KeyPath) -> list[KeyPath]:
    """A path and all that it lies in, the innermost first."""
    return [path[:length] for length in range(len(path), -1, -1)]


def _fault(event: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def _line(mark: Any) -> int:
    return int(mark.line) + 1


def _yaml_problem(error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem)
    if "cannot start any token" in problem:
        return f"{problem}; {'indent with spaces' if repr(chr(9)) in problem else 'quote the value'}"
    if error.context_mark is None or _line(error.context_mark) == _line(error.problem_mark):
        return problem
    return f"{problem} ({error.context} that starts in line {_line(error.context_mark)})"

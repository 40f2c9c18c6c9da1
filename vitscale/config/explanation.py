"""Says in the file's terms what pydantic found in a document: the key, what was allowed, what to do. Own design."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Sequence
from typing import Any, get_args, get_origin, get_type_hints

from pydantic_core import ErrorDetails

from vitscale.config.document import Document, plain_scalar
from vitscale.config.problems import KeyPath, shown

_WANTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "too_short": "a list of at least one",
    "union_tag_not_found": "a section that says its kind",
    "string_pattern_mismatch": "named with letters, digits and _ . - only",
}
# In the paths of keys, stands for the names in a mapping of sections.
_ANY_NAME = "*"


def explain(cls: type, document: Document, errors: Sequence[ErrorDetails]) -> None:
    """Note the errors of a document that was checked as a ``cls`` as problems of the document."""
    groups: dict[KeyPath, list[ErrorDetails]] = {}
    for error in errors:
        groups.setdefault(_locate(document, error), []).append(error)
    for path, group in groups.items():
        # An error inside a list says more than that the other member of a union is no list.
        inside = any(len(other) > len(path) and other[: len(path)] == path for other in groups)
        if inside or document.is_broken(path):
            continue
        if group[0]["type"] == "value_error":
            _explain_check(document, path, str(group[0]["ctx"]["error"]))
        else:
            document.problem(document.place(path), path, _wrong(cls, document, path, group))


def _locate(document: Document, error: ErrorDetails) -> KeyPath:
    """The path of an error in the document. pydantic's names the members of unions too."""
    path: KeyPath = ()
    for key in error["loc"]:
        if (*path, key) in document.places:
            path = (*path, key)
    last = error["loc"][-1:]
    return path + last if error["type"] == "missing" and isinstance(last[0], str) else path


def _explain_check(document: Document, path: KeyPath, message: str) -> None:
    """A section's own check failed: name its line, and the overrides that had a part in it."""
    place, words = document.place(path), re.findall(r"\w+", message)
    within = [(key, at) for key, at in document.places.items() if at.turn and key[: len(path)] == path]
    blamed = [at for key, at in within if path or key[-1] in words]
    overrides = " ".join(dict.fromkeys(at.text for at in blamed))
    if blamed and (place.turn or not path):
        place = blamed[-1]._replace(text=overrides)
    elif blamed:
        message += f" (with {overrides} on the command line)"
    document.problem(place, path, message)


def _wrong(cls: type, document: Document, path: KeyPath, group: Sequence[ErrorDetails]) -> str:
    """What is wrong with one key. A union brings one error per member, a short list one per missing item."""
    if group[0]["type"] == "unexpected_keyword_argument":
        return _unknown_key(_keys(cls), _general(_keys(cls), path))
    if group[0]["type"] == "missing" and isinstance(group[0]["loc"][-1], str):
        return "required, but not given; add it"
    value = group[0]["input"]
    if value is None and _keys(cls).get(_general(_keys(cls), path)):
        return "required, but empty; give it a value"
    # Where one member of a union has the right type, only its own limits are worth telling.
    limits = [error for error in group if not error["type"].endswith("_type")]
    wanted = " or ".join(dict.fromkeys(_wanted(_keys(cls), path, error) for error in limits[-1:] or group))
    return f"must be {wanted}, got {shown(value)}{_advice(value, wanted)}"


def _wanted(keys: dict[KeyPath, bool], path: KeyPath, error: ErrorDetails) -> str:
    kind = error["type"]
    if kind == "dataclass_type":
        return f"a section with keys of: {', '.join(_known(keys, _general(keys, path)))}"
    if kind == "union_tag_invalid":
        return f"of a kind that there is ({error['ctx']['expected_tags']})"
    if kind == "missing":
        return f"a list of {int(error['loc'][-1]) + 1}"
    if kind == "too_long":
        return f"a list of {error['ctx']['max_length']}"
    return _WANTED.get(kind) or error["msg"].removeprefix("Input should be ")


def _advice(value: Any, wanted: str) -> str:
    if value is None:
        return "; give a value or leave the key out"
    if isinstance(value, float) and value.is_integer() and "an integer" in wanted:
        return f"; write {int(value)}"
    if isinstance(value, int | float) and wanted == "text":
        return "; put it in quotes"
    if isinstance(value, str) and "text" not in wanted and not isinstance(plain_scalar(value), str | None):
        return "; remove the quotes"
    return ""


def _unknown_key(keys: dict[KeyPath, bool], path: KeyPath) -> str:
    if path in keys:
        return "not a key of the kind that is chosen here; remove it"
    known, unknown = _known(keys, path[:-1]), str(path[-1])
    near = difflib.get_close_matches(unknown, known, n=1) or [
        ".".join(map(str, key)) for key in keys if key[-1] == unknown and _ANY_NAME not in key
    ]
    hint = f"; did you mean {' or '.join(repr(key) for key in near)}?" if near else ""
    return f"unknown key{hint} (known: {', '.join(known)})"


@functools.cache
def _keys(cls: type) -> dict[KeyPath, bool]:
    """The paths of all keys in a section, and whether they are required."""
    keys: dict[KeyPath, bool] = {}
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        keys[field.name,] = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        for section, between in _sections(hints[field.name]):
            keys |= {(field.name, *between, *names): required for names, required in _keys(section).items()}
    return keys


def _general(keys: dict[KeyPath, bool], path: KeyPath) -> KeyPath:
    """A path in a document as the path of a key, which has no names of its own in a mapping of sections."""
    general: KeyPath = ()
    for name in path:
        beside = {key[len(general)] for key in keys if len(key) > len(general) and key[: len(general)] == general}
        general += (_ANY_NAME if beside == {_ANY_NAME} else name,)
    return general


def _sections(annotation: Any) -> list[tuple[type, KeyPath]]:
    """The sections named by an annotation, also inside unions and mappings, and what lies between."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return [(annotation, ())]
    within = (_ANY_NAME,) if get_origin(annotation) is dict else ()
    return [(found, (*within, *path)) for part in get_args(annotation) for found, path in _sections(part)]


def _known(keys: dict[KeyPath, bool], path: KeyPath) -> list[str]:
    return [str(key[-1]) for key in keys if key[:-1] == path]

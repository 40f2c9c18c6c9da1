"""Configurations as text: the commented reference of all keys, the resolved YAML, what differs between two.

Help texts are the docstrings under the fields, read from the source. Own design.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from vitscale.config.document import plain_scalar
from vitscale.config.duration import Duration

_WIDTH = 100
_TYPE_NAMES = {bool: "true or false", str: "text", NoneType: "null"}
_UNITS = " | ".join(f"{{{field.name}: N}}" for field in dataclasses.fields(Duration))
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclasses.dataclass(frozen=True)
class KeyChange:
    """One key that differs between two configurations; a duration counts as one key."""

    key: str
    old: object
    new: object

    def __str__(self) -> str:
        return f"{self.key}: {_flow(self.old)} -> {_flow(self.new)}"


def reference_yaml(cls: type) -> str:
    """Every key of ``cls`` as YAML with help, type and default; it loads once required keys are filled in."""
    lines = [*_comment(_summary(cls), 0), "# Keys marked 'required' have no default."]
    if _uses_duration(cls):
        lines += ["#", *_comment(f"A duration is one of {_UNITS}:", 0)]
        lines += [f"#   {name}: {text}" for name, text in attribute_docs(Duration).items()]
    return "\n".join([*lines, *_section_lines(cls, None, 0)]) + "\n"


def dump_config(config: object) -> str:
    """The configuration as YAML that loads back to an equal object."""
    return "".join(f"{line}\n" for line in _block(config, 0))


def diff_configs(old: object, new: object) -> list[KeyChange]:
    """The keys whose values differ between two configurations of one class, in the order of the schema."""
    return list(_changes(old, new, ""))


@functools.cache
def attribute_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a class, on one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for statement, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
            name, text = statement.target, below.value
            if isinstance(name, ast.Name) and isinstance(text, ast.Constant) and isinstance(text.value, str):
                docs[name.id] = " ".join(text.value.split())
    return docs


def type_text(annotation: Any) -> str:
    """An annotation in words: ``int > 0``, ``[float, float]``, ``tanh | erf``, ``path or null``."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limits = [limit for field in parts[1:] for limit in getattr(field, "metadata", ())]
        return " ".join([type_text(parts[0]), *(text for limit in limits for text in _bound_texts(limit))])
    if origin in (Union, UnionType):
        return " or ".join(type_text(part) for part in parts)
    if origin is Literal:
        return " | ".join(_flow(part) for part in parts)
    if origin in (tuple, list):
        return f"[{', '.join('...' if part is ... else type_text(part) for part in parts)}]"
    if origin is dict:
        return f"{{{type_text(parts[0])}: {'section' if _sections_of(parts[1]) else type_text(parts[1])}}}"
    return _TYPE_NAMES.get(annotation, str(annotation.__name__).lower())


def _bound_texts(limit: object) -> list[str]:
    return [f"{sign} {_flow(getattr(limit, name))}" for name, sign in _BOUNDS.items() if hasattr(limit, name)]


def _section_lines(cls: type, defaults: object | None, depth: int) -> Iterator[str]:
    """The keys of a section; ``defaults`` is the instance that stands for the section if it is left out."""
    indent, hints, docs = "  " * depth, get_type_hints(cls, include_extras=True), attribute_docs(cls)
    for field in dataclasses.fields(cls):
        inner = hints[field.name]
        value = _default(field) if defaults is None else getattr(defaults, field.name)
        yield ""
        if _is_section(inner):
            yield from _comment(docs.get(field.name, _summary(inner)), depth)
            yield f"{indent}{field.name}:"
            yield from _section_lines(inner, None if value is dataclasses.MISSING else value, depth + 1)
            continue
        yield from _comment(docs.get(field.name, ""), depth)
        if value is dataclasses.MISSING:
            yield f"{indent}{field.name}:  # required; {type_text(inner)}"
        else:
            yield f"{indent}{field.name}: {_flow(value)}  # {type_text(inner)}"
        if get_origin(inner) is dict:
            for section in _sections_of(inner):
                # In the place of two spaces, so that lines stay as short as they are.
                yield from (f"# {line[2:]}".rstrip() for line in _example(section, depth + 1))


def _sections_of(annotation: Any) -> list[type]:
    """The sections named anywhere in an annotation."""
    if _is_section(annotation):
        return [annotation]
    return [found for part in get_args(annotation) for found in _sections_of(part)]


def _example(section: type, depth: int) -> Iterator[str]:
    """A section of a mapping, under a name that the user gives."""
    yield ""
    yield from _comment(_summary(section), depth)
    yield f"{'  ' * depth}NAME:"
    yield from _section_lines(section, None, depth + 1)


def _block(config: Any, depth: int) -> Iterator[str]:
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), "  " * depth + field.name
        if _is_section(type(value)):
            yield f"{key}:"
            yield from _block(value, depth + 1)
        else:
            yield f"{key}: {_flow(value)}"


def _flow(value: Any) -> str:
    """A value on one line of YAML."""
    if isinstance(value, Duration):
        given = {key: number for key, number in vars(value).items() if number is not None}
        return _flow(given)
    if dataclasses.is_dataclass(value):
        return _flow(vars(value))
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_scalar(str(key))}: {_flow(item)}' for key, item in value.items())}}}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(_flow(item) for item in value)}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return repr(value) if isinstance(value, int | float) else _scalar(str(value))


def _scalar(text: str) -> str:
    """Text as YAML: plain where it stays text, else in double quotes with escapes."""
    if re.fullmatch(r"[\w/.][\w/.+-]*", text, re.ASCII) and isinstance(plain_scalar(text), str):
        return text
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else f"\\U{ord(character):08X}"


def _changes(old: Any, new: Any, key: str) -> Iterator[KeyChange]:
    if type(old) is type(new) and _is_section(type(old)):
        for field in dataclasses.fields(old):
            inner = f"{key}.{field.name}" if key else field.name
            yield from _changes(getattr(old, field.name), getattr(new, field.name), inner)
    elif old != new:
        yield KeyChange(key, old, new)


def _is_section(annotation: Any) -> bool:
    """Whether the keys are written one per line below; a duration is short enough for one line."""
    is_dataclass = isinstance(annotation, type) and dataclasses.is_dataclass(annotation)
    return is_dataclass and annotation is not Duration and len(dataclasses.fields(annotation)) > 0


def _uses_duration(annotation: Any) -> bool:
    if _is_section(annotation):
        return any(_uses_duration(hint) for hint in get_type_hints(annotation).values())
    return annotation is Duration or any(_uses_duration(part) for part in get_args(annotation))


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _summary(cls: type) -> str:
    doc = cls.__doc__ or ""
    # A dataclass without a docstring gets its signature for one.
    return "" if doc.startswith(f"{cls.__name__}(") else doc.strip().split("\n\n")[0]


def _comment(text: str, depth: int) -> list[str]:
    prefix = "  " * depth + "# "
    wrapped = textwrap.wrap(" ".join(text.split()), _WIDTH - len(prefix), break_on_hyphens=False)
    return [prefix + line for line in wrapped]

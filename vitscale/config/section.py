"""The ``@section`` decorator: a frozen, keyword-only dataclass that pydantic checks strictly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

from pydantic import ConfigDict

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def section(cls: type[T]) -> type[T]:
    """Make ``cls`` a configuration section.

    Strict types (``true`` is not 1) and no unknown keys must be asked for on every nested class,
    so the decorator does it once for all.
    """
    cls.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True)(cls)

"""Where a problem lies, and how places, keys and values are shown in its text. Own design."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

KeyPath = tuple[str | int, ...]


class Place(NamedTuple):
    """Where something was written. Sorts as problems are told: the file by lines, then override by override."""

    turn: int  # 0 for the file, n for the n-th override
    line: int  # 0 for the whole file
    text: str  # the name of the file, or the override

    def __str__(self) -> str:
        if self.turn:
            return f"command line: {cut(self.text, 100)}"
        return f"{self.text}:{self.line}" if self.line else self.text


def told(place: Place, path: KeyPath, text: str) -> str:
    """A problem on one line that can be printed."""
    key = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")
    line = f"{place}: {key}: {text}" if key else f"{place}: {text}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def shown(value: Any) -> str:
    """A value as the user would write it, cut to a length that fits a line."""
    return cut(repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def cut(text: str, length: int = 60) -> str:
    """The beginning of a long text."""
    return text if len(text) <= length else f"{text[: length - 3]}..."

"""What the label member of a WebDataset sample says."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple


class UnusableLabelError(Exception):
    """A sample has no label that can be used; the message continues "sample ..."."""


class Labels(NamedTuple):
    """Labels of one sample: numbers, or names of classes."""

    values: tuple[int, ...] | tuple[str, ...]
    multi: bool
    """Whether they came as a list."""

    @property
    def are_names(self) -> bool:
        """Whether the values are names; an empty list has none."""
        return bool(self.values) and isinstance(self.values[0], str)

    @property
    def kind(self) -> str:
        """In words."""
        what = ("class names" if self.are_names else "numbers") if self.multi else ""
        return f"a list of {what}" if self.multi else f"one {'class name' if self.are_names else 'number'}"


def parse_labels(extension: str, data: bytes) -> Labels:
    """Labels of a ``cls`` member (a whole number or a name) or a ``json`` member.

    Of a JSON object, ``labels`` counts (a list of whole numbers or of names), or else ``label`` (one of either).

    Raises:
        UnusableLabelError: there is none, it is negative (a custom for unlabelled images), or not of these forms.
    """
    try:
        labels = _parse_cls(data.decode()) if extension == "cls" else _parse_json(json.loads(data))
    except (ValueError, RecursionError):
        raise UnusableLabelError(f"with unreadable {extension} member") from None
    if any(isinstance(value, int) and value < 0 for value in labels.values):
        raise UnusableLabelError("with negative label")
    return labels


def _parse_cls(text: str) -> Labels:
    text = text.strip()
    if re.fullmatch(r"-?[0-9]{1,18}", text):
        return Labels((int(text),), multi=False)
    if not text or "\n" in text:
        raise ValueError(text)
    return Labels((text,), multi=False)


def _parse_json(content: Any) -> Labels:
    if not isinstance(content, dict):
        raise ValueError(content)
    if "labels" in content:
        values = content["labels"]
        if not isinstance(values, list) or len({type(value) for value in values}) > 1:
            raise ValueError(values)
    elif "label" in content:
        values = [content["label"]]
    else:
        raise UnusableLabelError("without label")
    if any(type(value) not in (int, str) for value in values):
        raise ValueError(values)
    return Labels(tuple(values), multi="labels" in content)

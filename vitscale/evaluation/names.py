"""What a head's outputs are called."""

from __future__ import annotations

from collections.abc import Sequence


def output_names(classes: Sequence[str] | None, count: int, *, unnamed: str = "class {}") -> list[str]:
    """A name for each output: a head may have more outputs than its classes have names, or fewer.

    Args:
        classes: names of the first ones, if there are any.
        count: outputs.
        unnamed: what the others are called, with their number for the braces.
    """
    named = list(classes or ())[:count]
    return named + [unnamed.format(number) for number in range(len(named), count)]

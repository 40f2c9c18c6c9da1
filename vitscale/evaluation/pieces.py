"""Work that rank 0 does alone, in pieces, between which all ranks may give it up."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

from vitscale.distributed import Ranks

T = TypeVar("T")

Pieces = Generator[None, None, T]
"""Yields after each piece of its work, and returns what came of it."""


def never() -> bool:
    """Nobody asks to stop."""
    return False


def on_main_in_pieces(
    work: Callable[[], Pieces[T]], ranks: Ranks, *, is_stopping: Callable[[], bool] = never
) -> tuple[T] | None:
    """Do the work on rank 0 and give its result to every rank. Collective.

    The other ranks wait for a piece at a time, so a long work meets no time-out of theirs.

    Args:
        work: called on rank 0 only.
        ranks: who waits.
        is_stopping: collective; asked after each piece.

    Returns:
        The result, or ``None`` if it was given up.
    """
    pieces = work() if ranks.is_main else None

    def one_piece() -> tuple[T] | None:
        assert pieces is not None
        try:
            next(pieces)
        except StopIteration as end:
            return (end.value,)
        return None

    while True:
        result = ranks.on_main(one_piece)
        if result is not None or is_stopping():
            return result

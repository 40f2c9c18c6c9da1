"""Features without a model: clusters, and what comes of work in pieces."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from vitscale.evaluation.features import Features
from vitscale.evaluation.pieces import Pieces

T = TypeVar("T")


def finish(pieces: Pieces[T]) -> T:
    """Do all of the work at once."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            result: T = end.value
            return result


def count_pieces(pieces: Pieces[T]) -> int:
    """How often the work lets others ask for a stop."""
    return sum(1 for _ in pieces)


def clusters(labels: NDArray[np.int64], *, dim: int, spread: float, seed: int) -> Features:
    """One cluster per class, away from the origin and with unequal scales, as representations are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(int(labels.max()) + 1, dim)) * 3 + 7
    scales = np.linspace(0.01, 50, dim)
    return Features((centres[labels] + rng.normal(size=(len(labels), dim)) * spread) * scales, labels)


def balanced(classes: list[int], each: int) -> NDArray[np.int64]:
    """So many labels of each class, in turn."""
    return np.array(classes * each, dtype=np.int64)

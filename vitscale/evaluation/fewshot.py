"""Few-shot linear accuracy by closed-form ridge regression.

Protocol of the ViT paper, section 4.1, as coded in big_vision's few-shot evaluator: features are standardised with
the statistics of the shots, a constant feature stands for a nearly unregularised bias, targets are -1 and +1.
Everything is computed in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitscale.errors import DataError
from vitscale.evaluation.features import Features

# So large that the ridge penalty hardly touches the bias.
BIAS_FEATURE = 100.0
STD_EPS = 1e-5


def fewshot_accuracy(
    train: Features, test: Features, *, shots: list[int], seeds: int, ridge: float
) -> dict[int, float]:
    """Mean test accuracy over ``seeds`` draws, for each number of shots per class.

    Raises:
        DataError: a class has fewer images than shots.
    """
    return {
        count: float(np.mean([_one_draw(train, test, count, seed, ridge) for seed in range(seeds)])) for count in shots
    }


def _one_draw(train: Features, test: Features, count: int, seed: int, ridge: float) -> float:
    chosen = draw_shots(train.labels, count, seed)
    features, labels = train.values[chosen], train.labels[chosen]
    mean, std = features.mean(axis=0), features.std(axis=0) + STD_EPS
    weights = ridge_weights(_design((features - mean) / std), _targets(labels), ridge)
    scores = _design((test.values - mean) / std) @ weights
    classes = np.unique(labels)
    return float(np.mean(classes[scores.argmax(axis=1)] == test.labels))


def draw_shots(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Indices of ``count`` random samples of each class, drawn without replacement."""
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < count:
            raise DataError(
                f"class {label} has {len(members)} images, but {count} shots are needed; "
                f"ask for fewer with --shots, or draw from a larger shard set"
            )
        chosen.append(rng.permutation(members)[:count])
    return np.concatenate(chosen)


def ridge_weights(features: NDArray[np.float64], targets: NDArray[np.float64], ridge: float) -> NDArray[np.float64]:
    """Weights [d, K] that minimise ``|XW - Y|^2 + ridge |W|^2``.

    By one eigendecomposition of the smaller Gram matrix, of X'X or of XX'.
    """
    n, d = features.shape
    gram = features.T @ features if n >= d else features @ features.T
    eigenvalues, vectors = np.linalg.eigh(gram)
    # The pseudo-inverse where ridge is 0: directions without data get no weight. Below this floor is rounding only.
    floor = eigenvalues[-1] * max(n, d) * np.finfo(np.float64).eps
    damped = eigenvalues + ridge
    inverse = np.divide(1.0, damped, out=np.zeros_like(damped), where=damped > floor)
    solved = (vectors * inverse) @ (vectors.T @ (features.T @ targets if n >= d else targets))
    return solved if n >= d else features.T @ solved


def _design(features: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([features, np.full((len(features), 1), BIAS_FEATURE)], axis=1)


def _targets(labels: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.where(labels[:, None] == np.unique(labels)[None, :], 1.0, -1.0)

"""Few-shot linear accuracy by closed-form ridge regression.

Protocol of the ViT paper, section 4.1, as coded in big_vision's few-shot evaluator: features are standardised with
the statistics of the shots, a constant feature stands for a nearly unregularised bias, targets are -1 and +1.
Everything is computed in float64. n shots of all classes, d features with the constant one, K classes, m images that
are classified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitscale.config.evaluators import FewshotEvaluator
from vitscale.errors import DataError
from vitscale.evaluation.features import Features
from vitscale.evaluation.pieces import Pieces

# So large that the ridge penalty hardly touches the bias.
BIAS_FEATURE = 100.0
STD_EPS = 1e-5
# Images on which the penalty is chosen; more would tell no more.
CHOICE_IMAGES = 10_000
# Salt that keeps the draw of these apart from that of shots.
_CHOICE = 0xC401CE
_NAMED = 3

Floats = NDArray[np.float64]


class Ridge:
    """Solves ``min |XW - Y|^2 + ridge |W|^2`` for every penalty by one eigendecomposition of the smaller Gram matrix,
    of X'X or of XX'.

    Args:
        features: X [n, d].
    """

    def __init__(self, features: Floats) -> None:
        n, d = features.shape
        self._features, self._primal = features, n >= d
        gram = features.T @ features if self._primal else features @ features.T
        self._eigenvalues, self._vectors = np.linalg.eigh(gram)
        # Below this is rounding only.
        self._floor = self._eigenvalues[-1] * max(n, d) * np.finfo(np.float64).eps

    def weights(self, targets: Floats, ridge: float) -> Floats:
        """W [d, K] for targets Y [n, K]."""
        # The pseudo-inverse where ridge is 0: directions without data get no weight.
        damped = self._eigenvalues + ridge
        inverse = np.divide(1.0, damped, out=np.zeros_like(damped), where=damped > self._floor)
        right = self._features.T @ targets if self._primal else targets
        solved = (self._vectors * inverse) @ (self._vectors.T @ right)
        return np.asarray(solved if self._primal else self._features.T @ solved)


@dataclass(frozen=True)
class FewshotAccuracy:
    """Of one number of shots. Rows are seeds, columns penalties."""

    shots: int
    ridges: tuple[float, ...]
    test: Floats
    """Accuracy on the test set."""
    choice: Floats | None
    """Accuracy on training images that were not drawn; None if there is nothing to choose."""

    @property
    def chosen(self) -> int:
        """Column of the penalty that is best on average over seeds where it may be chosen; the first of equals."""
        return 0 if self.choice is None else int(self.choice.mean(axis=0).argmax())

    @property
    def mean(self) -> float:
        """Test accuracy with the chosen penalty, averaged over seeds."""
        return float(self.test[:, self.chosen].mean())

    @property
    def std(self) -> float:
        """Standard deviation over seeds, of the sample; 0 for a single one."""
        return float(self.test[:, self.chosen].std(ddof=1)) if len(self.test) > 1 else 0.0


def fewshot_pieces(
    train: Features, test: Features, settings: FewshotEvaluator, classes: Sequence[str] | None = None
) -> Pieces[list[FewshotAccuracy]]:
    """Test accuracy for each number of shots. A piece of the work is one draw.

    Args:
        train: shots are drawn from these.
        test: these are classified.
        settings: numbers of shots, seeds and penalties.
        classes: names, for messages.

    Raises:
        DataError: a class has fewer images than shots, or none is left to choose the penalty on.
    """
    check_shots(train.labels, test.labels, max(settings.shots), classes)
    results = []
    for count in settings.shots:
        rows = []
        for seed in range(settings.seeds):
            rows.append(_one_draw(train, test, count, seed, settings.ridge))
            yield
        choice = None if len(settings.ridge) == 1 else np.array([on_choice for _, on_choice in rows])
        results.append(FewshotAccuracy(count, settings.ridge, np.array([on_test for on_test, _ in rows]), choice))
    return results


def fewshot_json(results: Sequence[FewshotAccuracy]) -> dict[str, Any]:
    """Mean, deviation and penalty for each number of shots, as plain data."""
    told: dict[str, Any] = {}
    for result in results:
        told[f"{result.shots}-shot"] = result.mean
        told[f"{result.shots}-shot_std"] = result.std
        if len(result.ridges) > 1:
            told[f"{result.shots}-shot_ridge"] = result.ridges[result.chosen]
            means = result.test.mean(axis=0).tolist()
            told[f"{result.shots}-shot_by_ridge"] = {
                f"{ridge:g}": mean for ridge, mean in zip(result.ridges, means, strict=True)
            }
    return told


def _one_draw(
    train: Features, test: Features, count: int, seed: int, ridges: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Accuracies by penalty on the test set, and on images on which the penalty may be chosen."""
    chosen = draw_shots(train.labels, count, seed)
    features, labels = train.values[chosen].astype(np.float64), train.labels[chosen]
    mean, std = features.mean(axis=0), features.std(axis=0) + STD_EPS
    solver, classes = Ridge(_design((features - mean) / std)), np.unique(labels)
    weights = [solver.weights(_targets(labels), ridge) for ridge in ridges]

    def accuracies(values: NDArray[np.floating], of: NDArray[np.int64]) -> list[float]:
        design = _design((values.astype(np.float64) - mean) / std)
        return [float(np.mean(classes[(design @ each).argmax(axis=1)] == of)) for each in weights]

    on_choice: list[float] = []
    if len(ridges) > 1:
        others = np.setdiff1d(np.arange(len(train.labels)), chosen)
        if not len(others):
            raise DataError(
                f"all {len(chosen)} training images are drawn as {count} shots of each class, so none is left to "
                f"choose the penalty on; give one value to --ridge, or take fewer shots"
            )
        others = np.random.default_rng([seed, _CHOICE]).permutation(others)[:CHOICE_IMAGES]
        on_choice = accuracies(train.values[others], train.labels[others])
    return accuracies(test.values, test.labels), on_choice


def check_shots(
    train: NDArray[np.int64], test: NDArray[np.int64], count: int, classes: Sequence[str] | None = None
) -> None:
    """See that each class that occurs has enough training images.

    Raises:
        DataError: names classes that have not, and how many images they have.
    """
    labels, counts = np.unique(train, return_counts=True)
    found = dict(zip(labels.tolist(), counts.tolist(), strict=True))
    short = [(label, found.get(label, 0)) for label in sorted({*found, *test.tolist()}) if found.get(label, 0) < count]
    if not short:
        return
    named = ", ".join(f"class {_class_name(label, classes)} has {images} images" for label, images in short[:_NAMED])
    all_of_them = f"{len(short)} classes have too few images: " if len(short) > _NAMED else ""
    raise DataError(
        f"{all_of_them}{named}, but {count} shots are needed; ask for fewer with --shots, or draw from a larger shard "
        f"set"
    )


def _class_name(label: int, classes: Sequence[str] | None) -> str:
    name = str(label) if classes is None or label >= len(classes) else classes[label]
    return name if name == str(label) else f"{label} ({name})"


def draw_shots(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Indices of ``count`` random samples of each class, drawn without replacement; each class has so many."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(np.flatnonzero(labels == label))[:count] for label in np.unique(labels)])


def _design(features: Floats) -> Floats:
    return np.concatenate([features, np.full((len(features), 1), BIAS_FEATURE)], axis=1)


def _targets(labels: NDArray[np.int64]) -> Floats:
    return np.where(labels[:, None] == np.unique(labels)[None, :], 1.0, -1.0)

"""Few-shot accuracy against a direct solve and against the protocol written out in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.unit.vitscale.evaluation.features_for_tests import balanced, clusters, count_pieces, finish
from vitscale.config.evaluators import FewshotEvaluator
from vitscale.errors import DataError
from vitscale.evaluation.features import Features
from vitscale.evaluation.fewshot import FewshotAccuracy, Ridge, draw_shots, fewshot_json, fewshot_pieces

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def judged(
    train: Features, test: Features, *, shots: list[int], seeds: int, ridge: tuple[float, ...]
) -> list[FewshotAccuracy]:
    settings = FewshotEvaluator(train="", test="", shots=tuple(shots), seeds=seeds, ridge=ridge)
    return finish(fewshot_pieces(train, test, settings))


def fewshot_accuracy(
    train: Features, test: Features, *, shots: list[int], seeds: int, ridge: float
) -> dict[int, float]:
    """By number of shots."""
    return {found.shots: found.mean for found in judged(train, test, shots=shots, seeds=seeds, ridge=(ridge,))}


def ridge_weights(features: Floats, targets: Floats, ridge: float) -> Floats:
    return Ridge(features).weights(targets, ridge)


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=shape)


def direct(x: Floats, y: Floats, ridge: float) -> Floats:
    if ridge == 0:
        return np.asarray(np.linalg.pinv(x) @ y)
    return np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y)


@pytest.mark.parametrize(("n", "d"), [(5, 12), (12, 12), (40, 12), (1, 3), (3, 1)])
@pytest.mark.parametrize("ridge", [0.0, 2.0**-10, 1.0, 1024.0, 2.0**19])
def test_ridge_weights_equal_a_direct_solve(n: int, d: int, ridge: float) -> None:
    x, y = normal(n, d), normal(n, 4, seed=1)
    np.testing.assert_allclose(ridge_weights(x, y, ridge), direct(x, y, ridge), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 2.0**-10, 1.0])
@pytest.mark.parametrize("n", [30, 100])
def test_ridge_weights_with_dependent_and_dead_features(n: int, ridge: float) -> None:
    """A feature twice, one that is always 0, and the large constant of the protocol."""
    x = normal(n, 20)
    x = np.concatenate([x, x[:, :1], np.zeros((n, 1)), np.full((n, 1), 100.0)], axis=1)
    y = normal(n, 3, seed=1)
    with np.errstate(all="raise"):
        weights = ridge_weights(x, y, ridge)
    np.testing.assert_allclose(x @ weights, x @ direct(x, y, ridge), rtol=1e-5, atol=1e-6)
    assert np.abs(weights[21]).max() < 1e-9


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 20), d=st.integers(1, 20), power=st.integers(-10, 19), seed=st.integers(0, 1000))
def test_ridge_weights_are_the_minimum(n: int, d: int, power: int, seed: int) -> None:
    x, y, ridge = normal(n, d, seed=seed), normal(n, 2, seed=seed + 1), 2.0**power
    weights = ridge_weights(x, y, ridge)
    gradient = x.T @ (x @ weights - y) + ridge * weights
    assert np.abs(gradient).max() < 1e-8 * max(1.0, ridge)


def reference_accuracy(train: Features, test: Features, shots: int, seeds: int, ridge: float) -> float:
    """The protocol of papers and big_vision's few-shot evaluator, one seed after another."""
    accuracies = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        classes = sorted(set(train.labels.tolist()))
        chosen: list[int] = []
        for label in classes:
            chosen += rng.permutation([i for i, other in enumerate(train.labels) if other == label])[:shots].tolist()
        x, labels = train.values[chosen], train.labels[chosen]
        mean, std = x.mean(0), x.std(0)
        design = np.concatenate([(x - mean) / (std + 1e-5), np.full((len(x), 1), 100.0)], axis=1)
        targets = np.array([[1.0 if label == other else -1.0 for other in classes] for label in labels])
        weights = direct(design, targets, ridge)
        probe = np.concatenate([(test.values - mean) / (std + 1e-5), np.full((len(test.values), 1), 100.0)], axis=1)
        predicted = [classes[row.argmax()] for row in probe @ weights]
        accuracies.append(np.mean([p == label for p, label in zip(predicted, test.labels, strict=True)]))
    return float(np.mean(accuracies))


@pytest.mark.parametrize("dim", [4, 64])
@pytest.mark.parametrize("ridge", [2.0**-10, 1024.0])
def test_equals_the_protocol_in_plain_numpy(dim: int, ridge: float) -> None:
    train = clusters(balanced([0, 1, 2, 3, 4], 20), dim=dim, spread=4.0, seed=1)
    test = clusters(balanced([0, 1, 2, 3, 4], 30), dim=dim, spread=4.0, seed=2)
    scores = fewshot_accuracy(train, test, shots=[1, 5, 20], seeds=3, ridge=ridge)
    expected = {count: reference_accuracy(train, test, count, 3, ridge) for count in (1, 5, 20)}
    assert scores == pytest.approx(expected, abs=1e-12)
    assert 0.2 < scores[5] < 1.0, "neither chance nor perfect, or the comparison proves nothing"


def test_labels_need_not_be_contiguous() -> None:
    names = {0: 3, 1: 7, 2: 1000}
    train, test = (clusters(balanced([0, 1, 2], 12), dim=6, spread=3.0, seed=seed) for seed in (1, 2))
    renamed = [Features(f.values, np.array([names[label] for label in f.labels.tolist()])) for f in (train, test)]
    kwargs = {"shots": [1, 10], "seeds": 3, "ridge": 1024.0}
    assert fewshot_accuracy(*renamed, **kwargs) == fewshot_accuracy(train, test, **kwargs)  # type: ignore[arg-type]


def test_separable_features_are_perfect_and_random_ones_are_chance() -> None:
    labels = balanced(list(range(10)), 40)
    apart = [clusters(labels, dim=32, spread=0.05, seed=seed) for seed in (1, 2)]
    assert fewshot_accuracy(*apart, shots=[1, 5, 25], seeds=3, ridge=1024.0) == {1: 1.0, 5: 1.0, 25: 1.0}
    noise = [Features(normal(400, 32, seed=seed), labels) for seed in (1, 2)]
    scores = fewshot_accuracy(*noise, shots=[1, 5, 25], seeds=3, ridge=1024.0)
    assert all(abs(score - 0.1) < 0.06 for score in scores.values())


def test_the_scale_and_offset_of_features_do_not_matter() -> None:
    train, test = (clusters(balanced([0, 1, 2], 20), dim=8, spread=4.0, seed=seed) for seed in (1, 2))
    moved = [Features(f.values * 1e3 - 5e4, f.labels) for f in (train, test)]
    kwargs = {"shots": [5], "seeds": 3, "ridge": 1024.0}
    assert fewshot_accuracy(*moved, **kwargs) == fewshot_accuracy(train, test, **kwargs)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(3, 9), min_size=1, max_size=6), count=st.integers(1, 3), seed=st.integers(0, 2**32 - 1)
)
def test_shots_are_so_many_of_each_class_without_repeats(sizes: list[int], count: int, seed: int) -> None:
    labels = np.repeat(np.arange(len(sizes)) * 5, sizes)
    np.random.default_rng(0).shuffle(labels)
    chosen = draw_shots(labels, count, seed)
    assert len(set(chosen.tolist())) == len(chosen)
    drawn, counts = np.unique(labels[chosen], return_counts=True)
    assert drawn.tolist() == [5 * i for i in range(len(sizes))]
    assert counts.tolist() == [count] * len(sizes)
    np.testing.assert_array_equal(chosen, draw_shots(labels, count, seed))


def test_seeds_draw_differently_and_more_shots_contain_fewer() -> None:
    labels = balanced([0, 1, 2], 30)
    assert draw_shots(labels, 5, 0).tolist() != draw_shots(labels, 5, 1).tolist()
    assert set(draw_shots(labels, 5, 0).tolist()) < set(draw_shots(labels, 10, 0).tolist())


def test_every_image_of_a_class_can_be_drawn() -> None:
    labels = balanced([0, 1], 4)
    assert {i for seed in range(50) for i in draw_shots(labels, 1, seed).tolist()} == set(range(8))


def of_labels(*labels: int) -> Features:
    return Features(normal(len(labels), 3), np.array(labels))


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (
            [0, 0, 0, 8, 8, 2, 2, 2],
            [0],
            r"^class 8 \(ship\) has 2 images, but 3 shots are needed; ask for fewer with --shots",
        ),
        ([0, 0, 0], [0, 9], r"^class 9 \(truck\) has 0 images, but 3 shots are needed"),
        ([0, 0, 0], [11], r"^class 11 has 0 images"),
        (
            [0, 0, 0, 1, 2, 3, 4, 4],
            [0],
            r"^4 classes have too few images: class 1 \(car\) has 1 images, class 2 \(bird\) has 1 images, class 3 "
            r"\(cat\) has 1 images, but 3 shots",
        ),
    ],
)
def test_too_few_images_of_a_class_are_an_error(train: list[int], test: list[int], message: str) -> None:
    names = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    settings = FewshotEvaluator(train="", test="", shots=(1, 3), seeds=1)
    with pytest.raises(DataError, match=message):
        finish(fewshot_pieces(of_labels(*train), of_labels(*test), settings, names))


RIDGES = (2.0**-10, 1.0, 1024.0, 2.0**19)


def test_one_decomposition_gives_for_every_penalty_what_it_alone_gives() -> None:
    train = clusters(balanced([0, 1, 2, 3, 4], 20), dim=24, spread=9.0, seed=1)
    test = clusters(balanced([0, 1, 2, 3, 4], 30), dim=24, spread=9.0, seed=2)
    for found in judged(train, test, shots=[1, 10], seeds=3, ridge=RIDGES):
        alone = [
            judged(train, test, shots=[found.shots], seeds=3, ridge=(ridge,))[0].test[:, 0].tolist() for ridge in RIDGES
        ]
        assert found.test.T.tolist() == alone
        assert len({tuple(scores) for scores in alone}) > 1, "the penalties must matter, or this proves nothing"


def test_a_penalty_is_chosen_on_training_images_that_were_not_drawn() -> None:
    """The test set says the opposite of the training set, so it shows where the choice was made."""
    labels = balanced([0, 1], 60)
    train = clusters(labels, dim=24, spread=12.0, seed=1)
    (found,) = judged(train, Features(train.values, 1 - labels), shots=[4], seeds=5, ridge=RIDGES)
    assert found.choice is not None
    by_choice, by_test = found.choice.mean(axis=0), found.test.mean(axis=0)
    assert found.chosen == by_choice.argmax() != by_test.argmax()
    told = fewshot_json([found])
    assert told["4-shot_ridge"] == RIDGES[found.chosen]
    assert told["4-shot"] == by_test[found.chosen] == told["4-shot_by_ridge"][f"{RIDGES[found.chosen]:g}"]


def test_no_image_that_was_drawn_has_a_say_in_the_choice() -> None:
    """On noise, images that were drawn would be right, which are most here, and the others are right by chance."""
    train = Features(normal(16, 64), balanced([0, 1], 8))
    (found,) = judged(train, train, shots=[5], seeds=60, ridge=(1e-3, 1.0))
    assert found.choice is not None
    assert abs(found.choice.mean(axis=0) - 0.5).max() < 0.1
    assert found.test.min() >= 10 / 16


def test_without_images_to_choose_on_there_is_an_error_and_a_single_penalty_needs_none() -> None:
    train = clusters(balanced([0, 1], 3), dim=4, spread=0.1, seed=1)
    with pytest.raises(DataError, match="all 6 training images are drawn as 3 shots of each class, so none is left"):
        judged(train, train, shots=[3], seeds=1, ridge=(1.0, 2.0))
    assert judged(train, train, shots=[3], seeds=1, ridge=(1.0,))[0].choice is None


def test_mean_and_deviation_are_over_seeds() -> None:
    train, test = (clusters(balanced([0, 1, 2], 30), dim=6, spread=8.0, seed=seed) for seed in (1, 2))
    (found,) = judged(train, test, shots=[2], seeds=4, ridge=(1024.0,))
    scores = found.test[:, 0]
    assert len(set(scores.tolist())) > 1
    assert fewshot_json([found]) == {"2-shot": scores.mean(), "2-shot_std": np.std(scores, ddof=1)}
    (single,) = judged(train, test, shots=[2], seeds=1, ridge=(1024.0,))
    assert single.std == 0.0


def test_each_draw_is_a_piece_of_the_work() -> None:
    train = clusters(balanced([0, 1], 9), dim=4, spread=0.1, seed=1)
    settings = FewshotEvaluator(train="", test="", shots=(1, 2), seeds=3)
    assert count_pieces(fewshot_pieces(train, train, settings)) == 6

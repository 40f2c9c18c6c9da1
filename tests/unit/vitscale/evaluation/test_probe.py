"""The linear probe: what it learns, which learning rate it takes, and a loop without any of its code as a judge."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.unit.vitscale.evaluation.features_for_tests import balanced, clusters, count_pieces, finish
from vitscale.config.evaluators import ProbeEvaluator
from vitscale.errors import DataError
from vitscale.evaluation.features import Features
from vitscale.evaluation.probe import ProbeAccuracy, probe_pieces

CPU = torch.device("cpu")
CLASSES = [0, 1, 2, 3]


def sets(spread: float) -> tuple[Features, Features]:
    train, test = (clusters(balanced(CLASSES, 40), dim=12, spread=spread, seed=seed) for seed in (1, 2))
    return train, test


def probed(train: Features, test: Features, **keys: object) -> ProbeAccuracy:
    settings = ProbeEvaluator(train="", test="", **{"epochs": 5, "batch_size": 32, **keys})  # type: ignore[arg-type]
    return finish(probe_pieces(train, test, settings, CPU))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_separable_classes_are_learned_and_noise_is_not(optimizer: str) -> None:
    assert probed(*sets(0.05), optimizer=optimizer).top1 == 1.0
    rng = np.random.default_rng(0)
    noise = [Features(rng.normal(size=(400, 12)), balanced(CLASSES, 100)) for _ in range(2)]
    assert abs(probed(*noise, optimizer=optimizer).top1 - 0.25) < 0.1


def by_hand(train: Features, test: Features, *, lr: float, epochs: int, batch: int, decay: float) -> float:
    """SGD with momentum 0.9, cosine to 0, gradients of the cross-entropy written out, in float64."""
    mean, std = train.values.mean(axis=0), train.values.std(axis=0) + 1e-5
    x, labels, classes = (train.values - mean) / std, train.labels, int(train.labels.max()) + 1
    w, b = np.zeros((x.shape[1], classes)), np.zeros(classes)
    dw, db = np.zeros_like(w), np.zeros_like(b)
    generator = torch.Generator().manual_seed(0)
    total, step = epochs * -(-len(x) // batch), 0
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator).numpy()
        for start in range(0, len(x), batch):
            chosen = order[start : start + batch]
            scores = np.exp(x[chosen] @ w + b)
            error = scores / scores.sum(axis=1, keepdims=True) - np.eye(classes)[labels[chosen]]
            dw = 0.9 * dw + x[chosen].T @ error / len(chosen) + decay * w
            db = 0.9 * db + error.mean(axis=0)
            rate = lr * (1 + math.cos(math.pi * step / total)) / 2
            w, b, step = w - rate * dw, b - rate * db, step + 1
    predicted = ((test.values - mean) / std @ w + b).argmax(axis=1)
    return float((predicted == test.labels).mean())


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_sgd_equals_a_loop_by_hand(decay: float) -> None:
    train, test = sets(7.0)
    found = probed(train, test, lr=(0.02,), weight_decay=decay)
    assert found.top1 == pytest.approx(by_hand(train, test, lr=0.02, epochs=5, batch=32, decay=decay), abs=0.007)
    assert 0.3 < found.top1 < 1.0
    assert (found.lr, found.held_out) == (0.02, None)


def test_the_learning_rate_is_the_best_on_the_held_out_part_and_the_smallest_of_equals() -> None:
    train, test = sets(5.0)
    found = probed(train, test, lr=(0.1, 1e-9, 0.03))
    assert found.held_out is not None
    assert list(found.held_out) == [0.1, 1e-9, 0.03]
    best = max(found.held_out.values())
    assert found.lr == min(lr for lr, score in found.held_out.items() if score == best)
    # A kernel that stays at zero says class 0 of all images.
    assert found.held_out[1e-9] < best
    assert found.to_json()["held_out_lr_1e-09"] == found.held_out[1e-9]
    # The final classifier is trained on all images, as one is that has no choice.
    assert found.top1 == probed(train, test, lr=(found.lr,)).top1


def test_rates_that_are_tried_side_by_side_do_not_meet() -> None:
    train, test = sets(6.0)
    together = probed(train, test, lr=(0.01, 0.1, 30.0)).held_out
    apart = probed(train, test, lr=(0.1, 0.01)).held_out
    assert together is not None
    assert apart is not None
    assert {lr: together[lr] for lr in apart} == apart


def test_the_test_set_has_no_say() -> None:
    train, test = sets(5.0)
    turned = Features(test.values, np.roll(test.labels, 1))
    assert probed(train, test, lr=(0.1, 0.01)).held_out == probed(train, turned, lr=(0.1, 0.01)).held_out


def test_too_few_images_to_hold_some_out() -> None:
    train = clusters(balanced([0, 1], 2), dim=4, spread=0.1, seed=1)
    with pytest.raises(DataError, match=r"the training set has 4 images, of which 0.1 come to 0 to choose"):
        probed(train, train)
    assert probed(train, train, lr=(0.1,)).top1 == 1.0


def test_each_epoch_is_a_piece_of_the_work() -> None:
    train, test = sets(1.0)
    settings = ProbeEvaluator(train="", test="", epochs=3)
    assert count_pieces(probe_pieces(train, test, settings, CPU)) == 6

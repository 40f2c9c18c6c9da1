"""The training losses against formulas written out in float64, one image and one class at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vitscale.config.schema import LossConfig
from vitscale.train.loss import multi_hot, training_loss

SOFTMAX = LossConfig(kind="softmax")
SIGMOID = LossConfig(kind="sigmoid")


def random_logits(batch: int = 6, classes: int = 5, scale: float = 3.0) -> Tensor:
    return torch.randn(batch, classes, generator=torch.Generator().manual_seed(3)) * scale


def softmax_reference(logits: Tensor, labels: list[int], smoothing: float) -> float:
    total = 0.0
    for row, label in zip(logits.double().tolist(), labels, strict=True):
        log_sum = math.log(sum(math.exp(value) for value in row))
        for index, value in enumerate(row):
            target = (1 - smoothing) * (index == label) + smoothing / len(row)
            total -= target * (value - log_sum)
    return total / len(labels)


def sigmoid_reference(logits: Tensor, label_sets: list[set[int]]) -> float:
    total = 0.0
    for row, labels in zip(logits.double().tolist(), label_sets, strict=True):
        for index, value in enumerate(row):
            chance = 1 / (1 + math.exp(-value))
            total -= math.log(chance if index in labels else 1 - chance)
    return total / len(label_sets)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_softmax(smoothing: float) -> None:
    logits, labels = random_logits(), [0, 4, 2, 2, 1, 3]
    loss = training_loss(logits, torch.tensor(labels)[:, None], LossConfig(label_smoothing=smoothing))
    assert loss.item() == pytest.approx(softmax_reference(logits, labels, smoothing), rel=1e-6)


def test_sigmoid_sums_over_classes_and_averages_over_images() -> None:
    logits = random_logits()
    labels = torch.tensor([[0, 3, -1], [1, -1, -1], [-1, -1, -1], [4, 2, 0], [2, -1, -1], [1, 0, -1]])
    sets = [set(row) - {-1} for row in labels.tolist()]
    loss = training_loss(logits, labels, SIGMOID)
    assert loss.item() == pytest.approx(sigmoid_reference(logits, sets), rel=1e-6)
    # Twice the same classes doubles it, twice the same images does not change it.
    assert training_loss(logits.repeat(1, 2), labels, SIGMOID) > 1.5 * loss
    assert training_loss(logits.repeat(2, 1), labels.repeat(2, 1), SIGMOID).item() == pytest.approx(loss.item())


def test_sigmoid_at_a_constant_bias() -> None:
    # Softplus of the bias for each absent class: what head_bias -10 is for.
    labels = torch.full((3, 2), -1)
    loss = training_loss(torch.full((3, 1000), -10.0), labels, SIGMOID)
    assert loss.item() == pytest.approx(1000 * math.log1p(math.exp(-10)), rel=1e-5)


def test_multi_hot_ignores_padding_repeats_and_order() -> None:
    labels = torch.tensor([[2, 0, -1], [-1, -1, -1], [1, 1, 1]])
    assert multi_hot(labels, 3).tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_padding_changes_nothing() -> None:
    logits, labels = random_logits(), torch.tensor([[0], [4], [2], [2], [1], [3]])
    padded = torch.cat((labels, torch.full((6, 3), -1)), dim=1)
    for config in (SOFTMAX, SIGMOID):
        assert torch.equal(training_loss(logits, labels, config), training_loss(logits, padded, config))


@pytest.mark.parametrize("config", [SOFTMAX, SIGMOID])
def test_gradients_are_chance_minus_target_over_batch(config: LossConfig) -> None:
    logits = random_logits().requires_grad_()
    labels = torch.tensor([[0], [4], [2], [2], [1], [3]])
    training_loss(logits, labels, config).backward()
    chance = logits.softmax(1) if config.kind == "softmax" else logits.sigmoid()
    torch.testing.assert_close(logits.grad, (chance - multi_hot(labels, 5)).detach() / 6)


@pytest.mark.parametrize("config", [SOFTMAX, SIGMOID])
def test_is_computed_in_fp32_from_bf16_logits(config: LossConfig) -> None:
    logits, labels = random_logits().bfloat16(), torch.tensor([[0], [4], [2], [2], [1], [3]])
    loss = training_loss(logits, labels, config)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, training_loss(logits.float(), labels, config))


@pytest.mark.parametrize("config", [SOFTMAX, SIGMOID])
def test_extreme_logits_stay_finite(config: LossConfig) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = training_loss(logits, torch.tensor([[1]]), config)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()

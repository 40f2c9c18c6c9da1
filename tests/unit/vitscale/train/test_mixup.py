"""Shares against the distribution they are drawn from, blends and losses against targets written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vitscale.config.schema import LossConfig
from vitscale.train.loss import multi_hot, training_loss
from vitscale.train.mixup import blend, mixing_share, partners


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0, 4.0])
def test_shares_are_those_of_a_folded_beta_distribution(alpha: float) -> None:
    count = 4000
    drawn = np.sort([mixing_share(3, step, alpha) for step in range(count)])
    assert drawn[0] >= 0.5
    assert drawn[-1] <= 1.0
    reference = np.random.default_rng(1).beta(alpha, alpha, 200_000)
    reference = np.sort(np.maximum(reference, 1 - reference))
    below = np.searchsorted(reference, drawn, side="right") / len(reference)
    assert np.abs(below - (np.arange(count) + 0.5) / count).max() < 1.95 / count**0.5


def test_a_share_depends_on_seed_and_step_alone() -> None:
    assert mixing_share(0, 7, 0.2) == mixing_share(0, 7, 0.2)
    assert len({mixing_share(seed, step, 1.0) for seed in range(20) for step in range(20)}) == 400
    assert mixing_share(0, 7, 0.0) == 1.0


def test_shares_are_pinned() -> None:
    shares = [mixing_share(0, step, 0.5) for step in range(4)]
    assert shares == pytest.approx([0.958233954, 0.749743006, 0.973469002, 0.975981038], abs=1e-9)


def test_neighbours_are_blended_in_pairs() -> None:
    images = torch.tensor([0.0, 10.0, 100.0, 200.0])[:, None, None].expand(4, 3, 2)
    assert partners(images)[:, 0, 0].tolist() == [10.0, 0.0, 200.0, 100.0]
    mixed = blend(images, 0.75)
    assert mixed.shape == images.shape
    assert mixed[:, 2, 1].tolist() == [2.5, 7.5, 125.0, 175.0]
    assert torch.equal(blend(images, 1.0), images)


def test_no_blend_depends_on_the_size_of_a_micro_batch() -> None:
    images = torch.rand(12, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = blend(images, 0.7)
    for size in (2, 4, 6):
        assert torch.equal(torch.cat([blend(part, 0.7) for part in images.split(size)]), whole)


def soft_targets(labels: Tensor, classes: int, share: float) -> Tensor:
    hot = multi_hot(labels, classes).double()
    return share * hot + (1 - share) * hot[[1, 0, 3, 2, 5, 4]]


LABELS = torch.tensor([[0, 3], [1, -1], [2, -1], [2, 4], [-1, -1], [1, 0]])


@pytest.mark.parametrize("share", [0.5, 0.6, 0.93])
def test_sigmoid_loss_on_blended_targets(share: float) -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(3)) * 3
    targets, chances = soft_targets(LABELS, 5, share), logits.double().sigmoid()
    expected = -(targets * chances.log() + (1 - targets) * (1 - chances).log()).sum(1).mean()
    loss = training_loss(logits, LABELS, LossConfig(kind="sigmoid"), share)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("share", [0.5, 0.6, 0.93])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_loss_on_blended_targets(share: float, smoothing: float) -> None:
    logits = (torch.randn(6, 5, generator=torch.Generator().manual_seed(3)) * 3).requires_grad_()
    labels = torch.tensor([[0], [4], [2], [2], [1], [3]])
    targets = (1 - smoothing) * soft_targets(labels, 5, share) + smoothing / 5
    expected = -(targets * logits.double().log_softmax(1)).sum(1).mean()
    loss = training_loss(logits, labels, LossConfig(label_smoothing=smoothing), share)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    torch.testing.assert_close(logits.grad, ((logits.softmax(1) - targets) / 6).float().detach())

"""A linear classifier that is trained on frozen features.

Features are standardised with the statistics of the training set, as by the BatchNorm without affine parameters that
MAE (arXiv 2111.06377, appendix A.1) puts before its probe; the kernel starts at zero and the learning rate falls to 0
along a cosine. The learning rate is the best of a grid on a held-out part of the training set; then the classifier is
trained on all of it. n images, D width, K classes, L learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.config.evaluators import ProbeEvaluator
from vitscale.errors import DataError
from vitscale.evaluation.features import Features
from vitscale.evaluation.pieces import Pieces

MOMENTUM = 0.9
STD_EPS = 1e-5


@dataclass(frozen=True)
class ProbeAccuracy:
    """What came of it."""

    top1: float
    """On the test set."""
    lr: float
    """The learning rate that was taken."""
    held_out: dict[float, float] | None
    """Accuracy on the held-out part by learning rate; None if there was nothing to choose."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        tried = {} if self.held_out is None else {f"held_out_lr_{lr:g}": score for lr, score in self.held_out.items()}
        return {"top1": self.top1, "lr": self.lr, **tried}


def probe_pieces(
    train: Features, test: Features, settings: ProbeEvaluator, device: torch.device
) -> Pieces[ProbeAccuracy]:
    """Choose the learning rate, train and test. A piece of the work is one epoch.

    Raises:
        DataError: the training set is too small to hold some of it out.
    """
    values, labels = _on_device(train, device)
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    held_out: dict[float, float] | None = None
    lr = settings.lr[0]
    if len(settings.lr) > 1:
        order = np.random.default_rng(settings.seed).permutation(len(labels))
        number = round(settings.held_out * len(labels))
        if not 0 < number < len(labels):
            raise DataError(
                f"the training set has {len(labels)} images, of which {settings.held_out:g} come to {number} to choose "
                f"the learning rate on; take a larger set, another share, or a single learning rate"
            )
        aside, rest = (torch.from_numpy(part).to(device) for part in (order[:number], order[number:]))
        scale = _statistics(values[rest])
        kernels = yield from _train(_scaled(values[rest], scale), labels[rest], num_classes, settings.lr, settings)
        scores = [_accuracy(_scaled(values[aside], scale), labels[aside], kernel) for kernel in kernels]
        held_out = dict(zip(settings.lr, scores, strict=True))
        # The smallest of equals.
        lr = min(settings.lr, key=lambda each: (-held_out[each], each))
    scale = _statistics(values)
    (kernel,) = yield from _train(_scaled(values, scale), labels, num_classes, [lr], settings)
    return ProbeAccuracy(_accuracy_of(test, scale, kernel, device), lr, held_out)


def _train(
    values: Tensor, labels: Tensor, num_classes: int, lrs: Sequence[float], settings: ProbeEvaluator
) -> Pieces[list[Tensor]]:
    """Kernels [D + 1, K], the last row being the bias, of one classifier for each learning rate."""
    device = values.device
    kernels = [torch.zeros(values.shape[1], num_classes, device=device, requires_grad=True) for _ in lrs]
    biases = [torch.zeros(num_classes, device=device, requires_grad=True) for _ in lrs]
    groups: list[dict[str, Any]] = [
        {"params": [kernel], "lr": lr, "weight_decay": settings.weight_decay}
        for kernel, lr in zip(kernels, lrs, strict=True)
    ]
    groups += [{"params": [bias], "lr": lr, "weight_decay": 0.0} for bias, lr in zip(biases, lrs, strict=True)]
    sgd = settings.optimizer == "sgd"
    optimizer = torch.optim.SGD(groups, momentum=MOMENTUM) if sgd else torch.optim.AdamW(groups)
    batch = min(settings.batch_size, len(values))
    total = settings.epochs * math.ceil(len(values) / batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / total)))
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.epochs):
        order = torch.randperm(len(values), generator=generator).to(device)
        for chosen in torch.split(order, batch):
            inputs, targets = values[chosen], labels[chosen]
            optimizer.zero_grad()
            # Their gradients do not meet, so the classifiers are trained side by side.
            losses = [F.cross_entropy(inputs @ k + b, targets) for k, b in zip(kernels, biases, strict=True)]
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        yield
    return [torch.cat((k.detach(), b.detach()[None])) for k, b in zip(kernels, biases, strict=True)]


def _statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    std, mean = torch.std_mean(values, dim=0, correction=0)
    return mean, std + STD_EPS


def _scaled(values: Tensor, scale: tuple[Tensor, Tensor]) -> Tensor:
    return (values - scale[0]) / scale[1]


def _accuracy(values: Tensor, labels: Tensor, kernel: Tensor) -> float:
    scores = values @ kernel[:-1] + kernel[-1]
    return float((scores.argmax(dim=1) == labels).double().mean())


def _accuracy_of(test: Features, scale: tuple[Tensor, Tensor], kernel: Tensor, device: torch.device) -> float:
    values, labels = _on_device(test, device)
    return _accuracy(_scaled(values, scale), labels, kernel)


def _on_device(features: Features, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(features.values).to(device, torch.float32), torch.from_numpy(features.labels).to(device)

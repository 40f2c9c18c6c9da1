"""Metrics of classification over a whole set, by torchmetrics; the same for any number of ranks.

Each rank adds what it sees; counts are summed over ranks, and what cannot be counted is gathered and put in order.
B images of a batch, K classes, M labels of the image that has most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitscale.distributed import Ranks

# Guo et al., arXiv 1706.04599.
CALIBRATION_BINS = 15
# Scores of all images and classes that mean average precision may take on a rank: 2 GiB in float64.
MAX_SCORES = 1 << 28


def _torchmetrics() -> Any:
    """Its functions for classification, imported when they are needed: those for texts and sounds come along, which
    takes two seconds, and a rank that starts again needs none of them before its next evaluation."""
    from torchmetrics.functional import classification

    return classification


@dataclass(frozen=True)
class Accuracy:
    """Of images with one label each, over all ranks; every readable one is counted once."""

    images: int
    correct: int
    correct_top5: int
    unreadable: int
    calibration_error: float
    """Expected calibration error of the softmax: over 15 bins of the confidence, the distance between confidence and
    accuracy, weighted by the images."""
    confusion: NDArray[np.int64] | None = None
    """Images [K, K] by true class (rows) and best class (columns); None if it was not asked for."""

    @property
    def top1(self) -> float:
        """Share of images whose best class is right."""
        return self.correct / self.images

    @property
    def top5(self) -> float:
        """Share of images whose class is among the best five (or all, if there are fewer)."""
        return self.correct_top5 / self.images

    def to_json(self) -> dict[str, float | int]:
        """Plain data for records."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "calibration_error": self.calibration_error,
            "images": self.images,
            "unreadable": self.unreadable,
        }


class AccuracyMeter:
    """Counts right answers of this rank.

    Args:
        num_classes: K.
        confusion: whether the confusion matrix is wanted, K*K numbers.
    """

    def __init__(self, num_classes: int, *, confusion: bool = False) -> None:
        self._num_classes = num_classes
        self._counts = torch.zeros(3, dtype=torch.int64)
        self._confidences: list[Tensor] = []
        self._confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64) if confusion else None

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Logits [B, K] and labels [B] on one device."""
        if not len(labels):
            return
        top1, top5 = (_hits(logits, labels, self._num_classes, k) for k in (1, min(5, self._num_classes)))
        self._counts += torch.tensor([len(labels), top1, top5])
        confidence, best = logits.softmax(dim=1).max(dim=1)
        self._confidences.append(torch.stack((confidence.double(), (best == labels).double())).cpu())
        if self._confusion is not None:
            self._confusion += (
                _torchmetrics().multiclass_confusion_matrix(best, labels, self._num_classes, validate_args=False).cpu()
            )

    def total(self, ranks: Ranks, *, unreadable: int) -> Accuracy | None:
        """Of all ranks. Collective.

        Args:
            ranks: who takes part.
            unreadable: images of this rank that could not be read.

        Returns:
            The same on every rank; ``None`` if no image could be read.
        """
        images, correct, correct_top5, bad = ranks.sum_ints([*self._counts.tolist(), unreadable])
        mine = torch.cat(self._confidences, dim=1) if self._confidences else torch.empty(2, 0, dtype=torch.float64)
        everyone = torch.cat(ranks.gather(mine), dim=1)
        confusion = None
        if self._confusion is not None:
            sums = ranks.sum_ints(self._confusion.flatten().tolist())
            confusion = np.array(sums, dtype=np.int64).reshape(self._confusion.shape)
        if not images:
            return None
        return Accuracy(images, correct, correct_top5, bad, _calibration_error(everyone), confusion)


def _hits(logits: Tensor, labels: Tensor, num_classes: int, top_k: int) -> int:
    if num_classes == 1:
        return len(labels)
    # The loader has checked the labels already.
    scores = _torchmetrics().multiclass_stat_scores(
        logits, labels, num_classes=num_classes, top_k=top_k, average="micro", validate_args=False
    )
    return int(scores[0])  # true positives


def _calibration_error(answers: Tensor) -> float:
    """Of confidences and whether they were right, [2, images], in float64."""
    confidence, correct = answers
    # In an order that does not depend on who computed what, so that sums are rounded alike.
    order = np.lexsort((correct.numpy(), confidence.numpy()))
    found = _torchmetrics().binary_calibration_error(
        confidence[order].clamp(max=1.0), correct[order].long(), n_bins=CALIBRATION_BINS, norm="l1"
    )
    return float(found)


@dataclass(frozen=True)
class LabelSetAccuracy:
    """Of images with any number of labels, over all ranks; every readable one is counted once."""

    images: int
    labelled: int
    """Images that have a label at all."""
    hits: int
    """Images whose best class is among their labels."""
    unreadable: int
    mean_average_precision: float | None
    """Over the classes that occur; None where it would take too much memory."""

    @property
    def precision_at_1(self) -> float:
        """Share of images whose best class is among their labels."""
        return self.hits / self.images

    @property
    def real_top1(self) -> float:
        """The same among images that have a label: what "ReaL" accuracy means (arXiv 2006.07159)."""
        return self.hits / self.labelled if self.labelled else 0.0

    def to_json(self) -> dict[str, float | int | None]:
        """Plain data for records."""
        return {
            "real_top1": self.real_top1,
            "precision_at_1": self.precision_at_1,
            "mean_average_precision": self.mean_average_precision,
            "images": self.images,
            "labelled": self.labelled,
            "unreadable": self.unreadable,
        }


class LabelSetMeter:
    """Compares this rank's answers with several acceptable labels.

    Args:
        num_classes: K.
        num_images: of the whole set, by which it is decided whether mean average precision is computed.
    """

    def __init__(self, num_classes: int, *, num_images: int) -> None:
        self._num_classes = num_classes
        self._counts = torch.zeros(3, dtype=torch.int64)
        self._keeps_scores = num_images * num_classes <= MAX_SCORES
        self._scores: list[Tensor] = []
        self._targets: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Logits [B, K] and labels [B, M], padded with -1, on one device."""
        targets = torch.zeros(len(labels), self._num_classes + 1, dtype=torch.bool, device=labels.device)
        # Padding goes to a class of its own, which is cut off.
        targets.scatter_(1, torch.where(labels < 0, self._num_classes, labels), value=True)
        targets = targets[:, : self._num_classes]
        hits = targets.gather(1, logits.argmax(dim=1, keepdim=True)).sum()
        self._counts += torch.tensor([len(labels), int(targets.any(dim=1).sum()), int(hits)])
        if self._keeps_scores:
            self._scores.append(logits.cpu())
            self._targets.append(targets.cpu())

    def total(self, ranks: Ranks, *, unreadable: int) -> LabelSetAccuracy | None:
        """Of all ranks. Collective. Arguments and result as of :meth:`AccuracyMeter.total`."""
        images, labelled, hits, bad = ranks.sum_ints([*self._counts.tolist(), unreadable])
        precision: float | None = None
        if self._keeps_scores:
            empty = torch.empty(0, self._num_classes)
            parts = ranks.gather((torch.cat([empty, *self._scores]), torch.cat([empty.bool(), *self._targets])))
            scores, targets = (torch.cat(column) for column in zip(*parts, strict=True))
            precision = _mean_average_precision(scores, targets) if labelled else 0.0
        return LabelSetAccuracy(images, labelled, hits, bad, precision) if images else None


def _mean_average_precision(scores: Tensor, targets: Tensor) -> float:
    """Over the classes that occur; scores and targets [images, K]. Equal scores count as one threshold."""
    present = targets.any(dim=0)
    # Ranks instead of logits: torchmetrics would squeeze those through a sigmoid, where large ones become equal.
    ranked = torch.stack([column.unique(return_inverse=True)[1] for column in scores[:, present].T], dim=1)
    found = _torchmetrics().multilabel_average_precision(
        ranked.double() / max(1, len(scores)),
        targets[:, present].long(),
        num_labels=int(present.sum()),
        average="macro",
        validate_args=False,
    )
    return float(found)

"""Nearest neighbours by cosine similarity with weighted votes (DINO, arXiv 2104.14294, appendix F.1; after Wu et al.,
arXiv 1805.01978). n training images, m test images of a chunk, D width, K classes, k neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from vitscale.config.evaluators import KnnEvaluator
from vitscale.errors import DataError
from vitscale.evaluation.features import Features
from vitscale.evaluation.pieces import Pieces

# Similarities that are in memory at a time, in fp32.
CHUNK_ELEMENTS = 1 << 26


def knn_pieces(
    train: Features, test: Features, settings: KnnEvaluator, device: torch.device
) -> Pieces[dict[str, float]]:
    """Test accuracy by number of neighbours: ``{"10-nn": ...}``. A piece of the work is a chunk of test images.

    Raises:
        DataError: there are fewer training images than neighbours.
    """
    if max(settings.k) > len(train.labels):
        raise DataError(
            f"{max(settings.k)} neighbours are asked for, but the training set has {len(train.labels)} images; ask for "
            f"fewer with --k, or take a larger shard set"
        )
    neighbours, labels = _normalised(train, device), torch.from_numpy(train.labels).to(device)
    queries, truth = _normalised(test, device), torch.from_numpy(test.labels).to(device)
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    correct = dict.fromkeys(settings.k, 0)
    rows = max(1, CHUNK_ELEMENTS // len(neighbours))
    for start in range(0, len(queries), rows):
        similarity, nearest = (queries[start : start + rows] @ neighbours.T).topk(max(settings.k), dim=1)  # [m, k]
        for k in settings.k:
            votes = weighted_votes(similarity[:, :k], labels[nearest[:, :k]], num_classes, settings.temperature)
            correct[k] += int((votes.argmax(dim=1) == truth[start : start + rows]).sum())
        yield
    return {f"{k}-nn": right / len(queries) for k, right in correct.items()}


def weighted_votes(similarity: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Votes [m, K] of neighbours with similarities [m, k] and labels [m, k], up to a factor for each image."""
    # Relative to the nearest one, which changes no decision, and cannot overflow at a small temperature.
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    return torch.zeros(len(labels), num_classes, device=labels.device).scatter_add_(1, labels, weights)


def _normalised(features: Features, device: torch.device) -> Tensor:
    values = torch.from_numpy(features.values).to(device, torch.float32)
    return torch.nn.functional.normalize(values, dim=1)

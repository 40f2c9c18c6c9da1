"""One evaluation of frozen features, as a command or during training: which sets, and what is done with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from vitscale.config.evaluators import FeatureEvaluator, FewshotEvaluator, KnnEvaluator
from vitscale.config.schema import StorageConfig
from vitscale.data.manifest import Manifest
from vitscale.data.parts import check_disjoint
from vitscale.data.shard_set import open_evaluation_set
from vitscale.distributed import Ranks
from vitscale.evaluation.features import Features
from vitscale.evaluation.fewshot import fewshot_json, fewshot_pieces
from vitscale.evaluation.knn import knn_pieces
from vitscale.evaluation.pieces import Pieces, never, on_main_in_pieces
from vitscale.evaluation.probe import probe_pieces

FeaturesOf = Callable[[Manifest], Features | None]
"""Collective; the features of a set as of :func:`vitscale.evaluation.features.extract_features`."""


def open_feature_sets(evaluator: FeatureEvaluator, storage: StorageConfig) -> tuple[Manifest, Manifest]:
    """The sets to learn from and to classify.

    Raises:
        DataError: one of them cannot be used, their labels mean different things, or they share images.
    """
    train = open_evaluation_set(evaluator.train, storage)
    test = open_evaluation_set(evaluator.test, storage, classes=train.classes, of=train.shown)
    check_disjoint(train, test)
    return train, test


def evaluate_features(
    evaluator: FeatureEvaluator,
    sets: tuple[Manifest, Manifest],
    features_of: FeaturesOf,
    *,
    ranks: Ranks,
    is_stopping: Callable[[], bool] = never,
) -> dict[str, Any] | None:
    """Judge a representation. Collective.

    Args:
        evaluator: what is done.
        sets: to learn from and to classify.
        features_of: extracts their features.
        ranks: who takes part.
        is_stopping: collective; asked now and then. If true, the evaluation is given up.

    Returns:
        The results as plain data, the same on every rank; ``None`` if it was given up.

    Raises:
        DataError: the sets have too few images for what is asked.
    """
    train_set, test_set = sets
    train = features_of(train_set)
    test = None if train is None else features_of(test_set)
    if train is None or test is None:
        return None
    work = partial(_pieces, evaluator, train, test, train_set.classes, ranks.device)
    done = on_main_in_pieces(work, ranks, is_stopping=is_stopping)
    return None if done is None else done[0]


def _pieces(
    evaluator: FeatureEvaluator, train: Features, test: Features, classes: Sequence[str] | None, device: torch.device
) -> Pieces[dict[str, Any]]:
    results: dict[str, Any] = {}
    if isinstance(evaluator, FewshotEvaluator):
        results |= fewshot_json((yield from fewshot_pieces(train, test, evaluator, classes)))
    elif isinstance(evaluator, KnnEvaluator):
        results |= yield from knn_pieces(train, test, evaluator, device)
    else:
        results |= (yield from probe_pieces(train, test, evaluator, device)).to_json()
    return {**results, "images": len(test.labels), "unreadable": len(train.unreadable) + len(test.unreadable)}

"""Nearest neighbours against votes that are counted one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import vitscale.evaluation.knn as knn_module
from tests.unit.vitscale.evaluation.features_for_tests import balanced, clusters, count_pieces, finish
from vitscale.config.evaluators import KnnEvaluator
from vitscale.errors import DataError
from vitscale.evaluation.features import Features
from vitscale.evaluation.knn import knn_pieces, weighted_votes

CPU = torch.device("cpu")


def settings(*k: int, temperature: float = 0.07) -> KnnEvaluator:
    return KnnEvaluator(train="", test="", k=k, temperature=temperature)


def by_hand(train: Features, test: Features, k: int, temperature: float) -> float:
    right = 0
    for query, truth in zip(test.values, test.labels, strict=True):
        similarities = [float(query @ other / np.linalg.norm(query) / np.linalg.norm(other)) for other in train.values]
        nearest = sorted(range(len(similarities)), key=lambda n: -similarities[n])[:k]
        votes: dict[int, float] = {}
        for n in nearest:
            label = int(train.labels[n])
            votes[label] = votes.get(label, 0.0) + math.exp(similarities[n] / temperature)
        right += max(votes, key=lambda label: votes[label]) == truth
    return right / len(test.labels)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("chunk", [1, 200, 1 << 26])
def test_equals_votes_counted_by_hand(monkeypatch: pytest.MonkeyPatch, chunk: int, temperature: float) -> None:
    monkeypatch.setattr(knn_module, "CHUNK_ELEMENTS", chunk)
    rng = np.random.default_rng(0)
    train, test = (Features(rng.normal(size=(n, 5)) + 0.5, balanced([0, 3, 7], n // 3)) for n in (60, 30))
    found = finish(knn_pieces(train, test, settings(1, 5, 20, temperature=temperature), CPU))
    expected = {f"{k}-nn": by_hand(train, test, k, temperature) for k in (1, 5, 20)}
    assert found == pytest.approx(expected, abs=1e-12)
    assert len(set(found.values())) > 1


def test_near_neighbours_outvote_many_far_ones() -> None:
    similarity, labels = torch.tensor([[0.9, 0.2, 0.2]]), torch.tensor([[0, 1, 1]])
    assert weighted_votes(similarity, labels, 2, 0.07).argmax() == 0
    assert weighted_votes(similarity, labels, 2, 100.0).argmax() == 1
    assert weighted_votes(similarity, labels, 2, 1e-6).isfinite().all()


def test_length_does_not_matter_and_a_neighbour_is_its_own_nearest() -> None:
    train = clusters(balanced([0, 1, 2], 20), dim=8, spread=6.0, seed=1)
    scaled = Features(train.values * np.linspace(0.1, 9, 60)[:, None], train.labels)
    assert finish(knn_pieces(train, scaled, settings(1), CPU)) == {"1-nn": 1.0}


def test_more_neighbours_than_images_are_an_error() -> None:
    train = clusters(balanced([0, 1], 4), dim=4, spread=1.0, seed=1)
    with pytest.raises(DataError, match=r"20 neighbours are asked for, but the training set has 8 images; .* --k"):
        finish(knn_pieces(train, train, settings(5, 20), CPU))
    assert finish(knn_pieces(train, train, settings(8), CPU)).keys() == {"8-nn"}


def test_each_chunk_is_a_piece_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    train = clusters(balanced([0, 1], 4), dim=4, spread=1.0, seed=1)
    monkeypatch.setattr(knn_module, "CHUNK_ELEMENTS", 24)
    assert count_pieces(knn_pieces(train, train, settings(1), CPU)) == 3

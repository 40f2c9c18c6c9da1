"""Metrics against their definitions written out, and the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.distributed import run_ranks
from vitscale.evaluation.metrics import Accuracy, AccuracyMeter, LabelSetAccuracy, LabelSetMeter
from vitscale.topology import Topology

IMAGES, CLASSES, WIDEST = 203, 7, 3


def table() -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, K], one label [n], and sets of labels [n, M] of which some are empty."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    logits = 2 * torch.randn(IMAGES, CLASSES, generator=generator)
    logits[torch.arange(IMAGES), labels] += 1.5
    # Equal scores, and so large ones that a sigmoid cannot tell them apart.
    logits = (logits * 8).round() * 10
    sets = torch.stack([torch.randperm(CLASSES - 1, generator=generator)[:WIDEST] for _ in range(IMAGES)])
    sets[torch.arange(WIDEST) >= torch.randint(WIDEST + 1, (IMAGES, 1), generator=generator)] = -1
    return logits, labels, sets


def calibration_by_hand(logits: Tensor, labels: Tensor) -> float:
    confidence, best = logits.softmax(dim=1).max(dim=1)
    error = 0.0
    for low in np.arange(15) / 15:
        inside = [n for n in range(len(labels)) if low < confidence[n] <= low + 1 / 15]
        if inside:
            sure = float(confidence[inside].double().mean())
            right = float((best[inside] == labels[inside]).double().mean())
            error += len(inside) / len(labels) * abs(sure - right)
    return error


def precision_by_hand(scores: Sequence[float], wanted: Sequence[bool]) -> float:
    """Sum of precision at each threshold, weighted by the recall that it adds."""
    total = 0.0
    for threshold in sorted(set(scores), reverse=True):
        above = [hit for score, hit in zip(scores, wanted, strict=True) if score >= threshold]
        added = sum(hit for score, hit in zip(scores, wanted, strict=True) if score == threshold)
        total += sum(above) / len(above) * added / sum(wanted)
    return total


def mean_precision_by_hand(logits: Tensor, sets: Tensor) -> float:
    found = []
    for label in range(CLASSES):
        wanted = [label in row for row in sets.tolist()]
        if any(wanted):
            found.append(precision_by_hand(logits[:, label].tolist(), wanted))
    assert len(found) == CLASSES - 1, "one class occurs nowhere, and has no precision"
    return sum(found) / len(found)


def shares(topology: Topology, batch: int) -> list[list[int]]:
    """The images of a rank, by batch; later ranks have none of the last ones."""
    starts = range(topology.rank * batch, IMAGES, topology.world_size * batch)
    return [list(range(start, min(start + batch, IMAGES))) for start in starts]


def _single(topology: Topology, batch: int) -> None:
    from vitscale.distributed import connect

    logits, labels, _ = table()
    with connect(topology, timeout_s=60) as ranks:
        meter = AccuracyMeter(CLASSES, confusion=True)
        for rows in shares(topology, batch):
            meter.add(logits[rows], labels[rows])
        meter.add(logits[:0], labels[:0])
        found = meter.total(ranks, unreadable=topology.rank)
        assert isinstance(found, Accuracy)
        best = logits.argmax(dim=1)
        assert (found.images, found.correct) == (IMAGES, int((best == labels).sum()))
        assert found.unreadable == sum(range(topology.world_size))
        assert found.calibration_error == pytest.approx(calibration_by_hand(logits, labels), abs=1e-9)
        assert 0.01 < found.calibration_error < 0.9
        expected = np.zeros((CLASSES, CLASSES), dtype=np.int64)
        for true, predicted in zip(labels.tolist(), best.tolist(), strict=True):
            expected[true, predicted] += 1
        assert found.confusion is not None
        np.testing.assert_array_equal(found.confusion, expected)
        whole = AccuracyMeter(CLASSES)
        if topology.is_main:
            whole.add(logits, labels)
        again = whole.total(ranks, unreadable=0)
        assert again is not None
        # To the last bit: what is recorded must not depend on the number of ranks.
        assert again.calibration_error == found.calibration_error


@pytest.mark.parametrize("world_size", [1, 3])
def test_one_label_per_image(world_size: int) -> None:
    run_ranks(_single, world_size, 16)


def _several(topology: Topology, batch: int) -> None:
    from vitscale.distributed import connect

    logits, _, sets = table()
    with connect(topology, timeout_s=60) as ranks:
        meter = LabelSetMeter(CLASSES, num_images=IMAGES)
        for rows in shares(topology, batch):
            # A batch is as wide as its widest image.
            width = max(1, int((sets[rows] >= 0).sum(dim=1).max()))
            meter.add(logits[rows], sets[rows].sort(dim=1, descending=True).values[:, :width])
        found = meter.total(ranks, unreadable=1)
        assert isinstance(found, LabelSetAccuracy)
        best = logits.argmax(dim=1).tolist()
        hits = sum(best[n] in sets[n].tolist() for n in range(IMAGES))
        labelled = sum(max(row) >= 0 for row in sets.tolist())
        assert (found.images, found.labelled, found.hits, found.unreadable) == (
            IMAGES,
            labelled,
            hits,
            topology.world_size,
        )
        assert hits < labelled < IMAGES
        assert (found.precision_at_1, found.real_top1) == (hits / IMAGES, hits / labelled)
        assert found.mean_average_precision == pytest.approx(mean_precision_by_hand(logits, sets), abs=1e-6)


@pytest.mark.parametrize("world_size", [1, 3])
def test_several_labels_per_image(world_size: int) -> None:
    run_ranks(_several, world_size, 10)


def _limits(topology: Topology) -> None:
    from vitscale.distributed import connect

    with connect(topology, timeout_s=60) as ranks:
        huge = LabelSetMeter(CLASSES, num_images=10**9)
        huge.add(torch.eye(CLASSES), torch.arange(CLASSES)[:, None])
        found = huge.total(ranks, unreadable=0)
        assert found is not None
        assert (found.mean_average_precision, found.real_top1) == (None, 1.0)
        bare = LabelSetMeter(CLASSES, num_images=2)
        bare.add(torch.eye(CLASSES)[:2], torch.full((2, 1), -1))
        found = bare.total(ranks, unreadable=0)
        assert found is not None
        assert (found.real_top1, found.precision_at_1, found.labelled) == (0.0, 0.0, 0)
        assert AccuracyMeter(3).total(ranks, unreadable=4) is None
        assert LabelSetMeter(3, num_images=4).total(ranks, unreadable=4) is None
        one = AccuracyMeter(1)
        one.add(torch.randn(4, 1), torch.zeros(4, dtype=torch.int64))
        alone = one.total(ranks, unreadable=0)
        assert alone is not None
        assert (alone.top1, alone.top5, alone.calibration_error) == (1.0, 1.0, 0.0)


def test_too_large_empty_and_single() -> None:
    run_ranks(_limits, 1)

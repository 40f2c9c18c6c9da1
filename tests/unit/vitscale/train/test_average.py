"""The moving average of the weights: its values, and that using it in an evaluation leaves training as it was."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.distributed import run_ranks
from tests.unit.vitscale.checkpoint.engines import build, make_steps
from vitscale.checkpoint.format import AVERAGE, MASTER
from vitscale.checkpoint.fragments import fragments
from vitscale.distributed import connect
from vitscale.topology import Topology
from vitscale.train.average import WeightAverage

DECAY = 0.75


def _values(engine: Any, kind: str, average: WeightAverage) -> list[Tensor]:
    """Copies of this rank's parts. The padding between them may be anything, even NaN."""
    return [part.values.clone() for part in fragments(engine, average.partitions) if part.kind == kind]


def _average(topology: Topology, stage: int, precision: str) -> None:
    with connect(topology, timeout_s=60) as ranks:
        engine = build(stage, precision, ranks, seed=1)
        average = WeightAverage(engine, decay=DECAY)
        values = partial(_values, engine, average=average)
        expected = [part.double() for part in values(MASTER)]
        for _ in range(3):
            make_steps(engine)
            average.update()
            expected = [DECAY * old + (1 - DECAY) * new for old, new in zip(expected, values(MASTER), strict=True)]
        for part, value in zip(values(AVERAGE), expected, strict=True):
            assert torch.allclose(part.double(), value, rtol=1e-6, atol=1e-9)

        weights, averages = values(MASTER), values(AVERAGE)
        images = torch.ones(1, 7, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        engine.eval()
        before = engine(images).clone()
        with average.in_place():
            assert not torch.equal(engine(images), before)
            assert all(torch.equal(a, b) for a, b in zip(values(MASTER), averages, strict=True))
        assert torch.equal(engine(images), before)
        assert all(torch.equal(a, b) for a, b in zip(values(MASTER), weights, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(values(AVERAGE), averages, strict=True))


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_average(stage: int, precision: str) -> None:
    run_ranks(_average, 2, stage, precision)

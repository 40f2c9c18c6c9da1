"""The first steps of a fixed run, pinned: nothing that changes what is trained on or computed goes unnoticed.

``tests/golden/losses.json`` holds the identity of every global batch, which must be equal, and the losses, gradient
norms and learning rates, which may differ by the order of sums between machines. If they change on purpose (which
breaks the promise that runs in progress continue alike), write the file again with
``python -m tests.integration.test_golden`` and say why in the changelog.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.command import vitscale
from tests.helpers.runs import CONFIG, REPOSITORY, metrics, overrides, write_digits

GOLDEN = REPOSITORY / "tests" / "golden" / "losses.json"
# Dropout is off: its random numbers belong to torch and may change with its release.
FIXED = (
    "duration={steps: 8}",
    "schedule={decay: linear, warmup: {steps: 3}, final_lr: 1e-5}",
    "optim.lr=5e-3",
    "model.pool=token",
    "model.representation_layer=true",
    "model.dropout=0",
    "model.stochastic_depth=0",
    "data.crop_area=[0.3, 1.0]",
    "data.flip=true",
    "data.eval=null",
)


def records(digits: Path, run: Path) -> list[dict[str, Any]]:
    """What the run records of every step."""
    outcome = vitscale("train", CONFIG, *overrides(digits, run, *FIXED))
    assert outcome.code == 0, outcome.errors
    keys = ("step", "examples_seen", "batch_digest", "lr", "loss", "grad_norm")
    return [{key: record[key] for key in keys} for record in metrics(run)]


def test_the_first_steps_are_pinned(digits: Path, tmp_path: Path) -> None:
    found, pinned = records(digits, tmp_path / "run"), json.loads(GOLDEN.read_text())
    for name in ("step", "examples_seen", "batch_digest"):
        assert [r[name] for r in found] == [r[name] for r in pinned], name
    # Other orders of summation, as by other micro-batches, move losses by 2e-7 and gradient norms by 1e-5.
    for name, tolerance in (("lr", 1e-12), ("loss", 1e-5), ("grad_norm", 5e-5)):
        assert [r[name] for r in found] == pytest.approx([r[name] for r in pinned], rel=tolerance), name


def test_the_pinned_run_learns() -> None:
    pinned = json.loads(GOLDEN.read_text())
    assert len({r["batch_digest"] for r in pinned}) == len(pinned) == 8
    # ln 10, as the head starts at zero; the first update has a learning rate of zero.
    assert pinned[0]["loss"] == pinned[1]["loss"] == pytest.approx(2.302585, rel=1e-6)
    assert all(r["loss"] != pinned[0]["loss"] for r in pinned[2:])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        lines = [json.dumps(r) for r in records(write_digits(Path(scratch) / "digits"), Path(scratch) / "run")]
    GOLDEN.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    sys.stderr.write(f"wrote {GOLDEN}\n")

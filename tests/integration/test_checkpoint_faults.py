"""A run that finds its checkpoints damaged, or itself in the wrong place. The real command on two ranks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.helpers.runs import assert_same_state, finish, metrics, overrides, start_training, trajectory
from vitscale.checkpoint.store import step_names

pytestmark = pytest.mark.timeout(180)

EVERY = "checkpoint.every={steps: 3}"


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 12 steps, undisturbed."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start_training(overrides(digits, run, EVERY)))
    assert step_names(run / "checkpoints") == ["step-000000012", "step-000000009", "step-000000006"]
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """The same run as a kill before its last commit leaves it."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step-000000012")
    (run / "checkpoints" / "latest").write_text("step-000000009\n")
    return run


def assert_as_undisturbed(run: Path, whole: Path) -> None:
    assert [record["step"] for record in metrics(run)] == list(range(1, 13))
    assert trajectory(run) == trajectory(whole)
    assert_same_state(run, whole)
    assert (run / "checkpoints" / "latest").read_text() == "step-000000012\n"


def test_a_damaged_newest_checkpoint_costs_a_few_steps(digits: Path, run: Path, whole: Path) -> None:
    file = run / "checkpoints" / "step-000000009" / "rank-00001.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 100)
    errors = finish(start_training(overrides(digits, run, EVERY)))
    said = (
        f"checkpoint step-000000009 is damaged ({file.name} has {size - 100} of {size} bytes); moved to damaged-step-"
    )
    assert errors.count(said) == 1, errors
    assert "attempt 2: continuing from the checkpoint of step 6" in errors
    assert (run / "checkpoints" / "damaged-step-000000009").is_dir()
    assert len(metrics(run, "metrics.rolled_back.jsonl")) == 6
    assert_as_undisturbed(run, whole)


def test_without_a_complete_checkpoint_the_run_starts_again_and_says_so(digits: Path, run: Path, whole: Path) -> None:
    checkpoints = run / "checkpoints"
    (checkpoints / "step-000000009" / "manifest.json").unlink()
    # Content of the right size: only rank 1's part of the digests finds it.
    file = checkpoints / "step-000000006" / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    errors = finish(start_training(overrides(digits, run, EVERY)))
    for said in (
        f"none of the 2 checkpoints in {checkpoints} is complete",
        "checkpoint step-000000009 is damaged (manifest.json cannot be read (No such file or directory)); moved to",
        "checkpoint step-000000006 is damaged (rank-00001.safetensors has other content); moved to damaged-step-",
        "attempt 2: starting from scratch",
    ):
        assert errors.count(said) == 1, errors
    assert_as_undisturbed(run, whole)


def test_another_shard_set_is_refused_and_the_run_folder_left_as_it_was(digits: Path, run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    errors = finish(start_training(overrides(digits, run, EVERY, f"data.train={digits / 'val'}")), expect=1)
    assert errors.count("vitscale: ") == 1, errors
    said = f"vitscale: error: {run / 'checkpoints' / 'step-000000009'}: was trained on other data: another content of"
    assert said in errors
    assert "bring back the shards and the shares, or start another run folder" in errors
    assert "Traceback" not in errors
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_another_model_is_refused_with_the_difference(digits: Path, run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    errors = finish(start_training(overrides(digits, run, EVERY, "model.depth=3")), expect=2)
    assert errors.count("vitscale: ") == 1, errors
    assert f"vitscale: error: run: {run} belongs to a run with another configuration:\n" in errors
    assert "\n  model.depth: 2 -> 3\n" in errors
    assert "Traceback" not in errors
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

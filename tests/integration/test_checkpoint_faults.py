"""A run that finds its checkpoints damaged, or itself in the wrong place. The command on two ranks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.command import train
from tests.helpers.disk import mount_tmpfs, unmounted_afterwards
from tests.helpers.runs import (
    REPOSITORY,
    assert_same_state,
    checkpoint_of,
    checkpoints_of,
    final_state,
    finish,
    metrics,
    overrides,
    start_training,
    trajectory,
)

pytestmark = pytest.mark.timeout(180)

EVERY = "checkpoint.every={steps: 3}"


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 12 steps, undisturbed."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(overrides(digits, run, EVERY))
    assert checkpoints_of(run) == ["step-000000012", "step-000000009", "step-000000006"]
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
    errors = train(overrides(digits, run, EVERY))
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
    errors = train(overrides(digits, run, EVERY))
    for said in (
        f"none of the 2 checkpoints in {checkpoints} is complete",
        "checkpoint step-000000009 is damaged (it has no manifest); moved to damaged-step-000000009",
        "checkpoint step-000000006 is damaged (rank-00001.safetensors has other content from byte 0 on)",
        "attempt 2: starting from scratch",
    ):
        assert errors.count(said) == 1, errors
    assert_as_undisturbed(run, whole)


def test_another_shard_set_is_refused_and_the_run_folder_left_as_it_was(digits: Path, run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    errors = train(overrides(digits, run, EVERY, f"data.train={digits / 'val'}"), expect=1)
    assert errors.count("vitscale: ") == 1, errors
    said = f"vitscale: error: {run / 'checkpoints' / 'step-000000009'}: was trained on other data: another content of"
    assert said in errors
    assert "bring back the shards and the shares, or start another run folder" in errors
    assert "Traceback" not in errors
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_another_model_is_refused_with_the_difference(digits: Path, run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    errors = train(overrides(digits, run, EVERY, "model.depth=3"), expect=2)
    assert errors.count("vitscale: ") == 1, errors
    assert f"vitscale: error: run: {run} belongs to a run with another configuration:\n" in errors
    assert "\n  model.depth: 2 -> 3\n" in errors
    assert "Traceback" not in errors
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


READER = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_a_stranger_reads_a_checkpoint_with_what_the_documentation_says(whole: Path, tmp_path: Path) -> None:
    (code,) = READER.findall((REPOSITORY / "docs" / "checkpoints.md").read_text())
    assert len(code.splitlines()) <= 50
    assert "import vitscale" not in code
    assert "from vitscale" not in code
    (tmp_path / "reader.py").write_text(code)
    (tmp_path / "dump.py").write_text(
        "import sys, numpy\n"
        "from pathlib import Path\n"
        "from reader import read_checkpoint\n"
        "tensors = read_checkpoint(Path(sys.argv[1]))\n"
        "numpy.savez('out.npz', **{f'{name}|{kind}': values for (kind, name), values in tensors.items()})\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('vitscale', 'torch', 'safetensors')]\n"
    )
    newest = whole / "checkpoints" / "step-000000012"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "dump.py", newest], cwd=tmp_path, env=clean, check=True)
    with np.load(tmp_path / "out.npz") as found:
        expected = final_state(whole)
        assert set(found.files) == expected.keys()
        assert all(np.array_equal(found[name], values.numpy()) for name, values in expected.items())


@pytest.mark.parametrize("tolerated", [0, 2])
def test_a_full_disk_stops_the_run_or_not_as_configured(digits: Path, tmp_path: Path, tolerated: int) -> None:
    """A real file system of 1 MB for all of the run. It has no room for the first checkpoint, and has some later."""
    with unmounted_afterwards(tmp_path / "disk") as disk:
        mount_tmpfs(disk, "size=1m")
        run = disk / "run"
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(980_000))  # what is left is enough for all but a checkpoint
        arguments = overrides(digits, run, "checkpoint.every={steps: 4}", "data.eval=null")
        arguments += [f"checkpoint.tolerate_failures={tolerated}", "duration={steps: 60}"]
        if tolerated:
            process = start_training(arguments)
            # The disk is full for the first save and perhaps the second; then someone makes room.
            assert process.stderr is not None
            said = ""
            while "was not saved" not in said:
                said += process.stderr.readline()
            ballast.unlink()
            said += finish(process)
            assert "a checkpoint was not saved (1 of 2 failures in a row" in said
        else:
            said = train(arguments, expect=1)
            assert said.count("vitscale: error: ") == 1, said
            ballast.unlink()
        assert "No space left on device; free space or mend the disk" in said
        assert "Traceback" not in said
        assert not list((run / "checkpoints").glob(".staging-*"))
        if not tolerated:
            train(arguments)
        assert len(metrics(run)) == 60
        assert checkpoint_of(run).step == 60

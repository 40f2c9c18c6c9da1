"""`vitscale launch plan`: what it prints, what it refuses, and that it needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vitscale.errors import ConfigError, DataError, LaunchError, TopologyError
from vitscale_launch.cli import app
from vitscale_launch.preflight import check_run


def test_the_plan_is_printed(config: Path, tmp_path: Path) -> None:
    command = ["plan", str(config), "--nodes", "3", "--ranks-per-node", "2", "duration={steps: 40}"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    rows = {line[:12].strip(): line[13:] for line in result.stdout.splitlines()}
    assert rows["global batch"] == "24 = 2 per rank x 2 accumulated x 6 ranks"
    assert rows["data"] == "50 images in 4 shards"
    assert rows["length"] == "40 steps, 19.20 epochs; warm-up 4 steps"
    assert rows["run"] == str(tmp_path / "runs" / "first")


def test_planning_leaves_no_trace(config: Path, tmp_path: Path) -> None:
    check_run(config, [], world_size=1)
    assert not (tmp_path / "runs").exists()


def test_ranks_that_cannot_share_the_batch(config: Path) -> None:
    with pytest.raises(TopologyError, match=r"12 micro-batches, which 5 ranks .* fit: 1, 2, 3, 4, 6, 12;"):
        check_run(config, [], world_size=5)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_shard_set_without_its_index(config: Path, shards: Path, split: str) -> None:
    (shards / split / "index.json").unlink()
    with pytest.raises(DataError, match=rf"{split}: holds no index.json"):
        check_run(config, [], world_size=1)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_shard_of_another_size_than_its_index_says(config: Path, shards: Path, split: str) -> None:
    shard = shards / split / f"{split}-000000.tar"
    size = shard.stat().st_size
    with shard.open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=f"{shard.name} has {size + 1} bytes where the index says {size}"):
        check_run(config, [], world_size=1)


def test_missing_tars_and_member_indexes(config: Path, shards: Path) -> None:
    (shards / "train" / "train-000001.tar").unlink()
    (shards / "train" / "train-000002.idx").unlink()
    with pytest.raises(DataError, match=r"train-000001.tar is missing; train-000002.idx is missing"):
        check_run(config, [], world_size=1)


def test_a_missing_shard_set(config: Path, shards: Path) -> None:
    with pytest.raises(DataError, match="no such shard set"):
        check_run(config, [f"data.train={shards / 'nowhere'}"], world_size=1)


def test_an_evaluation_set_with_more_classes_than_the_head(config: Path, shards: Path) -> None:
    _add_a_class(shards / "val")
    with pytest.raises(DataError, match=r"val: has 4 classes, but the model's head has 3 outputs; evaluate on a set"):
        check_run(config, [], world_size=1)


def test_an_evaluation_set_with_other_classes(config: Path, shards: Path) -> None:
    path = shards / "val" / "index.json"
    index = json.loads(path.read_text())
    index["vitscale"]["classes"].reverse()
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"val: label 0 is 'class2', but 'class0' in the training set; write both sets"):
        check_run(config, [], world_size=1)


def test_a_warmup_that_outlasts_the_run(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"schedule\.warmup: 21 steps comes to 21 steps, but the run has 20"):
        check_run(config, ["schedule.warmup={steps: 21}"], world_size=1)


def test_a_training_set_with_more_classes_than_the_head(config: Path, shards: Path) -> None:
    _add_a_class(shards / "train")
    with pytest.raises(ConfigError, match=r"set model\.num_classes=4"):
        check_run(config, [], world_size=1)


def test_a_run_folder_below_a_file(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match=r"file cannot be written: Not a directory; choose another folder with run="):
        check_run(config, [f"run={tmp_path / 'file' / 'run'}"], world_size=1)


def test_a_run_folder_that_is_a_file(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match="cannot be written"):
        check_run(config, [f"run={tmp_path / 'file'}"], world_size=1)


def test_a_run_folder_on_a_read_only_file_system(config: Path) -> None:
    with pytest.raises(LaunchError, match="cannot be written"):
        check_run(config, ["run=/proc/run"], world_size=1)


def test_a_relative_run_folder(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_run(config, ["run=some/where"], world_size=1)[-1] == ("run", "some/where")


def test_a_wrong_configuration(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        check_run(config, ["optim.lr=-1"], world_size=1)


def test_the_command_leaves_with_the_error_and_its_exit_status(config: Path) -> None:
    for overrides, code in ((["optim.lr=-1"], 2), (["micro_batch_size=24", "global_batch_size=48"], 1)):
        command = [sys.executable, "-m", "vitscale", "launch", "plan", str(config), *overrides]
        done = subprocess.run([*command, "--nodes", "5"], capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert done.stderr.startswith("vitscale: error: ")
        assert "Traceback" not in done.stderr
        assert done.stdout == ""


def test_no_torch_is_loaded(config: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "import vitscale_launch, vitscale_launch.cli\n"
        "from vitscale_launch.preflight import check_run\n"
        f"check_run(Path({str(config)!r}), [], world_size=2)\n"
        "heavy = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(heavy & {'torch', 'deepspeed', 'triton', 'torchmetrics', 'sklearn'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_no_torch_is_loaded_by_the_command(config: Path) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['vitscale', 'launch', 'plan', {str(config)!r}]\n"
        "from vitscale.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def _add_a_class(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["vitscale"]["classes"].append("another")
    (folder / "index.json").write_text(json.dumps(index))

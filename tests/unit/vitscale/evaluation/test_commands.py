"""Which values of a run's configuration an evaluation may change, and which weights it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.runs import CONFIG, TINY
from tests.unit.vitscale.checkpoint.vit_run import make_run, save_vit, state_of
from vitscale.checkpoint.choices import Weights
from vitscale.checkpoint.commands import choose
from vitscale.checkpoint.folder import LocalFolder
from vitscale.checkpoint.format import AVERAGE, MASTER
from vitscale.config.loader import load_config
from vitscale.config.reference import diff_configs, dump_config
from vitscale.distributed import connect
from vitscale.errors import CheckpointError, ConfigError
from vitscale.evaluation.commands import load_model, read_run_config
from vitscale.topology import Topology


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(dump_config(load_config(CONFIG, [*TINY, "data.storage.cache=/cache"])))
    return tmp_path


def test_how_data_is_read_may_change(run: Path) -> None:
    overrides = ("data.storage.allow_pipe=true", "data.storage.cache=null", "data.workers=9")
    changed = read_run_config(run, [*overrides, "data.prefetch_batches=9", "data.read_ahead_batches=0"])
    assert [change.key for change in diff_configs(read_run_config(run), changed)] == [
        "data.workers",
        "data.prefetch_batches",
        "data.read_ahead_batches",
        "data.storage.cache",
        "data.storage.allow_pipe",
    ]


@pytest.mark.parametrize(
    "key", ["model.depth", "data.eval", "data.eval_crop_share", "data.image_size", "data", "data.workersx", "run"]
)
def test_what_the_model_sees_may_not_change(run: Path, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_run_config(run, ["data.workers=1", f"{key}=3"])
    assert str(caught.value) == (
        f"{key}: is what the run was trained with and cannot be changed here; allowed are data.storage.* and "
        f"data.workers, data.prefetch_batches and data.read_ahead_batches; leave it out"
    )


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("data.storage.cach=null", "unknown key"),
        ("data.workers=0", "must be greater than 0"),
        ("data/val", "not an override; write key.path=value"),
    ],
)
def test_a_wrong_override_is_told_as_in_training(run: Path, override: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read_run_config(run, [override])


def test_the_weights_that_were_asked_for_are_evaluated(tmp_path: Path) -> None:
    config = make_run(tmp_path / "run")
    with connect(Topology(), timeout_s=60) as ranks:
        for averaged in (False, True):
            save_vit(config, ranks, 1 + averaged, averaged=averaged)
        folder = LocalFolder(config.run / "checkpoints")
        checkpoint = choose(folder, None)
        for weights, kind in ((Weights.RAW, MASTER), (Weights.EMA, AVERAGE)):
            model, state = load_model(config, checkpoint, weights, ranks), state_of(config, 2, kind)
            assert all(torch.equal(values, state[name]) for name, values in model.state_dict().items())
        without = choose(folder, 1)
        with pytest.raises(
            CheckpointError, match=r"step-000000001: holds no averaged weights.* --weights raw$"
        ) as raised:
            load_model(config, without, Weights.EMA, ranks)
        assert raised.value.agreed

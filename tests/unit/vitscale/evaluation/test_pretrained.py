"""A model to be judged: which weights it has, at which image size, and what of a run's configuration may change."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.runs import CONFIG, TINY
from tests.unit.vitscale.checkpoint.vit_run import CLASSES, make_run, save_vit, state_of
from vitscale.checkpoint.choices import Weights
from vitscale.checkpoint.format import AVERAGE, MASTER
from vitscale.config.loader import load_config
from vitscale.config.reference import diff_configs, dump_config
from vitscale.config.schema import TrainConfig
from vitscale.distributed import connect
from vitscale.errors import CheckpointError, ConfigError, WeightsError
from vitscale.evaluation.choices import ModelChoice
from vitscale.evaluation.pretrained import describe_pretrained, open_pretrained, read_run_config
from vitscale.topology import Topology
from vitscale.weights.choices import ResizeMode, WeightFormat
from vitscale.weights.resize import resize_position_embedding
from vitscale.weights.save import save_weights


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


def test_the_weights_that_were_asked_for_are_taken(tmp_path: Path) -> None:
    config = make_run(tmp_path / "run")
    with connect(Topology(), timeout_s=60) as ranks:
        for averaged in (False, True):
            save_vit(config, ranks, 1 + averaged, averaged=averaged)
        digests = set()
        for step, weights, kind in ((None, Weights.RAW, MASTER), (2, Weights.EMA, AVERAGE), (1, Weights.RAW, MASTER)):
            found, state = (
                open_pretrained(ModelChoice(config.run, step, weights), ranks),
                state_of(config, step or 2, kind),
            )
            assert all(torch.equal(values, state[name]) for name, values in found.model.state_dict().items())
            assert (found.step, found.weights, found.image_hw) == (step or 2, weights, (8, 8))
            assert (found.config, found.data, found.classes) == (config.model, config.data, tuple(CLASSES))
            assert not found.model.training
            assert found.name == ("run (ema)" if weights is Weights.EMA else "run")
            digests.add(found.digest)
        assert len(digests) == 3
        with pytest.raises(
            CheckpointError, match=r"step-000000001: holds no averaged weights.* --weights raw$"
        ) as raised:
            open_pretrained(ModelChoice(config.run, 1, Weights.EMA), ranks)
        assert raised.value.agreed


def export(run_config: TrainConfig, path: Path) -> dict[str, torch.Tensor]:
    """The weights of step 1 as a file."""
    state = state_of(run_config, 1)
    save_weights(path, state, WeightFormat.SAFETENSORS, run_config.model, run_config.data.image_hw)
    return state


def test_a_file_is_the_same_model_as_the_run(tmp_path: Path) -> None:
    config = make_run(tmp_path / "run", "model.gelu=erf")
    path = tmp_path / "weights.safetensors"
    with connect(Topology(), timeout_s=60) as ranks:
        save_vit(config, ranks, 1)
        state = export(config, path)
        run, file = open_pretrained(ModelChoice(config.run), ranks), open_pretrained(ModelChoice(path), ranks)
        images = torch.rand(2, 3, 8, 8)
        with torch.no_grad():
            assert torch.equal(file.model(images), run.model(images))
        assert all(torch.equal(values, state[name]) for name, values in file.model.state_dict().items())
        assert (file.step, file.image_hw, file.name) == (None, (8, 8), "weights.safetensors")
        assert file.digest == hashlib.sha256(path.read_bytes()).hexdigest()
        assert file.config.gelu == "erf"
        assert (file.data.eval, file.data.eval_crop_share, file.data.workers) == (None, 0.875, 2)
        changed = open_pretrained(ModelChoice(path, overrides=("data.workers=3", "data.eval_crop_share=1.0")), ranks)
        assert (changed.data.workers, changed.data.eval_crop_share) == (3, 1.0)
        assert describe_pretrained(path).digest == file.digest
        assert describe_pretrained(path).family == "vit"


def test_a_file_that_does_not_tell_its_model_is_told(tmp_path: Path) -> None:
    """Attention heads are not among the tensors of timm's format, and this width is no variant's."""
    config = make_run(tmp_path / "run")
    path, model = tmp_path / "plain.safetensors", tmp_path / "model.yaml"
    keys = ("variant", "num_classes", "embed_dim", "depth", "num_heads", "mlp_dim", "pool", "representation_layer")
    model.write_text("".join(f"{key}: {json.dumps(getattr(config.model, key))}\n" for key in keys))
    with connect(Topology(), timeout_s=60) as ranks:
        save_vit(config, ranks, 1)
        save_file(state_of(config, 1), path)
        with pytest.raises(
            ConfigError, match=r"does not tell its model for certain: .*; name it with --model MODEL.yaml"
        ):
            open_pretrained(ModelChoice(path), ranks)
        with pytest.raises(ConfigError, match="does not tell the size of its images; name it with --image-size PIXELS"):
            open_pretrained(ModelChoice(path, model=model), ranks)
        found = open_pretrained(ModelChoice(path, model=model, image_hw=(8, 8)), ranks)
        # The format implies its GELU, whatever the YAML file says.
        assert found.config == dataclasses.replace(config.model, gelu="erf", dropout=0.0, stochastic_depth=0.0)


def test_another_image_size_resizes_positions_by_the_named_mode_and_is_another_model(tmp_path: Path) -> None:
    config = make_run(tmp_path / "run")
    path = tmp_path / "weights.safetensors"
    with connect(Topology(), timeout_s=60) as ranks:
        save_vit(config, ranks, 1)
        state = export(config, path)
        expected = resize_position_embedding(state["pos_embed"], (2, 2), (4, 3), ResizeMode.BICUBIC)
        digests = set()
        for location in (config.run, path):
            with pytest.raises(
                WeightsError, match=r"pos_embed is 2x2, image size 16x12 needs 4x3: take --resize"
            ) as error:
                open_pretrained(ModelChoice(location, image_hw=(16, 12)), ranks)
            assert "no variant's" not in str(error.value), "what the model is, is known"
            for size in (None, (16, 12), (16, 16)):
                mode = ResizeMode.BICUBIC if size else None
                found = open_pretrained(ModelChoice(location, image_hw=size, resize=mode), ranks)
                digests.add(found.digest)
                assert found.data.image_hw == found.image_hw == (size or (8, 8))
                if size == (16, 12):
                    positions = found.model.state_dict()["pos_embed"]
                    assert torch.equal(positions[:, -12:], expected)
                    assert found.model(torch.zeros(1, 3, 16, 12)).shape == (1, 10)
        assert len(digests) == 6


def test_options_that_do_not_go_with_the_location(tmp_path: Path) -> None:
    config = make_run(tmp_path / "run")
    path = tmp_path / "weights.safetensors"
    with connect(Topology(), timeout_s=60) as ranks:
        save_vit(config, ranks, 1)
        export(config, path)
    cases: list[tuple[Path, dict[str, object], str]] = [
        (path, {"step": 1}, "--step is for runs"),
        (path, {"weights": Weights.EMA}, "--weights ema is for runs"),
        (path, {"overrides": ["optim.lr=1"]}, "optim.lr: says nothing of a file of weights"),
        (path, {"overrides": ["data.image_size=9"]}, "data.image_size: says nothing"),
        (path, {"overrides": ["data.worker=9"]}, "unknown key; did you mean 'workers'"),
        (config.run, {"model": path}, "is a run, which tells its model"),
    ]
    for location, options, message in cases:
        with pytest.raises(ConfigError, match=message):
            describe_pretrained(location, **options)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: not a run folder"):
        describe_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/none: not a run folder.* does not exist"):
        describe_pretrained(tmp_path / "none")
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(WeightsError, match="junk"):
        describe_pretrained(tmp_path / "junk")

"""Which files of weights a run may begin with, and what is said of those that it may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import CONFIG
from tests.unit.vitscale.weights.small_models import random_vit, save, small
from vitscale.checkpoint.folder import LocalFolder
from vitscale.checkpoint.format import step_name
from vitscale.config.loader import load_config
from vitscale.config.schema import TrainConfig
from vitscale.errors import ConfigError, VitscaleError, WeightsError
from vitscale.train.initial import check_initial
from vitscale.weights.choices import WeightFormat
from vitscale.weights.save import save_weights

CLASSES = ["a", "b", "c", "d", "e"]


def config_of(path: Path, run: Path, *more: str, **model: Any) -> TrainConfig:
    """A run for images of 8 pixels with the model of :func:`small`."""
    keys = {"variant": "ViT-mu/4", "depth": 2, "num_classes": 5, "representation_layer": False, **model}
    overrides = [f"run={run}", f"model={json.dumps(keys)}", "data.image_size=8", f"init.path={path}", *more]
    return load_config(CONFIG, overrides)


def refusal(config: TrainConfig, classes: list[str] | None = None) -> str:
    with pytest.raises(VitscaleError) as caught:
        check_initial(config, classes)
    return str(caught.value)


def saved(path: Path, format: str = "safetensors", *, classes: list[str] | None = None, **model: Any) -> Path:
    network = random_vit(small(**model))
    state = {name: values.detach() for name, values in network.state_dict().items()}
    save_weights(path, state, WeightFormat(format), network.config, network.shape.image_hw, classes=classes)
    return path


@pytest.mark.parametrize("format", ["safetensors", "npz", "big_vision", "hf"])
def test_files_of_every_format_are_taken(format: str, tmp_path: Path) -> None:
    check_initial(config_of(saved(tmp_path / "weights", format), tmp_path / "run"), CLASSES)
    check_initial(config_of(tmp_path / "weights", tmp_path / "run", "init.head=keep"), CLASSES)
    assert not (tmp_path / "run").exists()


def test_a_run_without_initial_weights_needs_nothing(tmp_path: Path) -> None:
    check_initial(load_config(CONFIG, [f"run={tmp_path}"]), CLASSES)


def test_a_run_that_has_a_checkpoint_asks_for_nothing(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path / "run" / "checkpoints")
    folder.stage(step_name(3))
    folder.publish(step_name(3), b"{}")
    config = config_of(tmp_path / "gone", tmp_path / "run")
    with pytest.raises(ConfigError, match="gone does not exist"):
        check_initial(config_of(tmp_path / "gone", tmp_path / "other"), CLASSES)
    (tmp_path / "gone").mkdir()
    check_initial(config, CLASSES)


@pytest.mark.parametrize(
    ("trained", "given", "cure"),
    [
        ({}, {"gelu": "erf"}, "model.gelu erf; set model.gelu=tanh"),
        ({"gelu": "erf", "layer_norm_eps": 1e-5}, {}, "set model.gelu=erf model.layer_norm_eps=1e-05"),
        (
            {"position_at": "every_block_shared"},
            {},
            "model.position_at input; set model.position_at=every_block_shared",
        ),
        ({}, {"position_at": "every_block_shared"}, "set model.position_at=input"),
        ({"qkv_bias": False}, {}, "set model.qkv_bias=false"),
        ({"block": "parallel"}, {}, "set model.block=parallel"),
    ],
)
def test_another_arithmetic_is_refused_although_tensors_may_fit(
    trained: dict[str, Any], given: dict[str, Any], cure: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "weights", **trained)
    assert cure in refusal(config_of(path, tmp_path / "run", **given))
    check_initial(config_of(path, tmp_path / "run", **trained), CLASSES)


def test_what_a_format_implies_counts_too(tmp_path: Path) -> None:
    """The file of another program: Hugging Face's computes GELU by the error function."""
    path = save(tmp_path / "weights", random_vit(small(gelu="erf", layer_norm_eps=1e-12)), "hf")
    assert "set model.gelu=erf model.layer_norm_eps=1e-12" in refusal(config_of(path, tmp_path / "run"))
    check_initial(config_of(path, tmp_path / "run", gelu="erf", layer_norm_eps=1e-12), None)


def test_a_kept_head_has_the_same_classes(tmp_path: Path) -> None:
    path, run = saved(tmp_path / "weights", classes=CLASSES), tmp_path / "run"
    check_initial(config_of(path, run, "init.head=keep"), CLASSES)
    check_initial(config_of(path, run, "init.head=keep"), None)
    check_initial(config_of(path, run), CLASSES[::-1])
    message = refusal(config_of(path, run, "init.head=keep"), ["a", "c", "b", "d", "e"])
    assert "label 1 of the training data is 'c', and 'b' in" in message
    assert "set init.head=new" in message
    outputs = refusal(config_of(path, run, "init.head=keep", num_classes=6))
    assert "is for 5 classes and model.num_classes is 6; set init.head=new for a new one" in outputs


def test_a_kept_head_must_be_there(tmp_path: Path) -> None:
    network = random_vit(small())
    state = {name: values for name, values in network.state_dict().items() if not name.startswith("head.")}
    path = tmp_path / "weights"
    save_weights(path, state, WeightFormat.SAFETENSORS, network.config, (8, 8))
    check_initial(config_of(path, tmp_path / "run"), CLASSES)
    assert "holds no head; set init.head=new" in refusal(config_of(path, tmp_path / "run", "init.head=keep"))


def test_the_hidden_layer_is_dropped_or_on_both_sides(tmp_path: Path) -> None:
    with_one, without = saved(tmp_path / "with", representation_layer=True), saved(tmp_path / "without")
    run = tmp_path / "run"
    check_initial(config_of(with_one, run), CLASSES)
    check_initial(config_of(with_one, run, "init.pre_logits=keep", representation_layer=True), CLASSES)
    assert "init.pre_logits: drop leaves out" in refusal(config_of(with_one, run, representation_layer=True))
    assert "but the model has none" in refusal(config_of(with_one, run, "init.pre_logits=keep"))
    needs_one = config_of(without, run, "init.pre_logits=keep", representation_layer=True)
    assert "holds no hidden layer; set model.representation_layer=false, or init.pre_logits=drop" in refusal(needs_one)


def test_a_resolution_needs_a_mode_by_its_key(tmp_path: Path) -> None:
    path, run = saved(tmp_path / "weights"), tmp_path / "run"
    with pytest.raises(WeightsError) as caught:
        check_initial(config_of(path, run, "data.image_size=[8, 16]"), CLASSES)
    assert "pos_embed is 2x2, image size 8x16 needs 2x4: take init.resize=bilinear_align_corners or bicubic or" in str(
        caught.value
    )
    check_initial(config_of(path, run, "data.image_size=[8, 16]", "init.resize=bicubic"), CLASSES)


@pytest.mark.parametrize(("key", "value"), [("step", "3"), ("weights", "ema")])
def test_a_file_has_no_steps_and_no_average(key: str, value: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "weights")
    message = refusal(config_of(path, tmp_path / "run", f"init.{key}={value}"))
    assert message.startswith(f"init.{key}: is for runs, and {path} holds weights alone; leave it out")


def test_what_is_no_file_of_weights_is_told_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("no weights")
    assert refusal(config_of(tmp_path / "notes", tmp_path / "run")).startswith(f"init.path: {tmp_path / 'notes'}: ")

"""Recipes against the papers' tables, against the configurations that come with the code, and against the schema."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import CONFIG, REPOSITORY
from vitscale.config.loader import load_config, parse_section
from vitscale.config.reference import dump_config
from vitscale.config.schema import TrainConfig
from vitscale.errors import ConfigError
from vitscale.train.recipes import Recipe, bit_hyperrule, recipe, vit_finetune
from vitscale.train.schedule import learning_rate

CONFIGS = REPOSITORY / "configs" / "finetune"
IMAGENET, CIFAR, PETS, FLOWERS = 1_281_167, 50_000, 3_680, 2_040


def configured(found: Recipe, lr: float) -> TrainConfig:
    """A configuration that a recipe alone makes."""
    keys = {
        **found.keys,
        "run": "runs/a",
        "optim.lr": lr,
        "data.train": "data/a",
        "model": {"num_classes": 5, "representation_layer": False},
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    return parse_section(TrainConfig, "{}", "the recipe", overrides)


@pytest.mark.parametrize(
    ("images", "steps", "warmup", "rates", "held_out"),
    [
        (IMAGENET, 20_000, 500, (0.003, 0.01, 0.03, 0.06), 1),
        (CIFAR, 10_000, 500, (0.001, 0.003, 0.01, 0.03), 2),
        (PETS, 500, 100, (0.001, 0.003, 0.01, 0.03), 10),
        (FLOWERS, 500, 100, (0.001, 0.003, 0.01, 0.03), 10),
    ],
)
def test_vits_are_fine_tuned_as_in_table_4(
    images: int, steps: int, warmup: int, rates: tuple[float, ...], held_out: float
) -> None:
    found = vit_finetune(images)
    assert (found.learning_rates, found.held_out_percent) == (rates, held_out)
    config = configured(found, rates[0])
    assert (config.duration.steps, config.schedule.warmup.steps, config.schedule.decay) == (steps, warmup, "cosine")
    assert (config.global_batch_size, config.optim.kind, config.optim.momentum) == (512, "sgd", 0.9)
    assert (config.optim.weight_decay, config.optim.grad_clip_norm, config.loss.mixup) == (0, 1, 0)
    assert (config.data.image_size, config.data.crop, config.data.crop_from) == (384, "square", 448)
    assert (config.data.eval_resize, config.data.flip) == ("square", True)


@pytest.mark.parametrize(
    ("images", "steps", "warmup", "mixup"),
    [
        (1, 500, 100, 0),
        (19_999, 500, 100, 0),
        (20_000, 10_000, 500, 0.1),
        (499_999, 10_000, 500, 0.1),
        (500_000, 20_000, 500, 0.1),
    ],
)
def test_the_hyperrule_knows_three_sizes(images: int, steps: int, warmup: int, mixup: float) -> None:
    found = bit_hyperrule(images, image_size=128)
    assert found.learning_rates == (0.003,)
    config = configured(found, 0.003)
    assert (config.duration.steps, config.schedule.warmup.steps, config.loss.mixup) == (steps, warmup, mixup)
    assert (config.optim.weight_decay, config.optim.grad_clip_norm) == (0, None)
    assert (config.data.image_size, config.data.crop_from, config.data.eval_resize) == (128, 160, "square")
    rates = [
        learning_rate(step * steps // 10, optim=config.optim, schedule=config.schedule, warmup=warmup, total=steps)
        for step in range(2, 10)
    ]
    assert rates == pytest.approx([3e-3] + 3 * [3e-4] + 3 * [3e-5] + [3e-6])


def test_the_hyperrule_crops_small_images_less() -> None:
    assert configured(bit_hyperrule(1, image_size=480), 1).data.crop_from == 512


@pytest.mark.parametrize("image_size", [8, 48, 128, 224, 256, 384, 480, 512, 518])
def test_every_size_has_room_to_crop(image_size: int) -> None:
    for name in ("vit", "bit_hyperrule"):
        data = configured(recipe(name, num_examples=CIFAR, image_size=image_size), 0.01).data
        assert isinstance(data.crop_from, int)
        assert 1.06 < data.crop_from / image_size < 1.26


def test_a_recipe_needs_images() -> None:
    with pytest.raises(ConfigError, match="this one has 0; name another"):
        recipe("vit", num_examples=0, image_size=384)


FILES = {
    "vit_b16_cifar10": vit_finetune(CIFAR),
    "vit_b16_cifar100": vit_finetune(CIFAR),
    "vit_b16_pets": vit_finetune(PETS),
    "vit_b16_flowers": vit_finetune(FLOWERS),
    "vit_b16_i1k_384": vit_finetune(IMAGENET),
    "bit_r50x1_cifar10": bit_hyperrule(CIFAR, image_size=128),
}


@pytest.mark.parametrize("name", FILES)
def test_the_configurations_are_the_recipes(name: str, tmp_path: Path) -> None:
    config, found = load_config(CONFIGS / f"{name}.yaml"), FILES[name]
    assert config.optim.lr in found.learning_rates
    overrides = [f"{key}={json.dumps(value)}" for key, value in found.keys.items() if key != "micro_batch_size"]
    # Through the same words, so that a key of another type would be seen.
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml", overrides) == config


def test_each_configuration_but_the_debug_one_is_compared() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*FILES, "cifar10_debug"}


def test_a_recipes_keys_are_the_schemas() -> None:
    config = load_config(CONFIG)
    for name in ("vit", "bit_hyperrule"):
        for key in recipe(name, num_examples=CIFAR, image_size=384).keys:
            value: Any = reduce(getattr, key.split("."), config)
            assert value is None or value is not ...

"""Recipes of fine-tuning: from the size of a dataset and of its images to keys of the configuration. No torch.

Sources: ViT paper (arXiv 2010.11929), table 4 and appendix B.1.1; BiT paper (arXiv 1912.11370), section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vitscale.errors import ConfigError

RecipeName = Literal["vit", "bit_hyperrule"]

# Both papers: a dataset is small below the first number of images, and large from the second on.
SMALL, LARGE = 20_000, 500_000
BATCH = 512
# What a crop of so many pixels is cut from (BiT paper, section 3.3; 512 for 480 is its largest model's).
CROP_FROM = {128: 160, 384: 448, 480: 512}


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune on one dataset."""

    keys: Mapping[str, Any]
    """Of the configuration, by dotted name, as plain data; optim.lr is not among them."""
    learning_rates: tuple[float, ...]
    """To choose from by the accuracy on a part of the training set that is held out; or the only one."""
    held_out_percent: float
    """Of the training set, for that choice. The result comes from a training on all of it."""


def recipe(name: RecipeName, *, num_examples: int, image_size: int) -> Recipe:
    """A recipe by its name.

    Args:
        name: ``vit`` or ``bit_hyperrule``.
        num_examples: images of the training set.
        image_size: pixels of a side, of what the model gets.

    Raises:
        ConfigError: there is nothing to train on.
    """
    return {"vit": vit_finetune, "bit_hyperrule": bit_hyperrule}[name](num_examples, image_size=image_size)


def vit_finetune(num_examples: int, *, image_size: int = 384) -> Recipe:
    """ViT paper, table 4: SGD with momentum 0.9, cosine, batch 512, no weight decay, gradients clipped to norm 1.

    Steps, learning rates and held-out shares are those of ImageNet (1.28 M images), of CIFAR-10 and CIFAR-100 (50,000)
    and of Pets and Flowers (some thousand), whichever is next in size by BiT's limits. VTAB's thousand images are
    trained on for 2,500 steps with learning rate 0.01: say so in overrides. Warm-ups, which the paper does not tell,
    are those of big_vision's transfer.py. Table 2 of the paper besides takes 512 or 518 pixels and averages the weights
    (optim.ema_decay 0.9999).
    """
    steps, warmup = _length(num_examples)
    rates = (0.003, 0.01, 0.03, 0.06) if num_examples >= LARGE else (0.001, 0.003, 0.01, 0.03)
    held_out = 1.0 if num_examples >= LARGE else 2.0 if num_examples >= SMALL else 10.0
    keys = {
        **_common(steps, warmup, image_size),
        "optim.grad_clip_norm": 1.0,
        "schedule.decay": "cosine",
    }
    return Recipe(keys, rates, held_out)


def bit_hyperrule(num_examples: int, *, image_size: int) -> Recipe:
    """BiT-HyperRule: SGD with momentum 0.9 and learning rate 0.003, batch 512, divided by 10 at 30, 60 and 90 %.

    Mixup of 0.1 unless the dataset is small; no weight decay, no dropout. Warm-ups, which the paper does not tell, are
    those of the released code (bit_hyperrule.py), which on small datasets divides at 40, 60 and 80 % instead.

    Args:
        num_examples: images of the training set.
        image_size: of what the model gets: 128 for datasets whose images have less area than 96 x 96 pixels, else 384,
            and 480 for the largest model, R152x4.

    Raises:
        ConfigError: there is nothing to train on.
    """
    steps, warmup = _length(num_examples)
    keys = {
        **_common(steps, warmup, image_size),
        "optim.grad_clip_norm": None,
        "schedule.decay": "steps",
        "schedule.milestones": [0.3, 0.6, 0.9],
        "schedule.factor": 10.0,
        "loss.mixup": 0.0 if num_examples < SMALL else 0.1,
    }
    return Recipe(keys, (0.003,), 10.0 if num_examples < SMALL else 2.0)


def _length(num_examples: int) -> tuple[int, int]:
    """Steps, and those of them that warm up."""
    if num_examples < 1:
        raise ConfigError(f"a recipe is for a training set with images, and this one has {num_examples}; name another")
    if num_examples < SMALL:
        return 500, 100
    return (10_000 if num_examples < LARGE else 20_000), 500


def _common(steps: int, warmup: int, image_size: int) -> dict[str, Any]:
    return {
        "duration": {"steps": steps},
        "global_batch_size": BATCH,
        # What fits into the memory; results do not depend on it.
        "micro_batch_size": 32,
        "data.image_size": image_size,
        "data.crop": "square",
        "data.crop_from": CROP_FROM.get(image_size, round(image_size * 7 / 6)),
        "data.eval_resize": "square",
        "optim.kind": "sgd",
        "optim.momentum": 0.9,
        "optim.weight_decay": 0.0,
        "schedule.warmup": {"steps": warmup},
    }

"""Which parameters are decayed, and by how much."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from vitscale.config.schema import ModelConfig, OptimConfig
from vitscale.models.vit import VisionTransformer, build_vit
from vitscale.train.optim import build_optimizer, parameter_groups

# The kernels of the JAX reference (big_vision's mask '.*/kernel$') under timm's names.
KERNEL = re.compile(
    r"patch_embed\.proj\.weight|blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.weight|pre_logits\.fc\.weight|head\.weight"
)


def model(**changes: Any) -> VisionTransformer:
    with torch.device("meta"):
        return build_vit(ModelConfig(variant="ViT-mu/4", num_classes=5, depth=2, **changes), (8, 8))


def decay_by_name(net: VisionTransformer, config: OptimConfig) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = parameter_groups(net, config)
    pairs = [(names[id(parameter)], group["weight_decay"]) for group in groups for parameter in group["params"]]
    assert len(pairs) == len(dict(pairs)) == len(names), "every parameter in exactly one group"
    return dict(pairs)


@pytest.mark.parametrize("pool", ["token", "gap"])
@pytest.mark.parametrize("representation_layer", [True, False])
@pytest.mark.parametrize("head_decay", [None, 3.0, 0.0])
def test_exactly_the_kernels_are_decayed(pool: str, representation_layer: bool, head_decay: float | None) -> None:
    net = model(pool=pool, representation_layer=representation_layer)
    decays = decay_by_name(net, OptimConfig(lr=1e-3, weight_decay=0.1, head_weight_decay=head_decay))
    for name, decay in decays.items():
        expected = 0.1 if KERNEL.fullmatch(name) else 0.0
        if name == "head.weight" and head_decay is not None:
            expected = head_decay
        assert decay == expected, name
    assert sum(decay > 0 for decay in decays.values()) == 2 * 4 + 1 + representation_layer + (head_decay != 0.0)


def test_groups_are_named_and_never_empty() -> None:
    config = OptimConfig(lr=1e-3, head_weight_decay=3.0)
    groups = parameter_groups(model(), config)
    assert [group["name"] for group in groups] == ["decay", "no_decay", "head"]
    assert all(group["params"] for group in groups)
    assert [group["name"] for group in parameter_groups(model(), OptimConfig(lr=1e-3))] == ["decay", "no_decay"]


def test_the_optimizer_takes_every_setting() -> None:
    config = OptimConfig(lr=2e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3, head_weight_decay=3.0)
    optimizer = build_optimizer(model(), config)
    assert type(optimizer) is torch.optim.AdamW
    for group, decay in zip(optimizer.param_groups, (0.3, 0.0, 3.0), strict=True):
        assert (group["lr"], group["betas"], group["eps"]) == (2e-3, (0.8, 0.95), 1e-6)
        assert group["weight_decay"] == decay

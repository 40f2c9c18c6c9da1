"""Which parameters are decayed, and by how much."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from vitscale.config.schema import ModelConfig, OptimConfig
from vitscale.models.vit import VisionTransformer, build_vit
from vitscale.train.optim import CountingSgd, build_optimizer, parameter_groups

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


def test_sgd_takes_every_setting() -> None:
    config = OptimConfig(kind="sgd", lr=2e-3, momentum=0.8, weight_decay=1e-4, head_weight_decay=0.0)
    optimizer = build_optimizer(model(), config)
    assert type(optimizer) is CountingSgd
    for group, decay in zip(optimizer.param_groups, (1e-4, 0.0, 0.0), strict=True):
        assert (group["lr"], group["momentum"], group["dampening"], group["nesterov"]) == (2e-3, 0.8, 0, False)
        assert group["weight_decay"] == decay


def test_sgd_is_torchs_and_counts() -> None:
    """By the formula: the momentum is m * momentum + gradient + decay * weight (torch's, decay before the momentum)."""
    weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    idle = torch.nn.Parameter(torch.ones(1, 1))
    optimizer = CountingSgd([{"params": [weight, idle], "weight_decay": 0.5}], lr=0.1, momentum=0.9)
    expected, momentum = weight.detach().clone(), torch.zeros(1, 2)
    for step in range(1, 4):
        weight.grad = torch.tensor([[0.3, 0.1]]) * step
        momentum = 0.9 * momentum + weight.grad + 0.5 * expected
        expected = expected - 0.1 * momentum
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected)
        assert optimizer.state[weight]["step"] == step
    assert "step" not in optimizer.state[idle]

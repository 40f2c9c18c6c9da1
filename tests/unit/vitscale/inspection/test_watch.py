from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vitscale.config.schema import ModelConfig
from vitscale.inspection.watch import (
    AttentionLayer,
    Transformer,
    attention_layers,
    patch_distances,
    tokens_of,
    watching,
    weighted_distance_and_entropy,
)
from vitscale.models.build import build_model
from vitscale.models.init import initialize
from vitscale.models.layers import SelfAttention

WIDE_HW = (16, 24)
# Every kind of token, of attention and of backbone.
KINDS: dict[str, dict[str, Any]] = {
    "class token": {},
    "class token and registers": {"registers": 3},
    "registers alone": {"registers": 2, "pool": "gap"},
    "no extra token": {"pool": "map", "position": "sincos_2d"},
    "normalised queries and keys": {"qk_norm": "rms"},
    "centred queries and keys": {"qk_norm": "layer", "qkv_bias": False},
    "parallel": {"block": "parallel"},
    "parallel without biases": {"block": "parallel", "qkv_bias": False, "qk_norm": "rms"},
    "relative": {"position": "relative"},
    "axial": {"attention_span": "axial", "pool": "gap"},
    "axial, parallel and relative": {
        "attention_span": "axial",
        "pool": "gap",
        "block": "parallel",
        "position": "relative",
    },
    "position in every block": {"position_at": "every_block"},
    "hybrid": {"variant": "R26+ViT-mu/16", "embed_dim": 32},
    "T2T": {"variant": "T2T-ViT-7", "embed_dim": 32, "num_heads": 2, "mlp_dim": 64},
    "T2T with transformers": {"variant": "T2T-ViT_t-14", "embed_dim": 32, "num_heads": 2, "mlp_dim": 64},
}


def tiny(**changes: Any) -> Transformer:
    """A small model in evaluation mode, attending to some tokens more than to others."""
    fields: dict[str, Any] = {"variant": "ViT-mu/4", "num_classes": 5, "depth": 2, **changes}
    image_hw = (64, 96) if not str(fields["variant"]).startswith("ViT") else WIDE_HW
    model = build_model(ModelConfig(**fields), image_hw)
    initialize(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 5)
    return model.eval()  # type: ignore[return-value]


def small(**changes: Any) -> Transformer:
    config = ModelConfig(variant="ViT-mu/4", num_classes=5, depth=1, **changes)
    model = build_model(config, (12, 8))
    initialize(model, 0)
    return model.eval()  # type: ignore[return-value]


def images(model: Transformer, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(count, 3, *model.shape.image_hw, generator=generator) * 2 - 1


def captured(model: Transformer, values: Tensor) -> list[tuple[AttentionLayer, Tensor]]:
    found: list[tuple[AttentionLayer, Tensor]] = []
    with torch.no_grad(), watching(attention_layers(model), lambda layer, qkv: found.append((layer, qkv))):
        model(values)
    return found


def hand_made(layer: AttentionLayer, attended: dict[int, int]) -> Tensor:
    """A projection [1, N, 3*D] under which token i attends to token ``attended[i]`` alone."""
    tokens, heads = layer.tokens.prefix + layer.tokens.patches, layer.module.num_heads
    width = layer.module.qkv.in_features // heads  # type: ignore[union-attr, operator]
    assert tokens <= width
    qkv = torch.zeros(1, tokens, 3, heads, width)
    for token in range(tokens):
        qkv[0, token, 1, :, token] = 1000
        qkv[0, token, 0, :, attended[token]] = 1000
    return qkv.flatten(2)


def test_attention_to_one_patch_has_its_distance_and_no_entropy() -> None:
    # 3 x 2 patches after the class token and one register.
    layer = attention_layers(small(registers=1))[0]
    assert layer.tokens.grid == (3, 2)
    assert (layer.tokens.prefix, layer.tokens.pitch_px) == (2, 4)
    # Patches are 2..7, row by row; 2 looks to the opposite corner, 3 straight down, 4 at itself, 5 at the class token,
    # 6 at the register, 7 to its left.
    attended = {0: 7, 1: 2, 2: 7, 3: 5, 4: 4, 5: 0, 6: 1, 7: 6}
    distance, entropy = layer.distance_and_entropy(hand_made(layer, attended))
    by_hand = [0, 0, math.sqrt(2**2 + 1**2), 1, 0, 0, 0, 1]
    for head in range(2):
        assert distance[0, head].tolist() == pytest.approx(by_hand)
    assert entropy.abs().max() < 1e-6


def test_uniform_attention_has_the_mean_distance_and_the_largest_entropy() -> None:
    layer = attention_layers(small())[0]
    qkv = torch.zeros(1, 7, 3 * 32)
    distance, entropy = layer.distance_and_entropy(qkv)
    places = [(row, column) for row in range(3) for column in range(2)]
    for patch, here in enumerate(places):
        by_hand = sum(math.dist(here, there) for there in places) / 7  # the class token counts as distance 0
        assert distance[0, :, 1 + patch].tolist() == pytest.approx([by_hand] * 2)
    assert entropy.flatten().tolist() == pytest.approx([math.log(7)] * 14)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_that_the_model_mixes_values_with(kind: str) -> None:
    model = tiny(**KINDS[kind])
    values = images(model)
    mixed: dict[int, Tensor] = {}
    layers = attention_layers(model)
    for layer in layers:
        # What goes into the projection after the attention is what the heads read.
        out = getattr(layer.module, "proj", None) or layer.module.attn_out_proj
        out.register_forward_pre_hook(lambda _, inputs, number=layer.number: mixed.update({number: inputs[0]}))
    found = captured(model, values)
    assert [layer.number for layer, _ in found] == list(range(len(layers)))
    for layer, qkv in found:
        weights = layer.weights(qkv)
        heads = layer.module.num_heads
        v = qkv.unflatten(-1, (3, heads, -1))[:, :, 2].transpose(1, 2)  # [B, H, N, K]
        expected = (weights @ v).transpose(1, 2).flatten(2)
        assert torch.allclose(expected, mixed[layer.number], atol=1e-5)
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_statistics_are_those_of_the_weights(kind: str) -> None:
    model = tiny(**KINDS[kind])
    for layer, qkv in captured(model, images(model)):
        distance, entropy = layer.distance_and_entropy(qkv)
        expected_distance, expected_entropy = weighted_distance_and_entropy(layer.weights(qkv), layer.tokens)
        assert distance.shape == (2, layer.module.num_heads, layer.tokens.prefix + layer.tokens.patches)
        assert torch.allclose(distance, expected_distance, atol=1e-4)
        assert torch.allclose(entropy, expected_entropy, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_watching_changes_no_bit_and_leaves_nothing_behind(kind: str) -> None:
    model = tiny(**KINDS[kind])
    values = images(model)
    with torch.no_grad():
        before = model(values)
        seen: list[int] = []
        with watching(attention_layers(model), lambda layer, _: seen.append(layer.number)):
            during = model(values)
        count = len(seen)
        after = model(values)
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert count == len(seen) == len(attention_layers(model))


def test_hooks_go_also_when_the_model_fails() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="images have shape"), watching(attention_layers(model), lambda *_: None):
        model(torch.zeros(1, 3, 4, 4))
    assert not any(module._forward_hooks for module in model.modules())


def test_axial_attention_is_along_its_line_only() -> None:
    model = tiny(attention_span="axial", pool="gap")
    (rows, qkv), (columns, other) = captured(model, images(model))[:2]
    assert (rows.label, columns.label) == ("1 rows", "1 columns")
    grid_h, grid_w = rows.tokens.grid
    place = torch.arange(grid_h * grid_w)
    same_row = place[:, None] // grid_w == place // grid_w
    same_column = place[:, None] % grid_w == place % grid_w
    assert not rows.weights(qkv)[..., ~same_row].any()
    assert not columns.weights(other)[..., ~same_column].any()
    assert (rows.weights(qkv)[..., same_row] > 0).all()
    assert (columns.weights(other)[..., same_column] > 0).all()


@pytest.mark.parametrize(
    ("variant", "image_hw", "grid", "prefix", "pitch"),
    [
        ("ViT-mu/4", (12, 8), (3, 2), 1, 4),
        ("R26+ViT-mu/16", (32, 64), (2, 4), 1, 16),
        ("R26+ViT-mu/32", (64, 32), (2, 1), 1, 32),
        ("R+ViT-Ti/16", (64, 96), (2, 3), 1, 32),
        ("T2T-ViT-7", (64, 96), (4, 6), 1, 16),
    ],
)
def test_tokens_lie_as_far_apart_as_all_strides_together(
    variant: str, image_hw: tuple[int, int], grid: tuple[int, int], prefix: int, pitch: int
) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(variant=variant, num_classes=2), image_hw)
    tokens = tokens_of(model.shape)  # type: ignore[arg-type]
    assert (tokens.grid, tokens.prefix, tokens.pitch_px) == (grid, prefix, pitch)
    assert tokens.patches == grid[0] * grid[1]


def test_distances_between_patches() -> None:
    found = patch_distances((2, 3))
    places = [(row, column) for row in range(2) for column in range(3)]
    assert found.tolist() == [[pytest.approx(math.dist(a, b)) for b in places] for a in places]
    assert patch_distances((1, 1)).tolist() == [[0]]
    # ViT paper, figure 11: 224 pixels in patches of 16; attention to all alike is some 117 pixels away.
    assert 16 * float(patch_distances((14, 14)).mean()) == pytest.approx(117, abs=1)


def test_every_attention_is_found_once() -> None:
    model = tiny(attention_span="axial", pool="gap", block="parallel", depth=3)
    modules = [layer.module for layer in attention_layers(model)]
    assert len(modules) == 6
    assert modules == [module for module in model.modules() if isinstance(module, SelfAttention)]

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vitscale.config.schema import ModelConfig
from vitscale.inspection.attention import AttentionWatch, ImageBatch, read_patches, reader, roll_on, with_residual
from vitscale.inspection.watch import Tokens, Transformer
from vitscale.models.build import build_model
from vitscale.models.init import initialize

IMAGE_HW = (12, 8)


def tiny(**changes: Any) -> Transformer:
    fields: dict[str, Any] = {"variant": "ViT-mu/4", "num_classes": 5, "depth": 2, **changes}
    model = build_model(ModelConfig(**fields), IMAGE_HW)
    initialize(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 5)
    return model.eval()  # type: ignore[return-value]


def batch(count: int, *, first: int = 0) -> tuple[ImageBatch, Tensor]:
    """Images of their own for every number."""
    pixels = [np.random.default_rng(n).integers(0, 256, (3, *IMAGE_HW), np.uint8) for n in range(first, first + count)]
    images = torch.from_numpy(np.stack(pixels))
    return ImageBatch([f"image {n}" for n in range(first, first + count)], images), images.float() / 127.5 - 1


def attention_of(block: torch.nn.Module, x: Tensor) -> Tensor:
    """Weights [B, H, N, N] of one sequential block, from the paper's equations."""
    normed = block.norm1(x)
    q, k, _ = block.attn.qkv(normed).chunk(3, dim=-1)
    heads = block.attn.num_heads
    split = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k)]
    scores = split[0] @ split[1].transpose(-1, -2) / math.sqrt(split[0].shape[-1])
    return scores.softmax(-1)


def block_inputs(model: Transformer, values: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    handles = [block.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0])) for block in model.blocks]
    with torch.no_grad():
        model(values)
    for handle in handles:
        handle.remove()
    return found


def test_mean_distance_and_rollout_are_those_of_loops_over_every_pair() -> None:
    model = tiny(registers=1)
    images, values = batch(3)
    watch = AttentionWatch(model, overlays=3, images=3)
    watch.add(images, values)
    found, maps = watch.distance(), watch.rollout()

    places = [(row, column) for row in range(3) for column in range(2)]
    with torch.no_grad():
        weights = [attention_of(b, x) for b, x in zip(model.blocks, block_inputs(model, values), strict=True)]
    for layer, of_layer in enumerate(weights):
        for head in range(2):
            total = 0.0
            for image in range(3):
                for here, a in enumerate(places):
                    for there, b in enumerate(places):
                        total += float(of_layer[image, head, 2 + here, 2 + there]) * 4 * math.dist(a, b)
            assert found.distance_px[layer, head] == pytest.approx(total / (3 * 6), rel=1e-4)
    entropy = [torch.special.entr(w).sum(-1)[:, :, 2:].mean((0, 2)).tolist() for w in weights]
    assert found.entropy_nats.tolist() == [pytest.approx(row, rel=1e-4) for row in entropy]
    assert (found.layers, found.images) == (("1", "2"), 3)

    for image in range(3):
        total_mix = np.eye(8)
        for of_layer in weights:
            total_mix = (0.5 * of_layer[image].mean(0).double().numpy() + 0.5 * np.eye(8)) @ total_mix
        assert maps.maps[image] == pytest.approx(total_mix[0, 2:].reshape(3, 2), rel=1e-4)
    assert maps.names == ("image 0", "image 1", "image 2")
    assert (maps.pixels == images.images.permute(0, 2, 3, 1).numpy()).all()


def test_uniform_distance_counts_the_class_token_as_near() -> None:
    model = tiny()
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight)
        torch.nn.init.zeros_(block.attn.qkv.bias)
    watch = AttentionWatch(model, overlays=0, images=2)
    watch.add(*batch(2))
    found = watch.distance()
    assert found.uniform_px is not None
    assert found.distance_px.flatten().tolist() == pytest.approx([found.uniform_px] * 4)
    places = [(row, column) for row in range(3) for column in range(2)]
    assert found.uniform_px == pytest.approx(4 * sum(math.dist(a, b) for a in places for b in places) / 6 / 7)


def test_axial_attention_has_no_uniform_distance() -> None:
    watch = AttentionWatch(tiny(attention_span="axial", pool="gap"), overlays=0, images=1)
    watch.add(*batch(1))
    found = watch.distance()
    assert found.uniform_px is None
    assert found.layers == ("1 rows", "1 columns", "2 rows", "2 columns")
    assert found.distance_px[0].max() <= 4  # two patches of four pixels side by side


def test_batches_do_not_matter() -> None:
    model = tiny()
    together = AttentionWatch(model, overlays=4, images=7)
    together.add(*batch(7))
    apart = AttentionWatch(model, overlays=4, images=7)
    for first, count in ((0, 3), (3, 1), (4, 3)):
        apart.add(*batch(count, first=first))
    assert apart.distance().distance_px == pytest.approx(together.distance().distance_px, rel=1e-6)
    assert apart.rollout().names == together.rollout().names
    assert apart.rollout().maps == pytest.approx(together.rollout().maps, rel=1e-5)


@pytest.mark.parametrize(
    ("images", "overlays", "chosen"), [(7, 3, [0, 3, 5]), (8, 4, [0, 2, 4, 6]), (3, 8, [0, 1, 2]), (5, 1, [0])]
)
def test_overlays_are_spread_over_the_images(images: int, overlays: int, chosen: list[int]) -> None:
    watch = AttentionWatch(tiny(), overlays=overlays, images=images)
    for first in range(0, images, 2):
        watch.add(*batch(min(2, images - first), first=first))
    assert watch.rollout().names == tuple(f"image {n}" for n in chosen)


def test_unreadable_images_leave_their_overlay_to_the_next() -> None:
    watch = AttentionWatch(tiny(), overlays=2, images=10)
    watch.add(*batch(6))  # four more were expected
    assert watch.rollout().names == ("image 0", "image 5")


@pytest.mark.parametrize("kind", ["class token", "mean over patches", "attention pooling"])
def test_what_the_head_reads(kind: str) -> None:
    pool = {"class token": "token", "mean over patches": "gap", "attention pooling": "map"}[kind]
    model = tiny(pool=pool, num_heads=1, registers=1)
    assert reader(model) == kind
    images, values = batch(2)
    watch = AttentionWatch(model, overlays=2, images=2)
    watch.add(images, values)
    inputs = block_inputs(model, values)
    with torch.no_grad():
        total = torch.eye(model.shape.num_tokens).expand(2, -1, -1)
        for block, x in zip(model.blocks, inputs, strict=True):
            total = (attention_of(block, x).mean(1) + torch.eye(model.shape.num_tokens)) / 2 @ total
        if pool == "token":
            expected = total[:, 0, 2:]
        elif pool == "gap":
            expected = total[:, 1:, 1:].mean(1)
        else:
            # With one head the pooled values are the weights times the values, of which D may be solved for P.
            patches = model.forward_features(values)[:, 1:]
            keys, held = model.attn_pool.kv(patches).chunk(2, dim=-1)
            read = (model.attn_pool.q(model.attn_pool.latent) @ keys.transpose(1, 2) / math.sqrt(32)).softmax(-1)
            assert held.shape == keys.shape
            expected = (read @ total[:, 1:, 1:])[:, 0]
    assert watch.rollout().maps == pytest.approx(expected.reshape(2, 3, 2).numpy(), rel=1e-4)
    assert watch.rollout().read_by == kind


def test_a_head_that_reads_all_patches_counts_as_reading_their_mean() -> None:
    model = tiny(num_classes=512, head="masked_patches")
    assert reader(model) == "mean over patches"
    watch = AttentionWatch(model, overlays=1, images=1)
    watch.add(*batch(1))
    assert watch.rollout().maps.shape == (1, 3, 2)


def test_rollout_by_hand() -> None:
    # Two heads: the first token attends to the second, or to itself; the mean is half of each.
    first = torch.tensor([[[[0.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]]])
    mixing = with_residual(first)
    assert mixing.tolist() == [[[0.75, 0.25], [0.0, 1.0]]]
    second = torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]])
    total = roll_on(roll_on(None, first), second)
    assert total.tolist() == [[[0.375, 0.625], [0.375, 0.625]]]


def test_attention_to_oneself_leaves_every_token_where_it_is() -> None:
    weights = torch.eye(5).expand(2, 3, 5, 5)
    total = None
    for _ in range(4):
        total = roll_on(total, weights)
    assert total is not None
    assert torch.equal(total, torch.eye(5).expand(2, 5, 5))


def test_shares_of_a_rollout_are_all_there() -> None:
    generator = torch.Generator().manual_seed(3)
    total = None
    for _ in range(6):
        total = roll_on(total, torch.rand(2, 3, 7, 7, generator=generator, dtype=torch.float64).softmax(-1))
    assert total is not None
    assert torch.allclose(total.sum(-1), torch.ones((), dtype=torch.float64))
    assert (total >= 0).all()


def test_patches_are_read_row_by_row() -> None:
    tokens = Tokens(grid=(2, 3), prefix=1, pitch_px=1)
    total = torch.arange(49.0).reshape(1, 7, 7)
    reading = torch.zeros(1, 7)
    reading[0, 0] = 1
    assert read_patches(total, reading, tokens).tolist() == [[[1, 2, 3], [4, 5, 6]]]
    assert read_patches(total, torch.full((1, 7), 1 / 7), tokens).flatten()[0] == pytest.approx(22)

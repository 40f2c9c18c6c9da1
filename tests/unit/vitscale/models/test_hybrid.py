from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.resnet_paper import hybrid_features
from vitscale.errors import ConfigError
from vitscale.models.hybrid import HybridEmbed
from vitscale.models.hybrid_shapes import VARIANTS, StemShape, parse_hybrid

BACKBONE = "patch_embed.backbone."
# Width, depth, and its own MLP of four times the width.
TRANSFORMERS = {"Ti": (192, 12), "S": (384, 12), "B": (768, 12), "L": (1024, 24)}


def parsed(variant: str) -> tuple[StemShape, str, int]:
    found = parse_hybrid(variant)
    assert found is not None
    return found


# Shapes


@pytest.mark.parametrize(
    ("variant", "blocks", "stride", "channels", "size", "side"),
    [
        ("R50+ViT-B/16", (3, 4, 9), 16, 1024, "B", 1),
        ("R50+ViT-L/16", (3, 4, 9), 16, 1024, "L", 1),
        ("R50+ViT-B/32", (3, 4, 6, 3), 32, 2048, "B", 1),
        ("R50+ViT-L/32", (3, 4, 6, 3), 32, 2048, "L", 1),
        ("R26+ViT-S/32", (2, 2, 2, 2), 32, 2048, "S", 1),
        ("R26+ViT-B/32", (2, 2, 2, 2), 32, 2048, "B", 1),
        ("R26+ViT-S/16", (2, 2, 4), 16, 1024, "S", 1),
        ("R101+ViT-g-opt/16", (3, 4, 26), 16, 1024, "g-opt", 1),
        # The reference's own count: 8x8 patches of a feature map of stride 4.
        ("R+ViT-Ti/16", (), 4, 64, "Ti", 8),
        ("R+ViT-S/8", (), 4, 64, "S", 4),
    ],
)
def test_names_tell_the_stem(
    variant: str, blocks: tuple[int, ...], stride: int, channels: int, size: str, side: int
) -> None:
    stem, named, patch = parsed(variant)
    assert (stem.blocks, stem.stride, stem.channels, named, patch) == (blocks, stride, channels, size, side)
    assert stem.patch_side == side
    assert stem.name == variant.split("+")[0]


@pytest.mark.parametrize("variant", ["ViT-B/16", "BiT-R50x1", "T2T-ViT-14", "R50"])
def test_other_families_are_left_alone(variant: str) -> None:
    assert parse_hybrid(variant) is None


@pytest.mark.parametrize(
    ("variant", "allowed"),
    [
        ("R34+ViT-B/16", "R26, R50, R101, R152, R200 are allowed, with a STRIDE of 16 or 32"),
        ("R50+ViT-B/8", "STRIDE of 16 or 32"),
        ("R+ViT-Ti/7", "an even STRIDE"),
        ("R50+B/16", r"R<depth>+ViT-SIZE/STRIDE is allowed"),
        ("R50+ViT-B_16", r"R<depth>+ViT-SIZE/STRIDE is allowed"),
    ],
)
def test_unknown_hybrids_are_refused_with_what_is_allowed(variant: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_hybrid(variant)
    assert repr(variant) in str(caught.value)
    assert allowed in str(caught.value)
    assert ", ".join(VARIANTS) in str(caught.value)


# Parameters in millions of timm's models, its table of results: class token, position embedding of the image's size,
# no representation layer, a head of 1000 classes.
@pytest.mark.parametrize(
    ("variant", "pixels", "expected"),
    [
        ("R50+ViT-B/16", 384, 98.95),
        ("R50+ViT-L/32", 224, 328.99),
        ("R50+ViT-L/32", 384, 329.09),
        ("R26+ViT-S/32", 224, 36.43),
        ("R26+ViT-S/32", 384, 36.47),
        ("R+ViT-Ti/16", 224, 6.34),
        ("R+ViT-Ti/16", 384, 6.36),
    ],
)
def test_parameters_are_the_public_models(variant: str, pixels: int, expected: float) -> None:
    stem, size, patch = parsed(variant)
    width, depth = TRANSFORMERS[size]
    tokens = (pixels // (stem.stride * patch)) ** 2 + 1
    block = 12 * width**2 + 13 * width
    transformer = depth * block + 2 * width + (tokens + 1) * width
    projection = (stem.channels * patch**2 + 1) * width
    assert round((stem.num_parameters + projection + transformer + 1000 * (width + 1)) / 1e6, 2) == expected


# Pre-training on JFT-300M, ViT paper, table 6.
@pytest.mark.parametrize(
    ("variant", "epochs", "exaflops"),
    [
        ("R50+ViT-B/32", 7, 106),
        ("R50+ViT-B/16", 7, 274),
        ("R50+ViT-L/32", 7, 246),
        ("R50+ViT-L/16", 7, 859),
        ("R50+ViT-L/16", 14, 1668),
    ],
)
def test_training_costs_what_the_paper_says(variant: str, epochs: int, exaflops: float) -> None:
    stem, size, _ = parsed(variant)
    width, depth = TRANSFORMERS[size]
    tokens = (224 // stem.stride) ** 2 + 1
    products = tokens * stem.channels * width + depth * (12 * tokens * width**2 + 2 * tokens**2 * width)
    flops = stem.forward_flops((224, 224)) + 2 * products
    assert 3 * flops * epochs * 303e6 == pytest.approx(exaflops * 1e18, rel=0.05)


@pytest.mark.parametrize("variant", VARIANTS)
def test_numbers_are_the_built_modules(variant: str) -> None:
    stem, _, patch = parsed(variant)
    side = stem.stride * patch
    with torch.device("meta"):
        module = HybridEmbed(48, stem, (2, 3))
        images = torch.zeros(1, 3, 2 * side, 3 * side)
    assert sum(p.numel() for p in module.backbone.parameters()) == stem.num_parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features = module.backbone(images)
    assert counter.get_total_flops() == stem.forward_flops((2 * side, 3 * side))
    assert features.shape == (1, stem.channels, 2 * patch, 3 * patch)
    with torch.no_grad():
        assert module(images).shape == (1, 6, 48)


# Arithmetic

STEMS = [
    StemShape(name="tiny", blocks=(1, 2), patch_side=1, width=32),
    StemShape(name="tiny", blocks=(1,), patch_side=2, width=32),
    StemShape(name="R", blocks=(), patch_side=2, width=32),
]


def tiny_module(stem: StemShape, *, activation_checkpointing: bool = False) -> HybridEmbed:
    """In fp64, with every parameter away from where it starts, so that none can be left out unnoticed."""
    module = HybridEmbed(6, stem, (2, 3), activation_checkpointing=activation_checkpointing).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4 + 0.1)
    return module


def random_images(module: HybridEmbed) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, *module.image_shape, generator=generator, dtype=torch.float64) * 2 - 1


def paper_tokens(state: dict[str, Tensor], images: Tensor, stem: StemShape) -> Tensor:
    inner = {name.removeprefix("backbone."): value for name, value in state.items()}
    features = hybrid_features(inner, images, stem.blocks)
    side = stem.patch_side
    patches = features.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return patches @ state["proj.weight"].flatten(1).T + state["proj.bias"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stem", STEMS, ids=lambda stem: f"{stem.blocks}")
def test_tokens_and_gradients_are_the_references(stem: StemShape, checkpointing: bool) -> None:
    module = tiny_module(stem, activation_checkpointing=checkpointing)
    images = random_images(module)
    state = {name: value.detach().clone().requires_grad_() for name, value in module.named_parameters()}
    expected, tokens = paper_tokens(state, images, stem), module(images)
    torch.testing.assert_close(tokens, expected)
    expected.square().sum().backward()
    tokens.square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, state[name].grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("image_hw", [(37, 64), (33, 47), (5, 3)])
def test_the_resnet_pads_images_of_any_size_as_tensorflow_does(image_hw: tuple[int, int]) -> None:
    module = tiny_module(STEMS[0])
    images = torch.randn(1, 3, *image_hw, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        features = module.backbone(images)
        torch.testing.assert_close(features, hybrid_features(module.backbone.state_dict(), images, (1, 2)))
    assert features.shape == (1, 256, math.ceil(image_hw[0] / 8), math.ceil(image_hw[1] / 8))


def test_names_are_timms() -> None:
    with torch.device("meta"):
        names = set(HybridEmbed(8, parsed("R50+ViT-B/16")[0], (1, 1)).state_dict())
        alone = set(HybridEmbed(8, parsed("R+ViT-Ti/16")[0], (1, 1)).state_dict())
    norm, projection = ("norm.weight", "norm.bias"), {"proj.weight", "proj.bias"}
    expected = {"backbone.stem.conv.weight", *(f"backbone.stem.{leaf}" for leaf in norm)} | projection
    for stage, count in enumerate((3, 4, 9)):
        for block in range(count):
            prefix = f"backbone.stages.{stage}.blocks.{block}"
            expected |= {f"{prefix}.conv{i}.weight" for i in (1, 2, 3)}
            expected |= {f"{prefix}.norm{i}.{leaf}" for i in (1, 2, 3) for leaf in ("weight", "bias")}
            if block == 0:
                expected |= {f"{prefix}.downsample.{leaf}" for leaf in ("conv.weight", *norm)}
    assert names == expected
    assert alone == {"backbone.conv.weight", *(f"backbone.{leaf}" for leaf in norm)} | projection


# Initial values


@pytest.mark.parametrize("stem", STEMS, ids=lambda stem: f"{stem.blocks}")
def test_initial_values_are_the_references(stem: StemShape) -> None:
    with torch.device("meta"):
        state = HybridEmbed(8, stem, (1, 1)).state_dict()
    kernels = 0
    for name, parameter in state.items():
        if name.startswith("proj."):
            continue
        value = HybridEmbed.initial_value(f"patch_embed.{name}", parameter.shape, seed=3)
        assert (value.shape, value.dtype) == (parameter.shape, torch.float32)
        if parameter.ndim == 4:
            kernels += 1
            deviation = math.sqrt(1 / parameter[0].numel())
            assert value.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * value.numel())), name
            assert torch.equal(value, HybridEmbed.initial_value(f"patch_embed.{name}", parameter.shape, seed=3))
            assert not torch.equal(value, HybridEmbed.initial_value(f"patch_embed.{name}", parameter.shape, seed=4))
        else:
            ones = name.endswith("weight") and "norm3" not in name
            assert value.unique().tolist() == [float(ones)], name
    assert kernels == 1 + sum(3 * count + 1 for count in stem.blocks)


@pytest.mark.parametrize(
    "name", ["patch_embed.proj.weight", "backbone.conv.weight", f"{BACKBONE}stem.conv.bias", f"{BACKBONE}x.weight"]
)
def test_other_names_have_no_initial_value(name: str) -> None:
    with pytest.raises(ValueError, match="no rule"):
        HybridEmbed.initial_value(name, torch.Size([2, 2, 1, 1]), seed=0)


def test_blocks_without_projection_start_as_a_relu() -> None:
    module = HybridEmbed(8, STEMS[0], (2, 3))
    backbone = {n: v for n, v in module.state_dict().items() if n.startswith("backbone.")}
    initial = {n: HybridEmbed.initial_value(f"patch_embed.{n}", v.shape, seed=0) for n, v in backbone.items()}
    module.load_state_dict(initial, strict=False)
    x = torch.randn(1, 256, 4, 5)
    block = module.get_submodule("backbone.stages.1.blocks.1")
    assert torch.equal(block(x), x.relu())


# Precision, compilation, bad input


def test_bf16_is_close_to_fp32() -> None:
    module = tiny_module(STEMS[0]).float()
    images = random_images(module).float()
    with torch.no_grad():
        expected = module(images)
    module.to(torch.bfloat16)
    tokens = module(images)
    assert tokens.dtype == torch.bfloat16
    assert (tokens.float() - expected).abs().mean() < 0.03 * expected.abs().mean()
    tokens.float().square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.parameters())


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_compiles_as_one_graph(checkpointing: bool) -> None:
    module = tiny_module(STEMS[0], activation_checkpointing=checkpointing)
    images = random_images(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), module(images))
    compiled(images).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("shape", [(1, 3, 24, 16), (3, 16, 24), (1, 1, 16, 24)])
def test_other_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[batch, 3, 16, 24\] is needed"):
        tiny_module(STEMS[0])(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("R50+B/16", "R50+ViT-B/16"),
        ("R+Ti/16", "R+ViT-Ti/16"),
        ("r50+vit-b/16", "R50+ViT-B/16"),
        ("r+TI/16", "R+ViT-Ti/16"),
        ("R26+VIT-S/32", "R26+ViT-S/32"),
    ],
)
def test_what_was_nearly_a_hybrid_is_mended(written: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_hybrid(written)
    assert str(caught.value).endswith(f"; did you mean {meant!r}?")
    assert parse_hybrid(meant) is not None


@pytest.mark.parametrize("written", ["R34+B/16", "R50+ViT-B/8", "R+ViT-Ti/7", "R50+ViT-B_16"])
def test_nothing_is_suggested_that_there_is_not(written: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_hybrid(written)
    assert "did you mean" not in str(caught.value)

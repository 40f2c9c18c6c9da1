from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import t2t_paper
from vitscale.config.schema import ModelConfig
from vitscale.models.t2t import T2tVit, sinusoid
from vitscale.models.t2t_shapes import VARIANTS, resolve

WIDE_HW = (32, 16)
BOTH = pytest.mark.parametrize("variant", ["T2T-ViT-7", "T2T-ViT_t-14"])


def build(variant: str = "T2T-ViT-7", image_hw: tuple[int, int] = WIDE_HW, **changes: Any) -> T2tVit:
    small = {"num_classes": 5, "depth": 3, "embed_dim": 24, "num_heads": 3, "mlp_dim": 40}
    config = ModelConfig(**{"variant": variant, **small, **changes})
    return T2tVit(config, resolve(config, image_hw))


def set_initial_values(model: T2tVit, seed: int = 0) -> T2tVit:
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(model.initial_value(name, value.shape, seed=seed))
    return model


def randomized(model: T2tVit) -> T2tVit:
    """In fp64, every number away from zero, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(0)
    model.double()
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64) / 5)
    return model


def random_images(batch: int = 2, image_hw: tuple[int, int] = WIDE_HW) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *image_hw, generator=generator, dtype=torch.float64)


@BOTH
@pytest.mark.parametrize("backend", ["triton", "sdpa", "reference"])
def test_forward_is_the_papers(variant: str, backend: str) -> None:
    model = randomized(build(variant, attention=backend)).eval()
    images, state = random_images(), model.state_dict()
    tokens = t2t_paper.features(state, images, heads=3)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), tokens)
        torch.testing.assert_close(model.representation(images), tokens[:, 0])
        torch.testing.assert_close(model(images), tokens[:, 0] @ state["head.weight"].T + state["head.bias"])


@BOTH
def test_training_drops_where_the_release_does(variant: str) -> None:
    model = randomized(build(variant, dropout=0.2, stochastic_depth=0.4)).train()
    images = random_images(6)

    def drop_images(rate: float, x: Tensor) -> Tensor:
        return x * F.dropout(torch.ones(len(x), 1, 1, dtype=x.dtype), rate) if rate else x

    torch.manual_seed(11)
    found = model.forward_features(images)
    torch.manual_seed(11)
    expected = t2t_paper.features(
        model.state_dict(),
        images,
        heads=3,
        token_drop=lambda x: F.dropout(x, 0.1),
        drop=lambda x: F.dropout(x, 0.2),
        drop_branches=tuple(lambda x, rate=rate: drop_images(rate, x) for rate in (0.0, 0.2, 0.4)),
    )
    torch.testing.assert_close(found, expected)


def release_shapes(variant: str, positions: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the release's state dict, written down from its description."""
    shape = resolve(ModelConfig(variant=variant, num_classes=1000), (224, 224))
    d, m = shape.embed_dim, shape.mlp_dim
    expected: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, d), "pos_embed": (1, positions, d)}

    def add(prefix: str, **layers: tuple[int, ...]) -> None:
        for name, dims in layers.items():
            expected[f"{prefix}{name.replace('__', '.')}.weight"] = dims
            if name not in ("qkv", "attn__qkv"):
                expected[f"{prefix}{name.replace('__', '.')}.bias"] = dims[:1]

    for index, inputs in (("1", 147), ("2", 576)):
        prefix = f"tokens_to_token.attention{index}."
        add(prefix, norm1=(inputs,), norm2=(64,))
        if "_t-" in variant:
            add(prefix, attn__qkv=(192, inputs), attn__proj=(64, 64), mlp__fc1=(64, 64), mlp__fc2=(64, 64))
        else:
            add(prefix, kqv=(192, inputs), proj=(64, 64), mlp__0=(64, 64), mlp__2=(64, 64))
            expected[f"{prefix}w"] = (32, 64)
    add("tokens_to_token.", project=(d, 576))
    for block in range(shape.depth):
        add(f"blocks.{block}.", norm1=(d,), attn__qkv=(3 * d, d), attn__proj=(d, d))
        add(f"blocks.{block}.", norm2=(d,), mlp__fc1=(m, d), mlp__fc2=(d, m))
    add("", norm=(d,), head=(1000, d))
    return expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_has_the_releases_names(variant: str) -> None:
    config = ModelConfig(variant=variant, num_classes=1000)
    with torch.device("meta"):
        model = T2tVit(config, resolve(config, (224, 224)))
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == release_shapes(variant, 197)
    fixed = {name for name, _ in model.named_buffers()}
    performers = {f"tokens_to_token.attention{index}.w" for index in (1, 2)}
    assert fixed == {"pos_embed"} | (set() if "_t-" in variant else performers)


@BOTH
@pytest.mark.parametrize("image_hw", [(16, 16), (16, 48), (64, 32)])
def test_other_sizes_follow(variant: str, image_hw: tuple[int, int]) -> None:
    model = set_initial_values(build(variant, image_hw, depth=1)).eval()
    positions = image_hw[0] * image_hw[1] // 256 + 1
    assert torch.equal(model.pos_embed, sinusoid(positions, 24))
    assert model.forward_features(random_images(1, image_hw).float()).shape == (1, positions, 24)


@BOTH
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_all_that_is_learned(variant: str, checkpointing: bool, dtype: torch.dtype) -> None:
    model = set_initial_values(build(variant, activation_checkpointing=checkpointing)).to(dtype)
    logits = model(random_images(4).float())
    assert logits.dtype == dtype
    F.cross_entropy(logits.float(), torch.tensor([0, 1, 2, 3])).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


@BOTH
def test_checkpointing_changes_nothing(variant: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build(variant, activation_checkpointing=checkpointing, dropout=0.1, stochastic_depth=0.3)
        set_initial_values(model)
        calls: list[int] = []
        model.blocks[1].norm1.register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
        torch.manual_seed(3)
        model(random_images(4).float()).square().sum().backward()
        assert len(calls) == (2 if checkpointing else 1)
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


@BOTH
def test_bf16_is_close_to_fp32(variant: str) -> None:
    model = set_initial_values(build(variant)).eval()
    images = random_images(8).float()
    with torch.no_grad():
        exact = model(images)
        rounded = model.bfloat16()(images)
    assert (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()


@BOTH
@pytest.mark.parametrize("checkpointing", [pytest.param(True, marks=pytest.mark.slow), False])
def test_compiles_into_one_graph(variant: str, checkpointing: bool) -> None:
    torch.compiler.reset()
    model = set_initial_values(build(variant, depth=1, activation_checkpointing=checkpointing)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # compiled code draws other numbers
    images = random_images().float()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = []
    for run in (model, compiled):
        model.zero_grad()
        loss = run(images).square().sum()
        loss.backward()
        losses.append((loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-4)
    for one, two in zip(losses[0][1], losses[1][1], strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-6)


# Initial values.


@pytest.fixture(scope="module", params=["T2T-ViT-10", "T2T-ViT_t-14"])
def initial(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    """State of an initialised model that was built without memory and then held nothing but NaN."""
    with torch.device("meta"):
        config = ModelConfig(variant=request.param, num_classes=10, depth=2, head_bias=-6.9)
        model = T2tVit(config, resolve(config, (64, 64)))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(math.nan)
    return set_initial_values(model).state_dict()


def test_everything_is_set(initial: dict[str, Tensor]) -> None:
    assert [name for name, value in initial.items() if not value.isfinite().all()] == []


def test_kernels_are_normal(initial: dict[str, Tensor]) -> None:
    kernels = [n for n, v in initial.items() if n.endswith("weight") and v.ndim == 2] + ["cls_token"]
    assert "head.weight" in kernels
    for name in kernels:
        count = initial[name].numel()
        assert initial[name].std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * count)), name
        assert abs(initial[name].mean().item()) < 5 * 0.02 / math.sqrt(count), name
    assert initial["blocks.0.attn.qkv.weight"].abs().max() > 4 * 0.02  # no truncation at two


def test_constants(initial: dict[str, Tensor]) -> None:
    for name, value in initial.items():
        if name == "head.bias":
            assert value.tolist() == pytest.approx([-6.9] * 10)
        elif name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name


def test_positions_are_sines_and_cosines(initial: dict[str, Tensor]) -> None:
    table = initial["pos_embed"]
    positions, width = table.shape[1:]
    assert positions == 17
    for p, j in itertools.product(range(positions), range(width)):
        angle = p / 10000 ** ((j - j % 2) / width)
        assert table[0, p, j].item() == pytest.approx(math.cos(angle) if j % 2 else math.sin(angle), abs=1e-7)


DRAWING = build()


def directions(seed: int, name: str = "tokens_to_token.attention1.w") -> Tensor:
    return DRAWING.initial_value(name, torch.Size((32, 64)), seed=seed)


def test_feature_directions_are_orthogonal() -> None:
    first, second = directions(0), directions(0, "tokens_to_token.attention2.w")
    for w in (first, second):
        torch.testing.assert_close(w @ w.T, 32 * torch.eye(32), rtol=0, atol=1e-4)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, directions(1))


def test_feature_directions_point_everywhere_alike() -> None:
    """Uniform on the sphere of radius sqrt(32) in 64 dimensions, so that the kernel has a known expectation.

    The mean of exp(w.z) there is the series of (32 |z|^2 / 4)^j / (j! 32 (33) ... (32 + j - 1)).
    """
    drawn = torch.cat([directions(seed) for seed in range(300)]).double()
    generator = torch.Generator().manual_seed(2)
    for length in (1.0, 2.0):
        z = torch.randn(64, generator=generator, dtype=torch.float64)
        z *= length / z.norm()
        term = expected = 1.0
        for j in range(1, 40):
            term *= 32 * length**2 / 4 / (j * (32 + j - 1))
            expected += term
        values = (drawn @ z).exp()
        assert values.mean().item() == pytest.approx(expected, abs=5 * values.std().item() / math.sqrt(len(values)))
    assert (drawn.mean(dim=0).abs() < 5 / math.sqrt(2 * len(drawn))).all()


def test_values_depend_on_seed_name_and_shape_only() -> None:
    name, shape = "blocks.1.mlp.fc1.weight", torch.Size((40, 24))
    before = torch.get_rng_state()
    one = DRAWING.initial_value(name, shape, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, build(depth=2, head_bias=-1.0).initial_value(name, shape, seed=3))
    assert not torch.equal(one, DRAWING.initial_value(name, shape, seed=4))
    assert not torch.equal(one, DRAWING.initial_value("blocks.0.mlp.fc1.weight", shape, seed=3))
    assert one.dtype == torch.float32


def test_values_are_pinned() -> None:
    """A run that is repeated years later starts from the same weights."""
    pinned = {
        "tokens_to_token.attention1.w": ((32, 64), [-0.793536484, 1.351595163, -0.253926307]),
        "tokens_to_token.project.weight": ((24, 576), [0.055685997, -0.019274810, -0.032055173]),
        "head.weight": ((5, 24), [-0.019069752, 0.001077667, 0.018684395]),
    }
    for name, (shape, values) in pinned.items():
        drawn = DRAWING.initial_value(name, torch.Size(shape), seed=0)[0, :3]
        torch.testing.assert_close(drawn, torch.tensor(values), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["blocks.0.gamma", "w", "blocks.0.w", "pos_embed.weight", "tokens_to_token.weight"])
def test_a_name_without_a_rule_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' has no rule"):
        DRAWING.initial_value(name, torch.Size((4, 4)), seed=0)

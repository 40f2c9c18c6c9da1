from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vitscale.config.schema import ModelConfig
from vitscale.errors import ConfigError
from vitscale.models.init import initialize
from vitscale.models.layers import DropPath, Mlp
from vitscale.models.vit import VisionTransformer, build_vit, stochastic_depth_rates

WIDE_HW = (8, 12)  # 2 x 3 patches of 4


def tiny_config(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {"variant": "ViT-mu/4", "num_classes": 5, "depth": 3, "num_heads": 4, **changes}
    return ModelConfig(**fields)


def tiny_model(seed: int = 0, **changes: Any) -> VisionTransformer:
    """A small fp64 model with every parameter away from zero, so that none can be left out unnoticed."""
    model = build_vit(tiny_config(**changes), WIDE_HW).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4)
    return model


def random_images(batch: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, *WIDE_HW, generator=generator, dtype=torch.float64) * 2 - 1


# The model once more, from the ViT paper's equations over a state dict, sharing no line with the package.


def keep(x: Tensor, *_: Any) -> Tensor:
    return x


def normed(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * scale + shift


def gelu(x: Tensor, kind: str) -> Tensor:
    if kind == "erf":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def heads_of(x: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Self-attention of [B, N, D], head by head; ``weight`` holds rows of queries, of keys, of values."""
    width = x.shape[-1]
    part = width // heads
    out = []
    for head in range(heads):
        q, k, v = (
            x @ weight[start : start + part].T + bias[start : start + part]
            for start in (kind * width + head * part for kind in range(3))
        )
        scores = torch.einsum("bnk,bmk->bnm", q, k) / math.sqrt(part)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        out.append(torch.einsum("bnm,bmk->bnk", weights / weights.sum(-1, keepdim=True), v))
    return torch.cat(out, dim=-1)


def paper_features(
    state: dict[str, Tensor],
    images: Tensor,
    config: ModelConfig,
    drop: Callable[[Tensor], Tensor] = keep,
    drop_branch: Callable[[Tensor, int], Tensor] = keep,
) -> Tensor:
    kernel = state["patch_embed.proj.weight"]
    side, heads = kernel.shape[-1], config.num_heads or 2
    rows, columns = images.shape[2] // side, images.shape[3] // side
    patches = [
        images[:, :, r * side : (r + 1) * side, c * side : (c + 1) * side].flatten(1)
        for r, c in itertools.product(range(rows), range(columns))
    ]
    x = torch.stack(patches, dim=1) @ kernel.flatten(1).T + state["patch_embed.proj.bias"]
    if config.pool == "token":
        x = torch.cat([state["cls_token"].repeat(len(x), 1, 1), x], dim=1)
    x = drop(x + state["pos_embed"])
    for index in range(config.depth or 1):
        block = {n.removeprefix(f"blocks.{index}."): v for n, v in state.items() if n.startswith(f"blocks.{index}.")}
        y = normed(x, block["norm1.weight"], block["norm1.bias"], config.layer_norm_eps)
        y = heads_of(y, block["attn.qkv.weight"], block["attn.qkv.bias"], heads)
        y = drop(y @ block["attn.proj.weight"].T + block["attn.proj.bias"])
        x = x + drop_branch(y, index)
        y = normed(x, block["norm2.weight"], block["norm2.bias"], config.layer_norm_eps)
        y = drop(gelu(y @ block["mlp.fc1.weight"].T + block["mlp.fc1.bias"], config.gelu))
        y = drop(y @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"])
        x = x + drop_branch(y, index)
    return normed(x, state["norm.weight"], state["norm.bias"], config.layer_norm_eps)


def paper_representation(state: dict[str, Tensor], tokens: Tensor, config: ModelConfig) -> Tensor:
    pooled = tokens[:, 0] if config.pool == "token" else tokens.sum(1) / tokens.shape[1]
    if not config.representation_layer:
        return pooled
    return torch.tanh(pooled @ state["pre_logits.fc.weight"].T + state["pre_logits.fc.bias"])


@pytest.mark.parametrize("pool", ["token", "gap"])
@pytest.mark.parametrize("representation_layer", [True, False])
@pytest.mark.parametrize("kind", ["tanh", "erf"])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_forward_is_the_papers(pool: str, representation_layer: bool, kind: str, backend: str) -> None:
    model = tiny_model(
        pool=pool,
        representation_layer=representation_layer,
        gelu=kind,
        attention=backend,
        layer_norm_eps=1e-3,
    )
    images, state = random_images(3), model.state_dict()
    tokens = paper_features(state, images, model.config)
    representation = paper_representation(state, tokens, model.config)
    logits = representation @ state["head.weight"].T + state["head.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), tokens)
        torch.testing.assert_close(model.representation(images), representation)
        torch.testing.assert_close(model(images), logits)
    assert tokens.shape == (3, model.shape.num_tokens, 32)


def test_gradients_are_the_papers() -> None:
    model = tiny_model()
    images = random_images(2)
    state = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    hidden = paper_representation(state, paper_features(state, images, model.config), model.config)
    (hidden @ state["head.weight"].T + state["head.bias"]).square().sum().backward()
    model(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, msg=lambda text, name=name: f"{name}: {text}")


def test_gelu_kinds_and_norm_eps_are_told_apart() -> None:
    images = random_images(2)
    outputs = [
        tiny_model(gelu="tanh")(images),
        tiny_model(gelu="erf")(images),
        tiny_model(layer_norm_eps=1e-2)(images),
    ]
    for one, other in itertools.combinations(outputs, 2):
        assert not torch.allclose(one, other, rtol=1e-7)


def test_dropout_and_stochastic_depth_act_where_the_paper_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout replaced by a factor of 1 + rate shows each place that it acts in, and with which rate."""

    def scaled(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        assert not inplace
        return x * (1 + p) if training else x

    monkeypatch.setattr(torch.nn.functional, "dropout", scaled)
    model = tiny_model(dropout=0.25, stochastic_depth=0.4).train()
    images, state = random_images(2), model.state_dict()
    tokens = paper_features(
        state,
        images,
        model.config,
        drop=lambda x: x * 1.25,
        drop_branch=lambda y, index: y * (1 + [0, 0.2, 0.4][index]),
    )
    expected = paper_representation(state, tokens, model.config) @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(model(images), expected)
    torch.testing.assert_close(model.eval()(images), tiny_model().eval()(images))


def test_schedule_of_stochastic_depth() -> None:
    assert stochastic_depth_rates(0.1, 5) == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])
    assert stochastic_depth_rates(0.1, 1) == [0]
    assert stochastic_depth_rates(0.0, 3) == [0, 0, 0]
    model = tiny_model(stochastic_depth=0.3)
    assert [m.rate for m in model.modules() if isinstance(m, DropPath)] == pytest.approx([0, 0.15, 0.3])


def test_dropped_branches_are_whole_images_and_keep_the_mean() -> None:
    torch.manual_seed(0)
    branch = torch.rand(20_000, 2, 3) + 1
    out = DropPath(0.3).train()(branch)
    ratio = out / branch
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio))
    kept = ratio[:, 0, 0] > 0
    torch.testing.assert_close(ratio[kept, 0, 0], torch.full((int(kept.sum()),), 1 / 0.7))
    assert kept.double().mean().item() == pytest.approx(0.7, abs=5 * math.sqrt(0.21 / 20_000))
    assert DropPath(0.3).eval()(branch) is branch
    assert DropPath(1.0).train()(branch).count_nonzero() == 0


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    mlp = Mlp(4, 8, gelu="tanh", dropout=0.2).double().train()
    x = torch.rand(1, 1, 4, dtype=torch.float64)
    mean = mlp(x.expand(200_000, 1, 4)).mean(0)
    torch.testing.assert_close(mean, mlp.eval()(x)[0], atol=5e-3, rtol=0)


@pytest.mark.parametrize("rates", [{}, {"dropout": 0.2, "stochastic_depth": 0.5}])
def test_activation_checkpointing_gives_the_same_bits(rates: dict[str, float]) -> None:
    images = random_images(4)
    runs = []
    for checkpointed in (False, True):
        model = tiny_model(activation_checkpointing=checkpointed, **rates).train()
        torch.manual_seed(3)
        logits = model(images)
        logits.square().sum().backward()
        runs.append([logits, *(p.grad for p in model.parameters()), torch.rand(1)])
    for plain, recomputed in zip(*runs, strict=True):
        assert plain is not None
        assert torch.equal(plain, recomputed)


def test_activation_checkpointing_recomputes_each_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    model = tiny_model(activation_checkpointing=True)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append("block"))
    with torch.no_grad():
        model(random_images(1))
    assert len(calls) == 3
    model(random_images(1)).sum().backward()
    assert len(calls) == 3 + 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp32_images_enter_a_model_of_any_precision(dtype: torch.dtype) -> None:
    exact = tiny_model()
    model = tiny_model().to(dtype)
    images = random_images(2).float()
    logits = model(images)
    assert logits.dtype == dtype
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(logits.double(), exact(images), rtol=tolerance, atol=tolerance)


def test_images_of_a_batch_do_not_mix() -> None:
    model = tiny_model()
    images = random_images(4)
    torch.testing.assert_close(model(images)[2:3], model(images[2:3]))
    assert model(images[:0]).shape == (0, 5)


def test_untrained_model_predicts_the_head_bias() -> None:
    model = build_vit(tiny_config(head_bias=-6.9), WIDE_HW)
    initialize(model, seed=0)
    torch.testing.assert_close(model(random_images(2).float()), torch.full((2, 5), -6.9))


@pytest.mark.parametrize("shape", [(1, 3, 12, 8), (1, 1, 8, 12), (3, 8, 12)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images have shape \[.*\]; \[batch, 3, 8, 12\] is needed"):
        tiny_model()(torch.zeros(shape))


def test_build_reports_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'ViT-B/16'\?"):
        build_vit(tiny_config(variant="ViT-Base/16"), WIDE_HW)
    with pytest.raises(ConfigError, match=r"not divisible by model\.num_heads 5"):
        build_vit(tiny_config(num_heads=5), WIDE_HW)


# Options that other papers add. The blocks themselves are tested beside them.

OPTIONS: list[dict[str, Any]] = [
    {"pool": "map", "registers": 2},
    {"registers": 3, "position_at": "every_block"},
    {"position": "learned_2d", "pool": "gap"},
    {"position": "learned_2d", "position_at": "every_block"},
    {"position": "sincos_2d", "position_at": "every_block_shared", "registers": 1},
    {"position": "sincos_2d", "position_at": "every_block", "pool": "map"},
    {"position": "factorized", "position_at": "every_block_shared"},
    {"position_at": "every_block_shared", "pool": "gap", "registers": 1},
    {"position": "relative"},
    {"position": "none", "pool": "gap"},
    {"block": "parallel", "qk_norm": "rms", "qkv_bias": False, "pool": "map"},
    {"attention_span": "axial", "pool": "gap", "position": "relative"},
    {"attention_span": "axial", "pool": "map", "position": "factorized", "qk_norm": "layer"},
]


def vectors(model: VisionTransformer, prefix: str) -> Tensor:
    """What is added to class token, registers and patches, [1, N, D], from the tables called ``prefix``."""
    shape, state = model.shape, model.state_dict()
    (rows, columns), width = shape.grid, shape.embed_dim
    out = torch.zeros(1, shape.num_tokens, width, dtype=torch.float64)
    for row, column in itertools.product(range(rows), range(columns)):
        token = shape.num_prefix + row * columns + column
        match model.config.position:
            case "learned":
                table = state[prefix] if prefix == "pos_embed" else state[f"{prefix}.table"]
                out[0, token] = table[0, token - shape.registers]
                out[0, : int(shape.class_token)] = table[0, : int(shape.class_token)]
            case "learned_2d":
                out[0, token] = torch.cat([state[f"{prefix}.columns"][column], state[f"{prefix}.rows"][row]])
            case "factorized":
                out[0, token] = state[f"{prefix}.rows"][row] + state[f"{prefix}.columns"][column]
            case "sincos_2d":
                speeds = 10_000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4 - 1))
                x, y = column * speeds, row * speeds
                out[0, token] = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()])
    return out


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_and_positions_are_put_together_as_the_papers_say(options: dict[str, Any]) -> None:
    model = tiny_model(representation_layer=False, **options)
    images, state, config = random_images(2), model.state_dict(), model.config
    patches = torch.nn.functional.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], 4)
    x = patches.flatten(2).transpose(1, 2)
    for name in ("reg_token", "cls_token"):
        if name in state:
            x = torch.cat([state[name].repeat(2, 1, 1), x], dim=1)
    for index, block in enumerate(model.blocks):
        if config.position_at == "every_block":
            x = x + vectors(model, f"block_pos_embed.{index}")
        elif config.position_at == "every_block_shared" or index == 0:
            x = x + vectors(model, "pos_embed")
        x = block(x)
    x = normed(x, state["norm.weight"], state["norm.bias"], config.layer_norm_eps)
    torch.testing.assert_close(model.forward_features(images), x)
    assert x.shape[1] == model.shape.num_tokens
    seen = x[:, model.shape.num_prefix :]
    match config.pool:
        case "token":
            pooled = x[:, 0]
        case "gap":
            pooled = seen.mean(1)
        case "map":
            assert model.attn_pool is not None
            pooled = model.attn_pool(seen)
    torch.testing.assert_close(model(images), pooled @ state["head.weight"].T + state["head.bias"])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_reach_whatever_is_learned(options: dict[str, Any]) -> None:
    model = tiny_model(**options)
    (model(random_images(2)) ** 2).sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # The class token has no offset to a patch, and after the last block the head reads nothing else.
    last = ["blocks.2.attn.relative_pos_embed.table"] if options == {"position": "relative"} else []
    assert idle == last


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_take_checkpointing_bfloat16_and_no_images(options: dict[str, Any]) -> None:
    rates = {"dropout": 0.2, "stochastic_depth": 0.5}
    images = random_images(4)
    plain, recomputed = (tiny_model(activation_checkpointing=c, **rates, **options).train() for c in (False, True))
    gradients = []
    for model in (plain, recomputed):
        torch.manual_seed(3)
        model(images).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))  # type: ignore[arg-type]
    exact = plain.eval()(images).detach()
    rough = plain.bfloat16()(images.float())
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.double(), exact, rtol=0.1, atol=0.15)
    assert plain(images[:0].float()).shape == (0, 5)


@pytest.mark.parametrize(
    "options", [*OPTIONS[:2], *(pytest.param(options, marks=pytest.mark.slow) for options in OPTIONS[2:])], ids=str
)
def test_options_compile_to_one_graph(options: dict[str, Any]) -> None:
    torch.compiler.reset()
    model = tiny_model(depth=2, **options).float()
    images = random_images(2).float()
    expected = model(images)
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_positions_tell_patches_apart() -> None:
    """Without them, a mean over patches does not see their order."""
    images = random_images(1)
    swapped = images.roll(4, dims=2)
    blind = tiny_model(position="none", pool="gap")
    torch.testing.assert_close(blind(images), blind(swapped))
    for position in ("learned", "learned_2d", "sincos_2d", "factorized", "relative"):
        model = tiny_model(position=position, pool="gap")
        assert not torch.allclose(model(images), model(swapped), rtol=1e-4)


def test_hybrid_cuts_the_feature_map_into_patches() -> None:
    config = ModelConfig(variant="R+ViT-mu/8", num_classes=5, pool="gap", head_bias=0.5)
    model = build_vit(config, (32, 48))
    assert (model.shape.grid, model.shape.num_tokens, model.shape.image_hw) == ((2, 3), 6, (32, 48))
    initialize(model, seed=0)
    images = torch.rand(2, 3, 32, 48)
    torch.testing.assert_close(model(images), torch.full((2, 5), 0.5))
    (model.representation(images) ** 2).sum().backward()
    for name, parameter in model.patch_embed.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.any(), name
    with pytest.raises(ValueError, match=r"\[batch, 3, 32, 48\] is needed"):
        model(images.mT)

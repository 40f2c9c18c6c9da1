from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.distributed.nn.functional
from torch import Tensor

from tests.helpers.distributed import run_ranks
from vitscale.config.schema import ModelConfig
from vitscale.models.batch_norm import synchronize
from vitscale.models.efficientnet import EfficientNet, drop_images, stochastic_depth_rates
from vitscale.models.efficientnet_shapes import resolve
from vitscale.topology import Topology

# Kernel side and stride of the blocks of EfficientNet-nano, stage by stage.
NANO = [[(3, 1)], [(3, 2)], [(5, 2)], [(3, 2), (3, 1)], [(5, 1), (5, 1)], [(5, 2), (5, 1)], [(3, 1)]]


def tiny_config(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {"variant": "EfficientNet-nano", "num_classes": 5, **changes}
    return ModelConfig(**fields)


def built(config: ModelConfig) -> EfficientNet:
    return EfficientNet(config, resolve(config, (32, 32)))


def initialised(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> EfficientNet:
    """A model that held nothing but the values of its own rules."""
    with torch.device("meta"):
        model = built(tiny_config(**changes))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(model.initial_value(name, value.shape, seed=seed))
    return model.to(dtype)


def tiny_model(dtype: torch.dtype = torch.float64, **changes: Any) -> EfficientNet:
    """Every parameter and statistic away from its initial value, so that none can be left out unnoticed."""
    model = initialised(torch.float64, **changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.ndim == 1:
                noise = torch.rand(value.shape, generator=generator, dtype=torch.float64) / 2
                value.add_(noise)
    return model.to(dtype)


def random_images(batch: int, hw: tuple[int, int] = (32, 32), seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *hw, generator=generator, dtype=torch.float64)


# The model once more, from the papers over a state dict, sharing no line with the package.


def keep(x: Tensor, *_: Any) -> Tensor:
    return x


def swish(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def convolved(x: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """TensorFlow's "SAME" convolution, offset by offset, on a canvas of zeros; depthwise where the kernel is."""
    side = kernel.shape[-1]
    outs = [math.ceil(n / stride) for n in x.shape[2:]]
    sizes = [max((out - 1) * stride + side, n) for out, n in zip(outs, x.shape[2:], strict=True)]
    top, left = ((size - n) // 2 for size, n in zip(sizes, x.shape[2:], strict=True))
    canvas = x.new_zeros(*x.shape[:2], *sizes)
    canvas[:, :, top : top + x.shape[2], left : left + x.shape[3]] = x
    total: Tensor | int = 0
    for down, across in itertools.product(range(side), repeat=2):
        seen = canvas[:, :, down::stride, across::stride][:, :, : outs[0], : outs[1]]
        taps = kernel[:, :, down, across]
        depthwise = taps.shape[1] == 1 and x.shape[1] > 1
        total = total + (seen * taps[:, 0, None, None] if depthwise else torch.einsum("bihw,oi->bohw", seen, taps))
    assert isinstance(total, Tensor)
    return total


def normalised(x: Tensor, state: dict[str, Tensor], name: str, training: bool) -> Tensor:
    rows = x.transpose(0, 1).flatten(1)
    mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    if training:
        mean = rows.sum(1) / rows.shape[1]
        variance = (rows - mean[:, None]).pow(2).sum(1) / rows.shape[1]
    rows = (rows - mean[:, None]) / (variance + 0.001).sqrt()[:, None]
    rows = rows * state[f"{name}.weight"][:, None] + state[f"{name}.bias"][:, None]
    return rows.view(x.shape[1], len(x), *x.shape[2:]).transpose(0, 1)


def excited(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    def dense(y: Tensor, layer: str) -> Tensor:
        return y @ state[f"{name}.{layer}.weight"][:, :, 0, 0].T + state[f"{name}.{layer}.bias"]

    scale = dense(swish(dense(x.flatten(2).sum(2) / x[0, 0].numel(), "conv_reduce")), "conv_expand")
    return x / (1 + torch.exp(-scale))[:, :, None, None]


def papers_features(
    state: dict[str, Tensor],
    images: Tensor,
    training: bool,
    drop_branch: Callable[[Tensor, int], Tensor] = keep,
) -> Tensor:
    x = swish(normalised(convolved(images, state["conv_stem.weight"], 2), state, "bn1", training))
    places = [(f"blocks.{i}.{j}", *block) for i, stage in enumerate(NANO) for j, block in enumerate(stage)]
    for index, (name, side, stride) in enumerate(places):
        y, depthwise_norm, project, project_norm = x, "bn1", "conv_pw", "bn2"
        if not name.startswith("blocks.0"):
            y = swish(normalised(convolved(y, state[f"{name}.conv_pw.weight"]), state, f"{name}.bn1", training))
            depthwise_norm, project, project_norm = "bn2", "conv_pwl", "bn3"
        kernel = state[f"{name}.conv_dw.weight"]
        assert kernel.shape[-1] == side
        y = swish(normalised(convolved(y, kernel, stride), state, f"{name}.{depthwise_norm}", training))
        y = convolved(excited(y, state, f"{name}.se"), state[f"{name}.{project}.weight"])
        y = normalised(y, state, f"{name}.{project_norm}", training)
        x = x + drop_branch(y, index) if y.shape == x.shape and stride == 1 else y
    x = swish(normalised(convolved(x, state["conv_head.weight"]), state, "bn2", training))
    return x.flatten(2).sum(2) / x[0, 0].numel()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("hw", [(32, 32), (33, 18), (1, 7), (47, 64)])
def test_forward_is_the_papers(training: bool, hw: tuple[int, int]) -> None:
    model = tiny_model().train(training)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    images = random_images(3, hw)
    with torch.no_grad():
        features = papers_features(state, images, training)
        torch.testing.assert_close(model.representation(images), features)
        torch.testing.assert_close(model(images), features @ state["head.weight"].T + state["head.bias"])
    assert features.shape == (3, model.shape.feature_dim)


def test_gradients_are_the_papers() -> None:
    model = tiny_model().train()
    images = random_images(4)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    learned = {name: state[name].requires_grad_() for name, _ in model.named_parameters()}
    features = papers_features(state, images, True)
    (features @ state["head.weight"].T + state["head.bias"]).square().sum().backward()
    model(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, learned[name].grad, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


def shifts_what_is_normalised_next(name: str) -> bool:
    """Biases behind a projection, which the next norm takes off again while training."""
    return name.endswith(("bn3.bias", "blocks.0.0.bn2.bias"))


@pytest.mark.parametrize("training", [True, False])
def test_gradients_reach_every_parameter(training: bool) -> None:
    model = tiny_model().train(training)
    model(random_images(4)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        largest = parameter.grad.abs().max()
        assert largest < 1e-9 if training and shifts_what_is_normalised_next(name) else largest > 1e-6, name


def test_dropout_and_stochastic_depth_act_where_the_reference_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout replaced by a factor of 1 + rate shows each place that it acts in, and with which rate."""

    def scaled(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        assert not inplace
        return x * (1 + p) if training else x

    monkeypatch.setattr(torch.nn.functional, "dropout", scaled)
    model = tiny_model(dropout=0.25, stochastic_depth=0.4).train()
    images = random_images(2)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    features = papers_features(state, images, True, drop_branch=lambda y, index: y * (1 + 0.4 * index / 10))
    torch.testing.assert_close(model.representation(images), features)
    torch.testing.assert_close(model(images), 1.25 * features @ state["head.weight"].T + state["head.bias"])
    # Noise is only for training.
    features = papers_features(model.state_dict(), images, False)
    torch.testing.assert_close(model.eval()(images), features @ state["head.weight"].T + state["head.bias"])


def test_schedule_of_stochastic_depth() -> None:
    assert stochastic_depth_rates(0.2, 4) == pytest.approx([0, 0.05, 0.1, 0.15])
    assert stochastic_depth_rates(0.0, 3) == [0, 0, 0]


def test_dropped_branches_are_whole_images_and_keep_the_mean() -> None:
    torch.manual_seed(0)
    branch = torch.rand(20_000, 2, 1, 3) + 1
    ratio = drop_images(branch, 0.3, training=True) / branch
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1].expand_as(ratio))
    kept = ratio[:, 0, 0, 0] > 0
    torch.testing.assert_close(ratio[kept, 0, 0, 0], torch.full((int(kept.sum()),), 1 / 0.7))
    assert kept.double().mean().item() == pytest.approx(0.7, abs=5 * math.sqrt(0.21 / 20_000))
    assert drop_images(branch, 0.3, training=False) is branch
    assert drop_images(branch, 0.0, training=True) is branch


# Initial values.


def test_kernels_are_normal_with_the_references_fan_out() -> None:
    model = built(ModelConfig(variant="EfficientNet-B0", num_classes=400))
    fan_outs = {
        "conv_stem": 9 * 32,
        "blocks.0.0.conv_dw": 9,
        "blocks.5.1.conv_dw": 25,
        "blocks.5.1.conv_pw": 1152,
        "blocks.5.1.conv_pwl": 192,
        "blocks.5.1.se.conv_reduce": 48,
        "blocks.5.1.se.conv_expand": 1152,
        "conv_head": 1280,
    }
    for name, fan_out in fan_outs.items():
        shape = model.state_dict()[f"{name}.weight"].shape
        values = model.initial_value(f"{name}.weight", shape, seed=0)
        std = math.sqrt(2 / fan_out)
        assert values.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * values.numel())), name
        assert abs(values.mean().item()) < 5 * std / math.sqrt(values.numel())
        assert values.abs().max().item() > 2.2 * std  # not truncated
    head = model.initial_value("head.weight", torch.Size((400, 1280)), seed=0)
    assert 0.0499 < head.abs().max().item() <= 0.05
    assert head.std().item() == pytest.approx(0.05 / math.sqrt(3), rel=0.01)


def test_constants() -> None:
    model = initialised(head_bias=-6.9)
    for name, value in model.state_dict().items():
        if name == "head.bias":
            assert value.tolist() == pytest.approx([-6.9] * 5)
        elif name.endswith(("running_var", "bn1.weight", "bn2.weight", "bn3.weight")):
            assert value.unique().tolist() == [1], name
        elif value.ndim <= 1:
            assert value.unique().tolist() == [0], name
        else:
            assert len(value.unique()) > 1, name


def test_untrained_features_keep_their_size() -> None:
    """The initial norms see activations of the order of one at every depth."""
    model = initialised(torch.float64).train()
    features = model.representation(random_images(16))
    assert 0.1 < features.std().item() < 2


def test_values_are_a_function_of_seed_name_and_shape() -> None:
    one, two, other = initialised(), initialised(num_classes=7), initialised(seed=1)
    before = torch.get_rng_state()
    for name, value in one.state_dict().items():
        assert name.startswith("head") or torch.equal(value, two.state_dict()[name])
        assert torch.equal(value, other.state_dict()[name]) == (value.ndim <= 1)
    assert not torch.equal(one.state_dict()["blocks.3.1.conv_pw.weight"], one.state_dict()["blocks.3.0.conv_pw.weight"])
    assert torch.equal(before, torch.get_rng_state())


def test_values_are_pinned() -> None:
    """A run that is repeated years later starts from the same weights."""
    model = initialised()
    pinned = [[0.1403742135, -0.1484062076, -0.1133578420], [0.2279782742, -0.1725901365, 0.0563663654]]
    drawn = torch.stack([model.state_dict()[n].flatten()[:3] for n in ("conv_stem.weight", "head.weight")])
    torch.testing.assert_close(drawn, torch.tensor(pinned), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["cls_token", "bn1.gamma", "conv_stem.bias", "head.scale", "blocks.0.0.bn4.weight"])
def test_a_name_without_a_rule_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=rf"parameter '{name}' has no rule"):
        tiny_model().initial_value(name, torch.Size((4,)), seed=0)


# Ways to run it.


def outcome(model: EfficientNet, call: Callable[[Tensor], Tensor], images: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(3)
    logits = call(images)
    logits.double().sin().sum().backward()
    found = {"logits": logits.detach(), "random": torch.rand(1), **dict(model.named_buffers())}
    return found | {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("rates", [{}, {"dropout": 0.2, "stochastic_depth": 0.5}])
def test_activation_checkpointing_gives_the_same_bits(rates: dict[str, float]) -> None:
    images = random_images(4)
    plain, recomputed = (
        outcome(model, model, images)
        for model in (tiny_model(**rates).train(), tiny_model(activation_checkpointing=True, **rates).train())
    )
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(value, recomputed[name]) for name, value in plain.items())
    assert recomputed["blocks.3.1.bn2.num_batches_tracked"] == 1


def test_activation_checkpointing_recomputes_each_block_once() -> None:
    calls: list[str] = []
    model = tiny_model(activation_checkpointing=True).train()
    for name, module in model.named_modules():
        if name.count(".") == 2 and name.startswith("blocks"):
            module.register_forward_pre_hook(lambda *_: calls.append("block"))
    with torch.no_grad():
        model(random_images(2))
    assert len(calls) == 10
    model(random_images(2)).sum().backward()
    assert len(calls) == 10 + 20


def short_model(**changes: Any) -> EfficientNet:
    """Three blocks, one of each kind, since compiling takes time for each."""
    config = tiny_config(**changes)
    shape = resolve(config, (32, 32))
    model = EfficientNet(config, dataclasses.replace(shape, stages=(shape.stages[0], shape.stages[3])))
    model.load_state_dict({n: model.initial_value(n, v.shape, seed=0) for n, v in model.state_dict().items()})
    return model.double().train()


@pytest.mark.parametrize("checkpointed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiles_as_one_graph(checkpointed: bool) -> None:
    images = random_images(4)
    expected = outcome(plain := short_model(), plain, images)
    model = short_model(activation_checkpointing=checkpointed)
    torch.compiler.reset()
    found = outcome(model, torch.compile(model, fullgraph=True, backend="aot_eager"), images)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")
    assert found["bn2.num_batches_tracked"] == found["blocks.1.1.bn3.num_batches_tracked"] == 1


@pytest.mark.parametrize("training", [True, False])
def test_bf16_is_near_fp32(training: bool) -> None:
    images = random_images(16)
    exact, model = tiny_model().train(training), tiny_model(torch.bfloat16).train(training)
    logits = model(images.float())
    assert logits.dtype == torch.bfloat16
    spread = exact(images).std().item()
    assert (logits.double() - exact(images)).abs().mean().item() < 0.1 * spread
    logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert {b.dtype for n, b in model.named_buffers() if "running" in n} == {torch.float32}


def test_images_of_a_batch_do_not_mix_in_evaluation() -> None:
    model = tiny_model().eval()
    images = random_images(4)
    torch.testing.assert_close(model(images)[2:3], model(images[2:3]))
    assert model(images[:0]).shape == (0, 5)


@pytest.mark.parametrize("shape", [(1, 32, 32, 3), (1, 1, 32, 32), (3, 32, 32)])
def test_images_of_another_layout_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images have shape \[.*\]; \[batch, 3, H, W\] is needed"):
        tiny_model()(torch.zeros(shape))


def half_on_rank(topology: Topology, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{topology.master_port}",
        rank=topology.rank,
        world_size=topology.world_size,
    )
    model = tiny_model(activation_checkpointing=True).train()
    synchronize(model, torch.distributed.nn.functional.all_reduce)
    images = random_images(8).chunk(2)[topology.rank]
    torch.save(outcome(model, model, images), folder / f"{topology.rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_with_half_a_batch_each_are_one_with_the_whole(tmp_path: Path) -> None:
    run_ranks(half_on_rank, 2, tmp_path)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    expected = outcome(model := tiny_model().train(), model, random_images(8))
    torch.testing.assert_close(torch.cat((one["logits"], two["logits"])), expected["logits"], rtol=1e-9, atol=1e-9)
    for name, _ in model.named_parameters():
        torch.testing.assert_close(one[name] + two[name], expected[name], rtol=1e-7, atol=1e-9)
    for name, _ in model.named_buffers():
        assert torch.equal(one[name], two[name])
        torch.testing.assert_close(one[name], expected[name], rtol=1e-9, atol=1e-12)

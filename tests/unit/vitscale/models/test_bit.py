from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.resnet_paper import bit_representation
from vitscale.config.schema import ModelConfig
from vitscale.models.bit import Bit
from vitscale.models.bit_shapes import BitShape, resolve

# Odd and even sides on the way down: 22 -> 11 -> 6 -> 3 and 33 -> 17 -> 9 -> 5.
IMAGE_HW = (22, 33)


def tiny_shape(**changes: Any) -> BitShape:
    fields: dict[str, Any] = {
        "variant": "BiT-R26x1",
        "width": 64,
        "blocks": (1, 2),
        "num_classes": 5,
        "image_hw": IMAGE_HW,
        **changes,
    }
    return BitShape(**fields)


def tiny_model(**changes: Any) -> Bit:
    """A small fp64 model with every parameter away from where it starts, so that none can be left out unnoticed."""
    model = Bit(ModelConfig(variant="BiT-R26x1", num_classes=5, **changes), tiny_shape()).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4 + 0.1)
    return model


def random_images(batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, *IMAGE_HW, generator=generator, dtype=torch.float64) * 2 - 1


def paper_logits(state: dict[str, Tensor], images: Tensor) -> Tensor:
    return bit_representation(state, images, (1, 2)) @ state["head.weight"].T + state["head.bias"]


def test_forward_is_the_papers() -> None:
    model, images = tiny_model(), random_images()
    state = model.state_dict()
    with torch.no_grad():
        torch.testing.assert_close(model.representation(images), bit_representation(state, images, (1, 2)))
        torch.testing.assert_close(model(images), paper_logits(state, images))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_papers_and_reach_everything(checkpointing: bool) -> None:
    model, images = tiny_model(activation_checkpointing=checkpointing), random_images()
    state = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    paper_logits(state, images).square().sum().backward()
    model(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, state[name].grad, msg=lambda text, name=name: f"{name}: {text}")


def test_names_are_timms_but_for_the_head() -> None:
    config = ModelConfig(variant="BiT-R50x1", num_classes=5)
    with torch.device("meta"):
        names = set(Bit(config, resolve(config, (64, 64))).state_dict())
    expected = {"stem.conv.weight", "norm.weight", "norm.bias", "head.weight", "head.bias"}
    for stage, count in enumerate((3, 4, 6, 3)):
        for block in range(count):
            prefix = f"stages.{stage}.blocks.{block}"
            expected |= {f"{prefix}.conv{i}.weight" for i in (1, 2, 3)}
            expected |= {f"{prefix}.norm{i}.{leaf}" for i in (1, 2, 3) for leaf in ("weight", "bias")}
            expected |= {f"{prefix}.downsample.conv.weight"} if block == 0 else set()
    assert names == expected


def materialised(seed: int = 0, head_bias: float = 0.0) -> Bit:
    """Built on the meta device and filled with its initial values."""
    config = ModelConfig(variant="BiT-R26x1", num_classes=5, head_bias=head_bias)
    with torch.device("meta"):
        model = Bit(config, tiny_shape())
    model.to_empty(device="cpu")
    model.load_state_dict({n: model.initial_value(n, v.shape, seed=seed) for n, v in model.state_dict().items()})
    return model


def test_initial_values_are_the_references() -> None:
    state = materialised(head_bias=-10.0).state_dict()
    assert all(value.dtype == torch.float32 for value in state.values())
    for name, value in state.items():
        match name.split(".")[-2:]:
            case ["head", "weight"]:
                assert not value.any()
            case ["head", "bias"]:
                assert value.tolist() == [-10.0] * 5
            case [module, "weight"] if module.startswith("conv"):
                deviation = math.sqrt(1 / value[0].numel())
                assert value.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * value.numel())), name
            case [_, leaf]:
                assert value.unique().tolist() == [1.0 if leaf == "weight" else 0.0], name
    again, other = materialised(head_bias=-10.0).state_dict(), materialised(seed=1).state_dict()
    kernels = [name for name, value in state.items() if value.ndim == 4]
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert len(kernels) == 12
    assert not any(torch.equal(state[name], other[name]) for name in kernels)


@pytest.mark.parametrize("name", ["head.fc.weight", "stem.conv.bias", "stages.0.blocks.0.conv4.weight", "x"])
def test_other_names_have_no_initial_value(name: str) -> None:
    with pytest.raises(ValueError, match="no rule"):
        tiny_model().initial_value(name, torch.Size([2, 2, 1, 1]), seed=0)


def test_it_starts_at_the_heads_bias_with_features_of_a_norm() -> None:
    model, images = materialised(head_bias=-10.0), random_images().float()
    assert model(images).unique().tolist() == [-10.0]
    # The mean of a rectified standard normal is 0.4; the last norm sees to it whatever the blocks did.
    assert model.representation(images).mean().item() == pytest.approx(1 / math.sqrt(2 * math.pi), abs=0.1)


def test_bf16_is_close_to_fp32() -> None:
    model, images = tiny_model().float(), random_images().float()
    with torch.no_grad():
        expected = model.representation(images)
        model.to(torch.bfloat16)
        result = model.representation(images)
    assert result.dtype == torch.bfloat16
    assert (result.float() - expected).abs().mean() < 0.03 * expected.abs().mean()
    model(images).float().square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_compiles_as_one_graph(checkpointing: bool) -> None:
    model, images = tiny_model(activation_checkpointing=checkpointing), random_images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images))
    compiled(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_projection_reads_what_was_activated() -> None:
    """With conv3 silenced, a projected block gives no more than its projection of relu(norm1(x)): never of x itself."""
    block = tiny_model().stages[0].get_submodule("blocks.0")
    conv3 = block.get_submodule("conv3")
    assert isinstance(conv3, nn.Conv2d)
    x = random_images().new_full((1, 64, 3, 3), 0.5) + torch.arange(9.0, dtype=torch.float64).view(3, 3)
    with torch.no_grad():
        conv3.weight.zero_()
        torch.testing.assert_close(block(x), block(3 * x - 7), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 3, 33, 22), (3, *IMAGE_HW), (1, 4, *IMAGE_HW)])
def test_other_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[batch, 3, 22, 33\] is needed"):
        tiny_model()(torch.zeros(shape, dtype=torch.float64))

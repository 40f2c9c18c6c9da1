"""The operators in torch's machinery: schema, gradients, compilation, checkpointing, counting."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.runs import environment
from vitscale.kernels import ops, reference
from vitscale.kernels.attention import attention, attention_statistics, attention_varlen, sequence_starts
from vitscale.kernels.qk_norm import QkNorm

STARTS = [0, 4, 4, 5, 12]
NORMS = pytest.mark.parametrize("centered", [None, False, True], ids=["no norm", "rms", "centered"])
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["fixed", "packed"])


def inputs(centered: bool | None, packed: bool, dtype: torch.dtype = torch.float64, width: int = 4) -> tuple[Any, ...]:
    """Arguments of the forward operator: two images of six tokens, or twelve packed tokens."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    qkv = random(*((12,) if packed else (2, 6)), 3, 2, width)
    starts = torch.tensor(STARTS, dtype=torch.int32) if packed else None
    weights = (None, None) if centered is None else (random(width), random(width))
    return qkv, starts, 7 if packed else 0, *weights, bool(centered), 0.1, 0.6


def detached(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)


@NORMS
@PACKED
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_operators_keep_torchs_rules(centered: bool | None, packed: bool, dtype: torch.dtype) -> None:
    every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = inputs(centered, packed, dtype)
    found = [torch.library.opcheck(ops.attention, arguments)]
    out, lse = ops.attention(*detached(arguments))
    gradient = torch.ones_like(out)
    found.append(
        torch.library.opcheck(ops.attention_backward, (gradient, *detached((arguments[0], out, lse, *arguments[1:]))))
    )
    if not packed:
        qkv, _, _, *rest = detached(arguments)
        found.append(torch.library.opcheck(ops.attention_statistics, (qkv, *rest, 1, 5)))
    assert found == [dict.fromkeys(every, "SUCCESS")] * len(found)


@NORMS
@PACKED
def test_gradients_pass_gradcheck(centered: bool | None, packed: bool) -> None:
    qkv, starts, longest, q_weight, k_weight, *rest = inputs(centered, packed)

    def output(*tensors: Tensor) -> Tensor:
        x, *weights = tensors
        out: Tensor = ops.attention(x, starts, longest, *(weights or (None, None)), *rest)[0]
        return out

    tensors = (qkv,) if q_weight is None else (qkv, q_weight, k_weight)
    assert torch.autograd.gradcheck(output, tensors)


@NORMS
def test_log_sum_exp_is_to_base_two_and_takes_no_gradient(centered: bool | None) -> None:
    arguments = inputs(centered, False)
    qkv, _, _, q_weight, k_weight, is_centered, eps, scale = arguments
    out, lse = ops.attention(*arguments)
    norm = None if centered is None else QkNorm(q_weight, k_weight, eps, is_centered)
    q, k, _ = reference.split_heads(qkv, norm)
    torch.testing.assert_close(2**lse, (q @ k.mT * scale).exp().sum(-1))
    assert out.requires_grad
    assert not lse.requires_grad
    assert lse.is_contiguous()


def test_half_precision_keeps_its_statistics_in_fp32() -> None:
    for dtype, statistics in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32)):
        arguments = detached(inputs(True, False, dtype))
        out, lse = ops.attention(*arguments)
        d_qkv, d_weights = ops.attention_backward(out, arguments[0], out, lse, *arguments[1:])
        assert (out.dtype, lse.dtype, d_qkv.dtype, d_weights.dtype) == (dtype, statistics, dtype, statistics)


class Nothing(torch.autograd.Function):
    """Passes its input on, and no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        return None


def test_no_gradient_of_the_output_is_no_gradient_of_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(*_: Any) -> None:
        raise AssertionError("a backward pass of nothing was computed")

    monkeypatch.setattr(reference, "backward", backward)
    qkv = inputs(None, False)[0]
    Nothing.apply(attention(qkv)).sum().backward()
    assert qkv.grad is None


def test_the_gradient_of_frozen_weights_is_not_asked_for() -> None:
    qkv, _, _, q_weight, k_weight, *_ = inputs(False, False)
    attention(qkv, norm=QkNorm(q_weight.detach(), k_weight)).sum().backward()
    assert q_weight.grad is None
    assert k_weight.grad is not None
    only_weights = QkNorm(q_weight, k_weight.detach())
    attention(qkv.detach(), norm=only_weights).square().sum().backward()
    assert q_weight.grad is not None
    assert q_weight.grad.any()


def gradients(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Output, and gradients of a function of it that is not a plain sum."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return out, *torch.autograd.grad(out.square().sum(), leaves)


def block(packed: bool) -> Callable[..., Tensor]:
    """Something before, attention with a norm, something after: of qkv and the two weights."""
    starts = torch.tensor(STARTS, dtype=torch.int32)

    def run(x: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        norm = QkNorm(q_weight, k_weight)
        if packed:
            return attention_varlen(x * 1.5, starts, max_seqlen=7, norm=norm).sin()
        return attention(x * 1.5, norm=norm).sin()

    return run


def block_inputs(packed: bool) -> tuple[Tensor, ...]:
    qkv, _, _, q_weight, k_weight, *_ = inputs(False, packed)
    return qkv, q_weight, k_weight


@PACKED
@pytest.mark.parametrize(("generator", "dynamic"), [("inductor", False), ("aot_eager", True)])
def test_compiles_into_one_graph(packed: bool, generator: str, dynamic: bool) -> None:
    torch.compiler.reset()
    tensors = block_inputs(packed)
    compiled = torch.compile(block(packed), fullgraph=True, backend=generator, dynamic=dynamic)
    for found, expected in zip(gradients(compiled, tensors), gradients(block(packed), tensors), strict=True):
        torch.testing.assert_close(found, expected)


def test_other_batches_compile_into_one_graph_too() -> None:
    torch.compiler.reset()
    _, q_weight, k_weight = block_inputs(False)
    compiled = torch.compile(block(False), fullgraph=True, backend="aot_eager")
    for batch, tokens in ((2, 5), (3, 9), (4, 7)):
        tensors = (torch.linspace(-1, 1, batch * tokens * 24).double().view(batch, tokens, 3, 2, 4), q_weight, k_weight)
        for found, expected in zip(gradients(compiled, tensors), gradients(block(False), tensors), strict=True):
            torch.testing.assert_close(found, expected)


def test_statistics_compile_into_one_graph() -> None:
    torch.compiler.reset()
    qkv = block_inputs(False)[0]
    compiled = torch.compile(
        lambda x: attention_statistics(x, grid=(1, 5)).distance, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(qkv), attention_statistics(qkv, grid=(1, 5)).distance)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every forward pass that is computed."""
    runs: list[int] = []
    forward = reference.forward

    def counted(*args: Any) -> tuple[Tensor, Tensor]:
        runs.append(1)
        return forward(*args)

    monkeypatch.setattr(reference, "forward", counted)
    return runs


@PACKED
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_recomputes(packed: bool, reentrant: bool, forwards: list[int]) -> None:
    tensors, plain = block_inputs(packed), block(packed)
    expected = gradients(plain, tensors)
    forwards.clear()
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = checkpoint(plain, *leaves, use_reentrant=reentrant)
    out.square().sum().backward()  # the reentrant kind refuses torch.autograd.grad
    assert torch.equal(out, expected[0])
    for leaf, gradient in zip(leaves, expected[1:], strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, gradient)
    assert len(forwards) == 2


@PACKED
@pytest.mark.parametrize("compiled", [False, True])
def test_selective_checkpointing_keeps_attention(packed: bool, compiled: bool, forwards: list[int]) -> None:
    torch.compiler.reset()

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = op == torch.ops.vitscale.attention.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    tensors, plain = block_inputs(packed), block(packed)
    expected = gradients(plain, tensors)
    forwards.clear()
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def kept(*leaves: Tensor) -> Tensor:
        out: Tensor = checkpoint(plain, *leaves, use_reentrant=False, context_fn=contexts)
        return out

    found = gradients(torch.compile(kept, fullgraph=True, backend="aot_eager") if compiled else kept, tensors)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert len(forwards) == 1


DEEPSPEED = """
import deepspeed, torch
from vitscale.kernels.attention import attention
# It would be compiled for a minute, and training does without it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
deepspeed.init_distributed("gloo", dist_init_required=False)
deepspeed.checkpointing.configure(None, partition_activations=False)
x = torch.randn(2, 6, 3, 2, 4, generator=torch.Generator().manual_seed(0))
gradients = []
for run in (lambda f, x: f(x), deepspeed.checkpointing.checkpoint):
    leaf = x.clone().requires_grad_()
    run(lambda qkv: attention(qkv * 1.5).sin(), leaf).square().sum().backward()
    gradients.append(leaf.grad)
assert gradients[0].any()
assert torch.equal(*gradients)
print("equal")
"""


def test_deepspeeds_checkpointing_takes_it() -> None:
    result = subprocess.run(
        [sys.executable, "-c", DEEPSPEED], env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("equal\n")


def test_the_kernels_of_a_gpu_are_not_imported_on_a_cpu() -> None:
    code = (
        "import sys, torch\nfrom vitscale.kernels.attention import attention\n"
        "attention(torch.ones(1, 2, 3, 1, 4, requires_grad=True)).sum().backward()\n"
        "print([name for name in sys.modules if name.startswith('vitscale.kernels.')])"
    )
    found = subprocess.check_output([sys.executable, "-c", code], env=environment(), text=True)
    assert "vitscale.kernels.ops" in found
    assert "launch" not in found
    assert "triton" not in found


def counted(function: Callable[[], Tensor], backward: bool = True) -> int:
    with FlopCounterMode(display=False) as counter:
        out = function()
        if backward:
            out.sum().backward()
    return int(counter.get_total_flops())


def test_flops_are_counted() -> None:
    qkv = torch.zeros(2, 6, 3, 2, 4, requires_grad=True)
    forward = 2 * 2 * (2 * 2) * 6 * 6 * 4  # two products, of two FLOPs per multiplication
    assert counted(lambda: attention(qkv), backward=False) == forward
    assert counted(lambda: attention(qkv)) == forward * 7 // 2
    assert counted(lambda: attention(qkv, backend="reference"), backward=False) == forward
    assert counted(lambda: attention_statistics(qkv, grid=(2, 3)).entropy, backward=False) == forward // 2


def test_flops_of_packed_sequences_are_those_of_each() -> None:
    qkv = torch.zeros(12, 3, 2, 4, requires_grad=True)
    lengths = [4, 0, 1, 7]
    starts, longest = sequence_starts(lengths)
    forward = sum(2 * 2 * 2 * length * length * 4 for length in lengths)
    assert counted(lambda: attention_varlen(qkv, starts)) == forward * 7 // 2
    assert counted(lambda: attention_varlen(qkv, starts, backend="reference"), backward=False) == forward
    mode = FakeTensorMode()
    fake, fake_starts = mode.from_tensor(qkv.detach()), mode.from_tensor(starts)
    with mode:
        bound = counted(lambda: attention_varlen(fake, fake_starts, max_seqlen=longest), backward=False)
    assert bound == 2 * 2 * 2 * 12 * longest * 4
    on_meta = qkv.detach().to("meta")
    assert counted(lambda: attention_varlen(on_meta, starts.to("meta"), max_seqlen=longest), backward=False) == bound

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.kernels.attention import attention

BACKENDS: list[Literal["auto", "sdpa", "reference"]] = ["auto", "sdpa", "reference"]


def packed(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Random qkv [B, N, 3, H, K] that wants a gradient."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def by_hand(qkv: torch.Tensor, scale: float) -> torch.Tensor:
    """One softmax per image, head and query: nothing in common with the kernels but the formula."""
    batch, tokens, _, heads, width = qkv.shape
    out = torch.empty(batch, tokens, heads * width, dtype=qkv.dtype)
    for b in range(batch):
        for h in range(heads):
            q, k, v = qkv[b, :, 0, h], qkv[b, :, 1, h], qkv[b, :, 2, h]
            for n in range(tokens):
                weights = torch.stack([(q[n] * k[m]).sum() * scale for m in range(tokens)]).exp()
                out[b, n, h * width : (h + 1) * width] = (weights[:, None] * v).sum(0) / weights.sum()
    return out


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 5),
    heads=st.integers(1, 3),
    width=st.integers(1, 6),
    scale=st.none() | st.floats(0.1, 2),
)
def test_every_backend_computes_the_formula(
    batch: int, tokens: int, heads: int, width: int, scale: float | None
) -> None:
    qkv = packed(batch, tokens, 3, heads, width).detach()
    expected = by_hand(qkv, width**-0.5 if scale is None else scale)
    for backend in BACKENDS:
        torch.testing.assert_close(attention(qkv, scale=scale, backend=backend), expected)


# 197 tokens and 64 per head are ViT-B/16 at 224; 17 and 5 fit no tile of a fused kernel.
@pytest.mark.parametrize(("tokens", "heads", "width"), [(197, 2, 64), (17, 3, 5), (1, 1, 8)])
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 2e-2, 2e-2)])
def test_sdpa_agrees_with_the_fp64_reference_forward_and_backward(
    tokens: int, heads: int, width: int, dtype: torch.dtype, rtol: float, atol: float
) -> None:
    qkv = packed(2, tokens, 3, heads, width, dtype=dtype)
    exact = qkv.detach().double().requires_grad_()
    upstream = torch.randn(2, tokens, heads * width, generator=torch.Generator().manual_seed(1)).to(dtype)

    out = attention(qkv, backend="sdpa")
    out.backward(upstream)
    expected = attention(exact, backend="reference")
    expected.backward(upstream.double())

    assert out.dtype == dtype
    assert qkv.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(qkv.grad.double(), exact.grad, rtol=rtol, atol=atol)


def test_reference_passes_gradcheck() -> None:
    def reference(qkv: torch.Tensor) -> torch.Tensor:
        return attention(qkv, scale=0.7, backend="reference")

    assert torch.autograd.gradcheck(reference, (packed(2, 4, 3, 2, 3),))


def test_reference_keeps_its_statistics_in_fp32() -> None:
    qkv = packed(1, 300, 3, 1, 16, dtype=torch.bfloat16)
    out = attention(qkv, backend="reference")
    exact = attention(qkv.double(), backend="reference")
    torch.testing.assert_close(out, exact.bfloat16(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_beyond_the_exponential_do_not_overflow(backend: Literal["auto", "sdpa", "reference"]) -> None:
    qkv = packed(1, 6, 3, 1, 4, dtype=torch.float32).detach() * 1000
    assert attention(qkv, scale=1.0, backend=backend).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_are_taken(backend: Literal["auto", "sdpa", "reference"]) -> None:
    wide = packed(2, 7, 3, 2, 2 * 4).detach()
    strided = wide[..., ::2].transpose(0, 1)
    assert not strided.is_contiguous()
    torch.testing.assert_close(attention(strided, backend=backend), attention(strided.contiguous(), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_gives_an_empty_result(backend: Literal["auto", "sdpa", "reference"]) -> None:
    qkv = packed(0, 5, 3, 2, 4)
    out = attention(qkv, backend=backend)
    assert out.shape == (0, 5, 8)
    out.sum().backward()
    assert qkv.grad is not None
    assert qkv.grad.shape == qkv.shape


def test_sdpa_reads_views_of_the_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        seen.extend((q, k, v))
        return fused(q, k, v, scale=scale)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    qkv = packed(2, 9, 3, 2, 8, dtype=torch.float32)
    attention(qkv, backend="sdpa")
    storage = qkv.untyped_storage().data_ptr()
    assert [view.untyped_storage().data_ptr() for view in seen] == [storage] * 3
    assert all(view.shape == (2, 2, 9, 8) for view in seen)


def test_gradient_arrives_packed() -> None:
    qkv = packed(2, 9, 3, 2, 8, dtype=torch.float32)
    attention(qkv, backend="sdpa").sum().backward()
    assert qkv.grad is not None
    assert qkv.grad.is_contiguous()


@pytest.mark.parametrize("shape", [(2, 5, 24), (2, 5, 2, 2, 4), (5, 3, 2, 4)])
def test_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"qkv has shape \[.*\]; \[batch, tokens, 3, heads, head_dim\]"):
        attention(torch.zeros(shape))


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend 'flash'; one of auto, sdpa, reference is needed"):
        attention(torch.zeros(1, 2, 3, 1, 4), backend="flash")  # type: ignore[arg-type]

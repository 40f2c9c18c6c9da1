"""Multi-head self-attention on a packed projection (ViT paper, arXiv 2010.11929, appendix A).

B batch, N tokens, H heads, K head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["auto", "sdpa", "reference"]


def attention(qkv: Tensor, *, scale: float | None = None, backend: Backend = "auto") -> Tensor:
    """Attend every token to every token: ``qkv`` [B, N, 3, H, K] -> [B, N, H*K].

    Args:
        qkv: queries, keys and values as one projection gives them; any strides.
        scale: factor on the scores; K**-0.5 by default.
        backend: ``sdpa`` is torch's fused kernel; ``reference`` is plain arithmetic, statistics in at least
            fp32, which the others are tested against; ``auto`` is ``sdpa``.

    Raises:
        ValueError: another shape or an unknown backend.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv has shape {list(qkv.shape)}; [batch, tokens, 3, heads, head_dim] is needed")
    if backend not in _BACKENDS:
        raise ValueError(f"attention backend {backend!r}; one of {', '.join(_BACKENDS)} is needed")
    q, k, v = qkv.transpose(1, 3).unbind(2)  # each [B, H, N, K]
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    mixed = _BACKENDS[backend](q, k, v, scale)  # [B, H, N, K]
    return mixed.transpose(1, 2).flatten(2)  # [B, N, H*K]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(dtype) * scale) @ k.to(dtype).mT  # [B, H, N, N]
    return (scores.softmax(dim=-1) @ v.to(dtype)).to(q.dtype)


_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "auto": _sdpa,
    "sdpa": _sdpa,
    "reference": _reference,
}

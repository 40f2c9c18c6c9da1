"""Initial weights of the Vision Transformer, drawn as in the JAX reference (vit_jax/models_vit.py).

A parameter's values are a function of the seed, its name and its shape alone: neither the order of
construction nor the device, the rank or the partitioning changes them.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from vitscale.models.vit import VisionTransformer

# Standard deviation of a standard normal truncated at two: flax divides by it to keep the variance.
TRUNCATED_STD = 0.87962566
POS_EMBED_STD = 0.02
MLP_BIAS_STD = 1e-6


@torch.no_grad()
def initialize(model: VisionTransformer, seed: int) -> None:
    """Set every parameter of ``model``, also after ``to_empty`` of one that was built on the meta device."""
    for name, parameter in model.named_parameters():
        value = initial_value(name, parameter.shape, seed=seed, head_bias=model.config.head_bias)
        parameter.copy_(value)


def initial_value(name: str, shape: torch.Size, *, seed: int, head_bias: float) -> Tensor:
    """Values of one parameter in fp32 on the CPU.

    Args:
        name: full name in the state dict.
        shape: of the whole parameter, not of a rank's part.
        seed: of the run.
        head_bias: constant for the bias of the head.

    Raises:
        ValueError: a name that is none of the Vision Transformer's.
    """
    value = torch.empty(shape, dtype=torch.float32, device="cpu")
    generator = _generator(seed, name)
    match name.split(".")[-3:]:
        case ["patch_embed", "proj", "weight"] | ["pre_logits", "fc", "weight"]:
            return _lecun_normal(value, generator)
        case ["attn", "qkv", "weight"]:
            # Queries, keys and values are three square kernels that lie in one matrix.
            return _xavier_uniform(value, fan_in=shape[1], fan_out=shape[0] // 3, generator=generator)
        case ["attn", "proj", "weight"] | ["mlp", "fc1" | "fc2", "weight"]:
            return _xavier_uniform(value, fan_in=shape[1], fan_out=shape[0], generator=generator)
        case ["mlp", "fc1" | "fc2", "bias"]:
            return value.normal_(std=MLP_BIAS_STD, generator=generator)
        case ["pos_embed"]:
            return value.normal_(std=POS_EMBED_STD, generator=generator)
        case [*_, "norm" | "norm1" | "norm2", "weight"]:
            return value.fill_(1)
        case ["head", "bias"]:
            return value.fill_(head_bias)
        case ["cls_token"] | ["head", "weight"] | [*_, "bias"]:
            return value.zero_()
    raise ValueError(f"parameter {name!r} has no rule for its initial value; add one beside the others")


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))


def _lecun_normal(value: Tensor, generator: torch.Generator) -> Tensor:
    fan_in = value[0].numel()
    std = math.sqrt(1 / fan_in) / TRUNCATED_STD
    # Inverse of the distribution function: torch's own truncated normal changes with its release.
    inside = math.erf(2 / math.sqrt(2))
    value.uniform_(-inside, inside, generator=generator).erfinv_()
    return value.mul_(std * math.sqrt(2)).clamp_(-2 * std, 2 * std)


def _xavier_uniform(value: Tensor, *, fan_in: int, fan_out: int, generator: torch.Generator) -> Tensor:
    limit = math.sqrt(6 / (fan_in + fan_out))
    return value.uniform_(-limit, limit, generator=generator)

"""What a Vision Transformer's parameters are called elsewhere, and how their elements lie there.

D width, H heads, K = D / H, M width of the MLP, P patch side, C classes; n counts blocks from 0. X is one of query, key
and value, which are the thirds of qkv in this order.

| here, as in timm           | Hugging Face's ViTForImageClassification     | JAX reference (.npz)                     |
|----------------------------|----------------------------------------------|------------------------------------------|
| cls_token                  | vit.embeddings.cls_token                     | cls                                      |
| pos_embed                  | vit.embeddings.position_embeddings           | Transformer/posembed_input/pos_embedding |
| patch_embed.proj [D,3,P,P] | vit.embeddings.patch_embeddings.projection   | embedding [P,P,3,D]                      |
| blocks.n.norm1             | L.layernorm_before                           | T/LayerNorm_0                            |
| blocks.n.attn.qkv [3D,D]   | L.attention.attention.X [D,D]                | A/X [D,H,K], bias [H,K]                  |
| blocks.n.attn.proj [D,D]   | L.attention.output.dense                     | A/out [H,K,D]                            |
| blocks.n.norm2             | L.layernorm_after                            | T/LayerNorm_2                            |
| blocks.n.mlp.fc1 [M,D]     | L.intermediate.dense                         | T/MlpBlock_3/Dense_0 [D,M]               |
| blocks.n.mlp.fc2 [D,M]     | L.output.dense                               | T/MlpBlock_3/Dense_1 [M,D]               |
| norm                       | vit.layernorm                                | Transformer/encoder_norm                 |
| pre_logits.fc [D,D]        | none (and none in timm)                      | pre_logits [D,D]                         |
| head [C,D]                 | classifier                                   | head [D,C]                               |

L = vit.encoder.layer.n, T = Transformer/encoderblock_n, A = T/MultiHeadDotProductAttention_1. Weights and biases keep
their names but in JAX, where a weight is called kernel, or scale in a norm. Hugging Face's class always reads a class
token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from vitscale.errors import CheckpointError

_BLOCK = re.compile(r"blocks\.(\d+)\.")
_EMBEDDINGS = ("cls_token", "pos_embed")
_QKV = ("query", "key", "value")

HF = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "blocks.n.norm1": "vit.encoder.layer.{n}.layernorm_before",
    "blocks.n.attn.qkv": "vit.encoder.layer.{n}.attention.attention.{third}",
    "blocks.n.attn.proj": "vit.encoder.layer.{n}.attention.output.dense",
    "blocks.n.norm2": "vit.encoder.layer.{n}.layernorm_after",
    "blocks.n.mlp.fc1": "vit.encoder.layer.{n}.intermediate.dense",
    "blocks.n.mlp.fc2": "vit.encoder.layer.{n}.output.dense",
    "norm": "vit.layernorm",
    "head": "classifier",
}
JAX = {
    "cls_token": "cls",
    "pos_embed": "Transformer/posembed_input/pos_embedding",
    "patch_embed.proj": "embedding",
    "blocks.n.norm1": "Transformer/encoderblock_{n}/LayerNorm_0",
    "blocks.n.attn.qkv": "Transformer/encoderblock_{n}/MultiHeadDotProductAttention_1/{third}",
    "blocks.n.attn.proj": "Transformer/encoderblock_{n}/MultiHeadDotProductAttention_1/out",
    "blocks.n.norm2": "Transformer/encoderblock_{n}/LayerNorm_2",
    "blocks.n.mlp.fc1": "Transformer/encoderblock_{n}/MlpBlock_3/Dense_0",
    "blocks.n.mlp.fc2": "Transformer/encoderblock_{n}/MlpBlock_3/Dense_1",
    "norm": "Transformer/encoder_norm",
    "pre_logits.fc": "pre_logits",
    "head": "head",
}
TIMM = JAX.keys() - {"pre_logits.fc"}


@dataclass(frozen=True)
class Part:
    """A tensor elsewhere: its name, and how it follows from a parameter here."""

    name: str
    convert: Callable[[Tensor], Tensor]


Naming = dict[str, list[Part]]
"""What becomes of each parameter, by its name here."""


def own_names(names: Iterable[str]) -> Naming:
    """The names as they are."""
    return {name: [Part(name, _same)] for name in names}


def timm_names(names: Sequence[str]) -> Naming:
    """The names as they are, all of which timm's VisionTransformer must have.

    Raises:
        CheckpointError: some it has not.
    """
    _check(names, TIMM, "timm's VisionTransformer")
    return own_names(names)


def hf_names(names: Sequence[str]) -> Naming:
    """Names of Hugging Face's ViTForImageClassification.

    Raises:
        CheckpointError: it has no place for some, or needs what is not there.
    """
    _check(names, HF, "Hugging Face's ViTForImageClassification")
    if "cls_token" not in names:
        raise CheckpointError(
            "Hugging Face's ViTForImageClassification reads the class token, but this model has none (model.pool); "
            "export it with --format timm or npz"
        )
    naming: Naming = {}
    for name in names:
        module, block, leaf = _split(name)
        ending = f".{leaf}" if leaf else ""
        if module == "blocks.n.attn.qkv":
            naming[name] = [
                Part(HF[module].format(n=block, third=third) + ending, partial(_third, index))
                for index, third in enumerate(_QKV)
            ]
        else:
            naming[name] = [Part(HF[module].format(n=block) + ending, _same)]
    return naming


def jax_names(names: Sequence[str], *, num_heads: int) -> Naming:
    """Names of the JAX reference (vit_jax), as in the .npz files that were published with the ViT paper.

    Raises:
        CheckpointError: it has no place for some.
    """
    _check(names, JAX, "the JAX reference")
    return {name: _jax_parts(*_split(name), num_heads) for name in names}


def _jax_parts(module: str, block: str, leaf: str, num_heads: int) -> list[Part]:
    if module in _EMBEDDINGS:
        return [Part(JAX[module], _same)]
    is_weight = leaf == "weight"
    if module.endswith(("norm", "norm1", "norm2")):
        return [Part(f"{JAX[module].format(n=block)}/{'scale' if is_weight else 'bias'}", _same)]
    ending = "/kernel" if is_weight else "/bias"
    if module == "blocks.n.attn.qkv":
        convert = _heads_last if is_weight else _heads_of_bias
        return [
            Part(JAX[module].format(n=block, third=third) + ending, partial(_third_by_head, index, num_heads, convert))
            for index, third in enumerate(_QKV)
        ]
    name = JAX[module].format(n=block) + ending
    if not is_weight:
        return [Part(name, _same)]
    if module == "patch_embed.proj":
        return [Part(name, _to_hwio)]
    if module == "blocks.n.attn.proj":
        return [Part(name, partial(_heads_first, num_heads))]
    return [Part(name, _transposed)]


def _split(name: str) -> tuple[str, str, str]:
    """``blocks.3.norm1.bias`` to ``("blocks.n.norm1", "3", "bias")``."""
    if name in _EMBEDDINGS:
        return name, "", ""
    match = _BLOCK.match(name)
    module, _, leaf = _BLOCK.sub("blocks.n.", name, count=1).rpartition(".")
    return module, match[1] if match else "", leaf


def _check(names: Sequence[str], known: Iterable[str], where: str) -> None:
    modules = set(known)
    unknown = []
    for name in names:
        module, _, leaf = _split(name)
        if module not in modules or (leaf not in ("weight", "bias") and name not in _EMBEDDINGS):
            unknown.append(name)
    if unknown:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise CheckpointError(
            f"{where} has no place for {len(unknown)} parameters ({shown}); export them with --format safetensors"
        )


def _same(values: Tensor) -> Tensor:
    return values


def _transposed(weight: Tensor) -> Tensor:
    return weight.T


def _to_hwio(weight: Tensor) -> Tensor:
    return weight.permute(2, 3, 1, 0)


def _third(index: int, values: Tensor) -> Tensor:
    return values.chunk(3)[index]


def _third_by_head(index: int, num_heads: int, convert: Callable[[int, Tensor], Tensor], values: Tensor) -> Tensor:
    return convert(num_heads, _third(index, values))


def _heads_last(num_heads: int, weight: Tensor) -> Tensor:
    """[H*K, D] to [D, H, K]."""
    return weight.T.reshape(weight.shape[1], num_heads, -1)


def _heads_of_bias(num_heads: int, bias: Tensor) -> Tensor:
    """[H*K] to [H, K]."""
    return bias.reshape(num_heads, -1)


def _heads_first(num_heads: int, weight: Tensor) -> Tensor:
    """[D, H*K] to [H, K, D]."""
    return weight.T.reshape(num_heads, -1, weight.shape[0])

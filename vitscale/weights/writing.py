"""Tensors that come one after another, into files of the public kinds."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from vitscale.config.schema import ModelConfig
from vitscale.models.shapes import VitShape
from vitscale.tensor_file import safetensors_header
from vitscale.weights.names import Naming, Part

# What a zip file's comment may hold.
_MAX_COMMENT = 65535
_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}


def write_safetensors(
    file: BinaryIO,
    naming: Naming,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    shapes: Mapping[str, Sequence[int]],
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """Write a safetensors file.

    Args:
        file: open for writing.
        naming: what each tensor is called there; in the order in which they come.
        tensors: by their names here, in this order.
        metadata: texts.
        shapes: of the tensors.
        dtypes: those of the file: float32, bfloat16 or int64.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for source, parts in naming.items():
        for part in parts:
            shape = list(part.convert(torch.empty(tuple(shapes[source]), device="meta")).shape)
            start, end = end, end + prod(shape) * dtypes[source].itemsize
            entries[part.name] = {"dtype": _TYPES[dtypes[source]], "shape": shape, "data_offsets": [start, end]}
    file.write(safetensors_header(entries))
    for name, _, values in _converted(naming, tensors):
        file.write(values.to(dtypes[name]).contiguous().view(-1).view(torch.uint8).numpy().data)


def write_npz(
    file: BinaryIO, naming: Naming, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """As ``numpy.savez`` does. The metadata are the archive's comment, since readers take every member for a weight."""
    with zipfile.ZipFile(file, "w") as archive:
        comment = json.dumps(metadata).encode()
        if len(comment) > _MAX_COMMENT:
            comment = json.dumps({key: value for key, value in metadata.items() if key != "classes"}).encode()
        archive.comment = comment
        for _, part, values in _converted(naming, tensors):
            with archive.open(f"{part.name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values.contiguous().numpy(), allow_pickle=False)


def hf_config(
    config: ModelConfig, shape: VitShape, classes: Sequence[str] | None, dtype: torch.dtype
) -> dict[str, Any]:
    """The ``config.json`` with which Hugging Face's ViTForImageClassification computes what this model does."""
    height, width = shape.image_hw
    labels = classes or [f"LABEL_{number}" for number in range(shape.num_classes)]
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": shape.embed_dim,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.num_heads,
        "intermediate_size": shape.mlp_dim,
        "hidden_act": "gelu_pytorch_tanh" if config.gelu == "tanh" else "gelu",
        "layer_norm_eps": config.layer_norm_eps,
        "image_size": height if height == width else [height, width],
        "patch_size": shape.patch_size,
        "num_channels": 3,
        "qkv_bias": config.qkv_bias,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        "torch_dtype": "float32" if dtype is torch.float32 else "bfloat16",
    }


def _converted(naming: Naming, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Part, Tensor]]:
    for name, values in tensors:
        for part in naming[name]:
            yield name, part, part.convert(values)

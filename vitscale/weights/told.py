"""What the metadata of our own files tell of the model that their weights are for."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from vitscale.config.loader import parse_section
from vitscale.config.schema import ModelConfig
from vitscale.errors import ConfigError

VERSION_KEY = "vitscale_version"
"""Of the metadata that tell a file of our own."""
MODEL_KEY = "model"
"""Holds the keys of ModelConfig that are not at their defaults, as JSON."""
# Keys that say how a model is computed on some machine, and not what it computes.
_OF_A_MACHINE = ("attention", "activation_checkpointing")
ARITHMETIC = (
    "gelu",
    "layer_norm_eps",
    "qkv_bias",
    "qk_norm",
    "position",
    "position_at",
    "attention_span",
    "block",
)
"""Keys of ModelConfig by which the same tensors, or other ones of the same file, make another function."""


def model_text(config: ModelConfig) -> str:
    """A model as the metadata tell it."""
    keys = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in _OF_A_MACHINE and getattr(config, field.name) != field.default
    }
    return json.dumps({"variant": config.variant, **keys})


def told_model(metadata: Mapping[str, str]) -> ModelConfig | None:
    """The model that a file tells; None if it tells none.

    Raises:
        ConfigError: it tells one that is not known here.
    """
    if VERSION_KEY not in metadata or MODEL_KEY not in metadata:
        return None
    return parse_section(ModelConfig, metadata[MODEL_KEY], "the file's metadata")


def told_arithmetic(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Keys of ModelConfig that a file tells, and that its tensors alone do not."""
    told: dict[str, Any] = {}
    if metadata.get("gelu") in ("tanh", "erf"):
        told["gelu"] = metadata["gelu"]
    if re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", metadata.get("layer_norm_eps", "")):
        told["layer_norm_eps"] = float(metadata["layer_norm_eps"])
    try:
        model = told_model(metadata)
    except ConfigError:
        # A guess of the model says so; a model that the user names needs no guess.
        return told
    if model is not None:
        plain = ModelConfig(num_classes=1)
        told |= {key: getattr(model, key) for key in ARITHMETIC if getattr(model, key) != getattr(plain, key)}
    return told

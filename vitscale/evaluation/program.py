"""A model as a program of torch alone: it runs where vitscale is not installed.

B batch, K classes, (H, W) height and width in pixels.
"""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitscale import __version__
from vitscale.data.loader import value_range
from vitscale.durable import published
from vitscale.errors import ConfigError, DataError
from vitscale.evaluation.names import output_names
from vitscale.evaluation.pretrained import Pretrained
from vitscale.models.build import Model, build_model

DESCRIPTION = "vitscale.json"
"""Entry of the file that tells what the program takes and gives."""
LARGEST_BATCH = 1 << 16
# Rounding of other kernels for other batch sizes, over the largest logit.
TOLERANCE = 1e-4


class _OnPixels(nn.Module):
    """Pixels to logits: what a program needs to know of the value range is within it."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> fp32 [B, K]."""
        logits: Tensor = self.model(value_range(pixels)).float()
        return logits


def export_program(pretrained: Pretrained, out: Path, *, force: bool) -> dict[str, Any]:
    """Write a ``.pt2`` file that ``torch.export.load(path).module()`` reads. Returns its description.

    The program takes uint8 pixels [B, 3, H, W] of any number of images, cropped as ``crop`` in the description says,
    and gives logits [B, K]. It is read back and compared with the model before it takes its name.

    Args:
        pretrained: the model.
        out: file to write.
        force: replace it.

    Raises:
        ConfigError: the model tells no classes, or ``out`` is of another kind.
        DataError: ``out`` exists, or cannot be written.
    """
    if out.suffix != ".pt2":
        raise ConfigError(f"{out}: a program of torch.export ends in .pt2; rename it, or write weights with 'convert'")
    if pretrained.config.head != "classes":
        raise ConfigError(
            f"model.head {pretrained.config.head} has no logits of images; take a model that tells classes"
        )
    if out.exists() and not force:
        raise DataError(f"{out}: exists; choose another file, or replace it with --force")
    height, width = pretrained.image_hw
    description = {
        "vitscale_version": __version__,
        "variant": pretrained.config.variant,
        "input": f"uint8 pixels [batch, 3, {height}, {width}], RGB",
        "output": f"logits [batch, {pretrained.num_classes}]",
        "image_size": [height, width],
        "crop": pretrained.data.eval_resize,
        "crop_share": pretrained.data.eval_crop_share if pretrained.data.eval_resize == "short_side" else None,
        "classes": None if pretrained.classes is None else output_names(pretrained.classes, pretrained.num_classes),
        "weights": pretrained.digest,
        "step": pretrained.step,
    }
    module = _OnPixels(_plain(pretrained)).eval().requires_grad_(requires_grad=False)
    pixels = torch.randint(0, 256, (3, 3, height, width), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    with torch.no_grad():
        program = torch.export.export(module, (pixels[:2],), dynamic_shapes=({0: batch},))
    try:
        with published(out) as file:
            torch.export.save(program, file, extra_files={DESCRIPTION: json.dumps(description)})
            file.seek(0)
            _compare(module, io.BytesIO(file.read()), pixels)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}; choose another place") from error
    return description


def _plain(pretrained: Pretrained) -> Model:
    """The same model with torch's own attention, on the CPU."""
    state = {name: values.cpu() for name, values in pretrained.model.state_dict().items()}
    config = pretrained.config
    if any(hasattr(module, "backend") for module in pretrained.model.modules()):
        config = dataclasses.replace(config, attention="sdpa")  # our operator is not part of torch
    config = dataclasses.replace(config, activation_checkpointing=False)
    with torch.device("meta"):
        model = build_model(config, pretrained.image_hw)
    model.load_state_dict(state, assign=True)
    return model


def _compare(module: nn.Module, file: io.BytesIO, pixels: Tensor) -> None:
    with torch.no_grad():
        expected, got = module(pixels), torch.export.load(file).module()(pixels)
    error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    assert error <= TOLERANCE, f"the program's logits differ by {error:.2g} of the largest one"

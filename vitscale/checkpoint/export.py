"""A checkpoint's weights as a file of their own, for inference, fine-tuning and other libraries.

The weights stream from the checkpoint into the file: a few parameters are in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from vitscale.checkpoint.choices import Choice, Precision, weights_kind
from vitscale.checkpoint.format import BUFFER, Checkpoint, DamagedCheckpointError
from vitscale.checkpoint.streaming import Range, stream
from vitscale.config.schema import ModelConfig
from vitscale.durable import publish_text, published, sync_folder
from vitscale.errors import CheckpointError, ConfigError
from vitscale.models.shapes import Shape, VitShape
from vitscale.weights.choices import WeightFormat
from vitscale.weights.formats import HF_CONFIG, HF_WEIGHTS
from vitscale.weights.names import Naming, own_names, timm_names
from vitscale.weights.save import NUMPY_FORMATS, caveats, format_naming, model_metadata, write_tensors
from vitscale.weights.told import VERSION_KEY
from vitscale.weights.writing import hf_config


@dataclass(frozen=True)
class Model:
    """What a run's configuration tells of its model."""

    config: ModelConfig
    shape: Shape


def export(
    checkpoint: Checkpoint,
    out: Path,
    choice: Choice,
    *,
    model: Model | None,
    run: str,
    force: bool = False,
    advance: Callable[[str, int, int], None] = lambda *_: None,
) -> list[str]:
    """Write a checkpoint's weights to ``out``: a file, or with ``hf`` a folder. It appears when it is complete.

    Args:
        checkpoint: every byte that is taken from it is verified.
        out: a new file or folder.
        choice: what is written.
        model: what most formats must know; None if the run's configuration is not there.
        run: of the checkpoint, for the metadata.
        force: replace what is there.
        advance: told the name of the checkpoint, the bytes that were read, and of how many.

    Returns:
        What other readers of the file take for granted, and this model does otherwise.

    Raises:
        ConfigError: the choice does not fit the model, or itself.
        WeightsError: the format has no place for the model.
        CheckpointError: the checkpoint is damaged or has not what is asked for, or ``out`` is there or cannot be
            written.
    """
    kind = weights_kind(checkpoint, choice.weights)
    naming = _naming(checkpoint, choice, model)
    file = out / HF_WEIGHTS if choice.format is WeightFormat.HF else out
    _check_free(out, choice.format, force=force)
    metadata = _metadata(checkpoint, choice, model, run)
    dtype = torch.float32 if choice.precision is Precision.FP32 else torch.bfloat16
    tensors = _tensors(checkpoint, kind, advance)
    try:
        if choice.format is WeightFormat.HF:
            assert model is not None
            assert isinstance(model.shape, VitShape)
            out.mkdir(exist_ok=True)
            described = hf_config(model.config, model.shape, checkpoint.content["classes"], dtype)
            text = json.dumps(described, indent=2)
            publish_text(out / HF_CONFIG, text + "\n")
        with published(file) as opened:
            shapes = checkpoint.shapes | checkpoint.buffers
            dtypes = dict.fromkeys(checkpoint.shapes, dtype) | {name: _buffer_type(name) for name in checkpoint.buffers}
            write_tensors(opened, choice.format, naming, tensors, metadata, shapes, dtypes)
        sync_folder(file.parent)
    except DamagedCheckpointError as error:
        raise CheckpointError(f"{checkpoint.shown}: is damaged ({error}); take another one with --step") from error
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be written: {error.strerror or error}; make its folder, free space, or choose "
            f"another place"
        ) from error
    if model is None:
        return []
    return caveats(choice.format, model.config, model.shape.image_hw)


def _buffer_type(name: str) -> torch.dtype:
    """Running statistics lose too much in bf16; what counts batches is a whole number everywhere."""
    return torch.int64 if name.endswith("num_batches_tracked") else torch.float32


def _naming(checkpoint: Checkpoint, choice: Choice, model: Model | None) -> Naming:
    names = [*checkpoint.shapes, *checkpoint.buffers]
    if model is None and choice.format not in (WeightFormat.SAFETENSORS, WeightFormat.TIMM):
        raise ConfigError(
            f"--format {choice.format} must know the model, which config.yaml of the run tells; give the run "
            f"folder, or take --format {WeightFormat.SAFETENSORS} or {WeightFormat.TIMM}"
        )
    if choice.format in NUMPY_FORMATS and choice.precision is not Precision.FP32:
        raise ConfigError(
            f"--precision {choice.precision}: NumPy has no such numbers; take --precision {Precision.FP32} or "
            f"--format {WeightFormat.SAFETENSORS}"
        )
    if model is not None:
        return format_naming(names, choice.format, model.config, model.shape.image_hw)
    return own_names(names) if choice.format is WeightFormat.SAFETENSORS else timm_names(names)


def _check_free(out: Path, format: WeightFormat, *, force: bool) -> None:
    there = out.is_dir() and any((out / name).exists() for name in (HF_WEIGHTS, HF_CONFIG))
    if out.is_dir() != (format is WeightFormat.HF) and out.exists():
        needed, found = ("folder", "file") if format is WeightFormat.HF else ("file", "folder")
        raise CheckpointError(f"{out}: is a {found}, but --format {format} writes a {needed}; choose another name")
    if not force and (there or out.is_file()):
        raise CheckpointError(f"{out}: exists; choose another name, or replace it with --force")


def _metadata(checkpoint: Checkpoint, choice: Choice, model: Model | None, run: str) -> dict[str, str]:
    """Texts, as safetensors demands."""
    classes = checkpoint.content.get("classes")
    metadata = model_metadata(model.config, model.shape.image_hw) if model is not None else {"format": "pt"}
    metadata |= {
        "step": str(checkpoint.step),
        "run": run,
        "weights": str(choice.weights),
        VERSION_KEY: str(checkpoint.content.get("vitscale_version", "")),
    }
    if classes is not None:
        metadata["classes"] = json.dumps(classes, ensure_ascii=False)
    return metadata


def _tensors(
    checkpoint: Checkpoint, kind: str, advance: Callable[[str, int, int], None]
) -> Iterator[tuple[str, Tensor]]:
    """Whole fp32 parameters and buffers in the manifest's order."""
    shapes = checkpoint.shapes | checkpoint.buffers
    kinds = dict.fromkeys(checkpoint.shapes, kind) | dict.fromkeys(checkpoint.buffers, BUFFER)
    ranges = [Range(name, kinds[name], 0, prod(shape)) for name, shape in shapes.items()]
    done, total = 0, 4 * sum(each.numel for each in ranges)
    for name, _, _, values in stream(checkpoint, ranges):
        yield name, values.view(shapes[name])
        done += values.nbytes
        advance(checkpoint.name, done, total)

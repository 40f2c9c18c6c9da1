"""A trained model to be judged: from a checkpoint of a run, or from a file of weights of any format."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitscale.checkpoint.choices import Weights, weights_kind
from vitscale.checkpoint.format import BUFFER, Checkpoint
from vitscale.checkpoint.opening import checkpoint_folder
from vitscale.checkpoint.reading import read_parameters
from vitscale.checkpoint.store import open_checkpoint
from vitscale.config.loader import load_config, load_section, parse_section
from vitscale.config.schema import DataConfig, ModelConfig, TrainConfig
from vitscale.config.section import section
from vitscale.data.loader import value_range
from vitscale.distributed import Ranks
from vitscale.errors import CheckpointError, ConfigError, WeightsError
from vitscale.evaluation.choices import ModelChoice
from vitscale.models.build import Model, build_model
from vitscale.weights.choices import ResizeMode, WeightFormat
from vitscale.weights.expected import family_of
from vitscale.weights.files import Stored, TensorFile
from vitscale.weights.formats import HF_CONFIG, Family, WeightsFile, open_weights
from vitscale.weights.guess import guess_model
from vitscale.weights.load import load_from
from vitscale.weights.names import OWN
from vitscale.weights.save import model_metadata

RUN_CONFIG = "config.yaml"
# What may be read differently from the run: how the bytes arrive, not what the model sees.
READING_KEYS = ("data.storage", "data.workers", "data.prefetch_batches", "data.read_ahead_batches")
# Of a file nothing is known but its model, so how its images are cropped may be said, too.
_NOT_OF_A_FILE = ("data.train", "data.eval", "data.image_size")
# Families whose arithmetic the configuration tells; the others' is fixed.
_CONFIGURED: tuple[Family, ...] = ("vit", "hybrid")
_HASHED_BYTES = 1 << 20


@dataclass(frozen=True)
class Pretrained:
    """A model, and what is known of it."""

    model: Model
    """In fp32, in evaluation mode, on this rank's device."""
    config: ModelConfig
    image_hw: tuple[int, int]
    """Height and width in pixels of the images that it takes."""
    data: DataConfig
    """How its images are read and cropped; of a file, the defaults, and no training set."""
    digest: str
    """Hexadecimal identity of the weights' content, and of how they were resized."""
    name: str
    """For tables."""
    step: int | None
    """Of the checkpoint; None for a file."""
    weights: Weights
    classes: tuple[str, ...] | None
    """Names of the head's outputs, if they are known."""

    @property
    def num_classes(self) -> int:
        """Outputs of the head."""
        return self.config.num_classes


@section
class _FileSettings:
    """What may be said of the images of a file of weights."""

    data: DataConfig


@dataclass(frozen=True)
class Description:
    """What can be told of a model without reading the values of its weights; plain data."""

    config: ModelConfig
    data: DataConfig
    """As in :class:`Pretrained`."""
    digest: str
    classes: tuple[str, ...] | None
    checkpoint: Checkpoint | None = None
    """Of a run."""
    trained_hw: tuple[int, int] | None = None
    """Of a run, the image size that it was trained with."""

    @property
    def family(self) -> Family:
        """Of the model's variant."""
        return family_of(self.config, self.data.image_hw)


def open_pretrained(choice: ModelChoice, ranks: Ranks) -> Pretrained:
    """Load a model onto this rank. Collective.

    Args:
        choice: of the model.
        ranks: who takes part; each gets the whole model.

    Raises:
        VitscaleError: as :func:`describe_pretrained`, and if the weights do not fit the model.
    """
    location, weights, resize = choice.location, choice.weights, choice.resize
    found = ranks.on_main(
        lambda: describe_pretrained(
            location,
            step=choice.step,
            weights=weights,
            model=choice.model,
            overrides=choice.overrides,
            image_hw=choice.image_hw,
            resize=resize,
        )
    )
    states: list[dict[str, Tensor]] = []
    # A file that only some ranks see is told as an error on all.
    ranks.on_all(lambda: states.append(_read_state(location, found, weights, resize)))
    with torch.device("meta"):
        network = build_model(found.config, found.data.image_hw)
    types = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    network.load_state_dict({name: values.to(types[name]) for name, values in states.pop().items()}, assign=True)
    name = location.resolve().name + (f" ({weights})" if weights is not Weights.RAW else "")
    return Pretrained(
        model=network.to(ranks.device).eval(),
        config=found.config,
        image_hw=found.data.image_hw,
        data=found.data,
        digest=found.digest,
        name=name,
        step=None if found.checkpoint is None else found.checkpoint.step,
        weights=weights,
        classes=found.classes,
    )


def describe_pretrained(
    location: Path,
    *,
    step: int | None = None,
    weights: Weights = Weights.RAW,
    model: Path | None = None,
    overrides: Sequence[str] = (),
    image_hw: tuple[int, int] | None = None,
    resize: ResizeMode | None = None,
) -> Description:
    """Find out what a model is, for one process; takes what :class:`ModelChoice` holds.

    Raises:
        CheckpointError: the folder is no run, or the run has no such checkpoint.
        WeightsError: the file cannot be read.
        ConfigError: an option does not go with this kind of location, or the file does not tell its model.
    """
    describe = _of_run if _is_run(location) else _of_file
    return describe(location, step, weights, model, overrides, image_hw, resize)


def on_pixels(function: Callable[[Tensor], Tensor], ranks: Ranks) -> Callable[[Tensor], Tensor]:
    """A function of normalised images as one of uint8 pixels [B, 3, H, W] on the host."""
    return lambda images: function(value_range(images.to(ranks.device)))


def read_run_config(run: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration that a run was trained with. ``overrides`` change how its data is read.

    Raises:
        CheckpointError: the folder is not a run.
        ConfigError: an override is of another key than :data:`READING_KEYS` and those below, or its value is wrong.
    """
    for override in overrides:
        key, equals, _ = override.partition("=")
        if equals and not any(key == allowed or key.startswith(allowed + ".") for allowed in READING_KEYS):
            raise ConfigError(
                f"{key}: is what the run was trained with and cannot be changed here; allowed are data.storage.* and "
                f"{', '.join(READING_KEYS[1:-1])} and {READING_KEYS[-1]}; leave it out"
            )
    path = run / RUN_CONFIG
    if not path.is_file():
        raise CheckpointError(f"{run}: not a run folder (no config.yaml); give the folder that 'vitscale train' filled")
    return load_config(path, overrides)


def _is_run(location: Path) -> bool:
    if not location.exists():
        raise CheckpointError(
            f"{location}: not a run folder, nor a file of weights: it does not exist; give the folder that 'vitscale "
            f"train' filled, a file of weights, or a Hugging Face folder"
        )
    if location.is_file() or (location / HF_CONFIG).is_file():
        return False
    if (location / RUN_CONFIG).is_file():
        return True
    raise CheckpointError(
        f"{location}: not a run folder (no {RUN_CONFIG}), nor a Hugging Face folder (no {HF_CONFIG}); give the folder "
        f"that 'vitscale train' filled, or a file of weights"
    )


def _of_run(
    run: Path,
    step: int | None,
    weights: Weights,
    model: Path | None,
    overrides: Sequence[str],
    image_hw: tuple[int, int] | None,
    resize: ResizeMode | None,
) -> Description:
    if model is not None:
        raise ConfigError(f"--model {model}: {run} is a run, which tells its model; leave it out")
    config = read_run_config(run, overrides)
    checkpoint = open_checkpoint(checkpoint_folder(run, config.checkpoint), step)
    digests, trained_hw = checkpoint.content["digests"], config.data.image_hw
    digest = str(digests[weights_kind(checkpoint, weights)]) + str(digests.get(BUFFER, ""))
    data = config.data
    if image_hw is not None and image_hw != trained_hw:
        data, digest = dataclasses.replace(data, image_size=image_hw), _resized(digest, image_hw, resize)
    names = checkpoint.content["classes"]
    classes = None if names is None else tuple(names)
    return Description(config.model, data, digest, classes, checkpoint, trained_hw)


def _of_file(
    path: Path,
    step: int | None,
    weights: Weights,
    model: Path | None,
    overrides: Sequence[str],
    image_hw: tuple[int, int] | None,
    resize: ResizeMode | None,
) -> Description:
    for option, given in (("--step", step is not None), ("--weights ema", weights is not Weights.RAW)):
        if given:
            raise ConfigError(f"{option} is for runs, and {path} is a file of weights; leave it out, or name the run")
    source = open_weights(path)
    guess = guess_model(source)
    if model is not None:
        config = load_section(ModelConfig, model)
    elif guess.config is None or guess.doubt:
        raise ConfigError(
            f"{path}: does not tell its model for certain: {guess.doubt}; name it with --model MODEL.yaml"
        )
    else:
        config = guess.config
    if source.family in _CONFIGURED:
        # What a file's format implies holds whatever model is named.
        config = dataclasses.replace(config, **source.implied)
    own_hw = guess.image_hw
    image_hw = image_hw or own_hw
    if image_hw is None:
        raise ConfigError(f"{path}: does not tell the size of its images; name it with --image-size PIXELS")
    digest = _file_digest(source.file.path)
    if own_hw != image_hw or resize is not None:
        digest = _resized(digest, image_hw, resize)
    return Description(config, _file_data(path, overrides, image_hw), digest, _told_classes(source, config.num_classes))


def _file_data(path: Path, overrides: Sequence[str], image_hw: tuple[int, int]) -> DataConfig:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if equals and (not key.startswith("data.") or key in _NOT_OF_A_FILE):
            raise ConfigError(
                f"{key}: says nothing of a file of weights; keys of data are allowed, but for "
                f"{', '.join(_NOT_OF_A_FILE)} (--image-size sets the last); leave it out"
            )
    text = json.dumps({"data": {"train": "", "image_size": image_hw}})
    return parse_section(_FileSettings, text, str(path), overrides).data


def _told_classes(source: WeightsFile, num_classes: int) -> tuple[str, ...] | None:
    """Names of the outputs, from our metadata or from what Hugging Face's configuration says."""
    told: object = None
    if "classes" in source.metadata:
        try:
            told = json.loads(source.metadata["classes"])
        except ValueError:
            return None  # the metadata of a foreign program; its classes count as unnamed
    elif source.hf_config is not None:
        names = source.hf_config.get("id2label")
        if isinstance(names, dict) and set(names) == {str(label) for label in range(num_classes)}:
            told = [names[str(label)] for label in range(num_classes)]
            if told == [f"LABEL_{label}" for label in range(num_classes)]:
                return None
    if not isinstance(told, list) or not all(isinstance(name, str) for name in told):
        return None
    return tuple(told)


def _read_state(location: Path, found: Description, weights: Weights, resize: ResizeMode | None) -> dict[str, Tensor]:
    """Every parameter and buffer by its name here, on the CPU."""
    checkpoint, image_hw = found.checkpoint, found.data.image_hw
    if checkpoint is None:
        return load_from(open_weights(location), found.config, image_hw, resize=resize).state_dict
    assert found.trained_hw is not None
    state = read_parameters(checkpoint, weights_kind(checkpoint, weights))
    if image_hw == found.trained_hw:
        return state
    source = checkpoint_weights(checkpoint, state, found.config, found.trained_hw)
    return load_from(source, found.config, image_hw, resize=resize).state_dict


def checkpoint_weights(
    checkpoint: Checkpoint, state: dict[str, Tensor], config: ModelConfig, image_hw: tuple[int, int]
) -> WeightsFile:
    """Weights of a checkpoint as a file of our own would hold them, for what fits files to models.

    Args:
        checkpoint: for messages.
        state: all its parameters and buffers.
        config: of the model that was trained.
        image_hw: its images' height and width in pixels.
    """
    path = Path(checkpoint.shown)
    tensors = {
        name: Stored(values.shape, values.dtype, lambda values=values: values)  # type: ignore[misc]
        for name, values in state.items()
    }
    metadata = model_metadata(config, image_hw)
    return WeightsFile(
        path=path,
        format=WeightFormat.SAFETENSORS,
        family=family_of(config, image_hw),
        dialect=OWN,
        tensors=tensors,
        implied={},
        metadata=metadata,
        hf_config=None,
        file=TensorFile(path, "safetensors", tensors, metadata),
        notes=(),
    )


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_HASHED_BYTES):
                digest.update(block)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}; check the file") from error
    return digest.hexdigest()


def _resized(digest: str, image_hw: tuple[int, int], resize: ResizeMode | None) -> str:
    return hashlib.sha256(f"{digest} {image_hw} {resize}".encode()).hexdigest()

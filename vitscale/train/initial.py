"""The weights that a run begins with: random ones, or those of another run or of a file (``init`` in a configuration).

What the run itself has saved comes before both. Then nothing here is read again, and what ``init.path`` named may be
gone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitscale.checkpoint.choices import Weights, weights_kind
from vitscale.checkpoint.digest import add_digest
from vitscale.checkpoint.engine_state import Checkpoints
from vitscale.checkpoint.format import AVERAGE, MASTER, Checkpoint
from vitscale.checkpoint.opening import checkpoint_folder
from vitscale.checkpoint.reading import read_parameters
from vitscale.checkpoint.store import checkpoint_names, open_checkpoint
from vitscale.config.schema import InitConfig, ModelConfig, TrainConfig
from vitscale.distributed import Ranks
from vitscale.errors import ConfigError, WeightsError
from vitscale.evaluation.pretrained import RUN_CONFIG, checkpoint_weights, read_run_config
from vitscale.weights.choices import HeadMode, PreLogitsMode, ResizeMode
from vitscale.weights.expected import expected_tensors
from vitscale.weights.formats import HF_CONFIG, WeightsFile, open_weights
from vitscale.weights.load import load_from
from vitscale.weights.reading import Translated
from vitscale.weights.told import ARITHMETIC, told_model

_HEAD, _HIDDEN = "head.weight", "pre_logits.fc.weight"
_HEADS = {"new": HeadMode.ZERO, "keep": HeadMode.KEEP}


@dataclass(frozen=True)
class _Initial:
    """Weights to begin with."""

    state: dict[str, Tensor]
    """Parameters and buffers by name, fp32 on the CPU."""
    record: dict[str, Any]
    """Where they come from and what they are, as plain data."""
    description: tuple[str, ...]
    """What the user should know, line by line."""


@dataclass(frozen=True)
class _Run:
    """A run to begin with."""

    checkpoint: Checkpoint
    model: ModelConfig
    image_hw: tuple[int, int]


def check_initial(config: TrainConfig, classes: Sequence[str] | None) -> None:
    """See, before anything is written, that a run that is to begin with other weights can. Reads all of them.

    Args:
        config: of the run. If it has a checkpoint already, nothing is looked at.
        classes: what the labels of its training data mean, if they tell.

    Raises:
        ConfigError: the weights do not go with the configuration.
        CheckpointError, WeightsError: they cannot be read, or do not fit the model.
    """
    path = config.init.path
    if path is None:
        return
    if path.resolve() == config.run.resolve():
        raise ConfigError(f"init.path: {path} is this run itself, which goes on by itself; name another one")
    if not checkpoint_names(checkpoint_folder(config.run, config.checkpoint)):
        _read(config, _find(path, config.init), classes)


def begin_with_initial(
    config: TrainConfig,
    classes: Sequence[str] | None,
    checkpoints: Checkpoints,
    ranks: Ranks,
    *,
    say: Callable[[str], None],
) -> dict[str, Any] | None:
    """Let a run that has no checkpoint begin with the weights that its configuration names. Collective.

    Rank 0 reads them, so its node needs host memory for the whole model in fp32 until this returns (0.34 GB for ViT-B,
    2.5 GB for ViT-H, 88 GB for 22B); the other ranks get one tensor after another and keep their parts.

    Args:
        config: of the run.
        classes: what the labels of its training data mean, if they tell.
        checkpoints: of the engine, whose weights are random yet.
        ranks: that share the engine.
        say: shows a line.

    Returns:
        What the weights were, for the record of the attempt; None for random ones.

    Raises:
        VitscaleError: as :func:`check_initial`.
    """
    path = config.init.path
    if path is None:
        return None
    state = dict[str, Tensor]()

    def read_on_main() -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
        initial = _read(config, _find(path, config.init), classes)
        for line in initial.description:
            say(line)
        state.update(initial.state)
        return {name: tuple(values.shape) for name, values in state.items()}, initial.record

    shapes, record = ranks.on_main(read_on_main)
    # A tensor that is sent lives no longer than it must.
    checkpoints.begin_with(
        (name, ranks.from_main(state.pop(name).float().contiguous() if ranks.is_main else torch.empty(shape)))
        for name, shape in shapes.items()
    )
    return record


def _find(path: Path, init: InitConfig) -> _Run | Path:
    """A run's checkpoint, or a file of weights."""
    if not path.exists():
        raise ConfigError(
            f"init.path: {path} does not exist; give the folder of a run, a file of weights, or a Hugging Face folder"
        )
    if path.is_dir() and (path / RUN_CONFIG).is_file():
        config = read_run_config(path)
        checkpoint = open_checkpoint(checkpoint_folder(path, config.checkpoint), init.step)
        if init.weights == "ema" and AVERAGE not in checkpoint.digests:
            raise ConfigError(
                f"init.weights: ema, but {checkpoint.shown} holds no averaged weights, since that run was trained "
                f"without optim.ema_decay; set init.weights=raw"
            )
        return _Run(checkpoint, config.model, config.data.image_hw)
    if path.is_dir() and not (path / HF_CONFIG).is_file():
        raise ConfigError(
            f"init.path: {path} is neither a run (no {RUN_CONFIG}) nor a Hugging Face folder (no {HF_CONFIG}); give "
            f"the folder that 'vitscale train' filled, or a file of weights"
        )
    for key, given in (("step", init.step is not None), ("weights", init.weights != "raw")):
        if given:
            raise ConfigError(f"init.{key}: is for runs, and {path} holds weights alone; leave it out, or name the run")
    return path


def _read(config: TrainConfig, found: _Run | Path, classes: Sequence[str] | None) -> _Initial:
    init, model, image_hw = config.init, config.model, config.data.image_hw
    source = _of_file(found) if isinstance(found, Path) else _of_run(found, init)
    if source.family in ("vit", "hybrid"):
        _check_arithmetic(source, model)
    _check_hidden(source, init, model, has=_HIDDEN in expected_tensors(model, image_hw))
    if init.head == "keep":
        _check_head(source, model, classes)
    try:
        loaded = load_from(
            source,
            model,
            image_hw,
            resize=None if init.resize is None else ResizeMode(init.resize),
            head=_HEADS[init.head],
            pre_logits=PreLogitsMode(init.pre_logits),
        )
    except WeightsError as error:
        raise WeightsError(f"init.path: {_by_keys(str(error))}") from error
    head = "a new head, all zeros" if init.head == "new" else "the same head"
    where = str(found) if isinstance(found, Path) else found.checkpoint.shown
    return _Initial(
        state=loaded.state_dict,
        record={"path": where, "weights": init.weights, "head": init.head, "digest": _digest(loaded.state_dict)},
        description=(f"begins with the weights of {where}, with {head}", *loaded.description[1:]),
    )


def _of_file(path: Path) -> WeightsFile:
    try:
        return open_weights(path)
    except WeightsError as error:
        raise WeightsError(f"init.path: {error}") from error


def _of_run(run: _Run, init: InitConfig) -> WeightsFile:
    state = read_parameters(run.checkpoint, weights_kind(run.checkpoint, Weights(init.weights)))
    source = checkpoint_weights(run.checkpoint, state, run.model, run.image_hw)
    if (names := run.checkpoint.content["classes"]) is None:
        return source
    return dataclasses.replace(source, metadata={**source.metadata, "classes": json.dumps(names)})


def _check_arithmetic(source: WeightsFile, model: ModelConfig) -> None:
    """The weights would be taken, and mean nothing."""
    trained = dict(source.implied)
    if (told := told_model(source.metadata)) is not None:
        trained = {key: getattr(told, key) for key in ARITHMETIC}
    other = {key: value for key, value in trained.items() if getattr(model, key) != value}
    if other:
        wanted = " ".join(f"model.{key}={json.dumps(value).strip(chr(34))}" for key, value in other.items())
        given = ", ".join(f"model.{key} {getattr(model, key)}" for key in other)
        raise ConfigError(
            f"init.path: {source.path} was trained with another arithmetic than the configuration's {given}; "
            f"set {wanted}"
        )


def _check_hidden(source: WeightsFile, init: InitConfig, model: ModelConfig, *, has: bool) -> None:
    """The hidden layer before the head; ``has`` tells whether the model has one."""
    if has and init.pre_logits == "drop":
        raise ConfigError(
            "init.pre_logits: drop leaves out the hidden layer before the head, but the model has one; set "
            "model.representation_layer=false (ViT paper, section 3.2), or init.pre_logits=keep"
        )
    stored = Translated(source).has(_HIDDEN)
    if init.pre_logits == "keep" and stored != has:
        shown = "holds a hidden layer before the head, but the model has none" if stored else "holds no hidden layer"
        raise ConfigError(
            f"init.pre_logits: keep, but {source.path} {shown}; set model.representation_layer="
            f"{str(stored).lower()}, or init.pre_logits=drop with model.representation_layer=false"
        )


def _check_head(source: WeightsFile, model: ModelConfig, classes: Sequence[str] | None) -> None:
    """A head that is kept has the classes of the training data."""
    file = Translated(source)
    if not file.has(_HEAD):
        raise ConfigError(f"init.head: keep, but {source.path} holds no head; set init.head=new")
    outputs = file.shape(_HEAD)[0]
    if outputs != model.num_classes:
        raise ConfigError(
            f"init.head: keep, but the head of {source.path} is for {outputs} classes and model.num_classes is "
            f"{model.num_classes}; set init.head=new for a new one, or model.num_classes={outputs}"
        )
    for label, (ours, theirs) in enumerate(zip(classes or (), _told_classes(source), strict=False)):
        if ours != theirs:
            raise ConfigError(
                f"init.head: keep, but label {label} of the training data is {ours!r}, and {theirs!r} in "
                f"{source.path}; set init.head=new, or train on a set with the same classes"
            )


def _told_classes(source: WeightsFile) -> list[str]:
    """Names of the head's outputs; none if they are not told by a file of our own."""
    try:
        told = json.loads(source.metadata.get("classes", "null"))
    except ValueError:
        return []
    return told if isinstance(told, list) else []


def _by_keys(message: str) -> str:
    """What the reader of a file says, without advice on commands that convert files."""
    lines = [line for line in message.splitlines() if "vitscale weights convert" not in line]
    return "\n".join(lines).replace("--resize ", "init.resize=")


def _digest(state: dict[str, Tensor]) -> str:
    digests = {MASTER: 0}
    for name, values in state.items():
        add_digest(digests, name, MASTER, 0, values.float().contiguous().flatten())
    return f"{digests[MASTER]:016x}"

"""One fine-tuning as a job: the configuration it runs with, and what it leaves behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitscale.config.loader import parse_section
from vitscale.config.reference import dump_config
from vitscale.config.schema import StorageConfig, TrainConfig
from vitscale.config.section import section
from vitscale.durable import publish_text
from vitscale.errors import DivergenceError
from vitscale.models.shapes import resolve_shape
from vitscale.plan import accumulation_steps
from vitscale.studies.jobs import CommandError, Result, Workplace
from vitscale.train.recipes import Recipe
from vitscale.train.records import CHECKPOINTS_REMOVED

Keys = dict[str, Any]
"""Dotted keys of a training configuration and their values: ``{"optim.lr": 0.003, "duration": {"steps": 500}}``."""

CHOSEN = {
    "run": "each has a folder of its own",
    "seed": "set seeds",
    "optim.lr": "set the learning rate of the dataset",
    "data.train": "set train",
    "data.image_size": "set image_size, from which the crops follow",
    "init": "the models are named apart",
    "model.num_classes": "set num_classes of the dataset",
    "model.head": "a new linear one takes its place",
    "checkpoint.folder": "each has a folder of its own",
}
"""Keys that a fine-tuning gets from elsewhere, and from where."""


def refuse_chosen(overrides: Mapping[str, Any], chosen: Mapping[str, str], where: str) -> None:
    """See that a user's keys leave alone what follows from other keys.

    Raises:
        ValueError: one of them, or the section that it lies in, is among them.
    """
    for key in overrides:
        for own, cure in chosen.items():
            if key == own or key.startswith(f"{own}.") or own.startswith(f"{key}."):
                inner = "" if key == own else f", where {own} stands; write the other keys of {key} one by one"
                raise ValueError(f"{where}: {key} cannot be given here{inner}: {cure}")


def as_overrides(*layers: Mapping[str, Any]) -> list[str]:
    """Keys as on the command line, ``optim.lr=0.003``; those of later layers go over those of earlier ones."""
    # JSON is YAML, so the values come back as they were.
    return [f"{key}={json.dumps(value)}" for layer in layers for key, value in layer.items()]


@section
class _DataKeys:
    storage: StorageConfig = StorageConfig()


def storage_of(*layers: Mapping[str, Any]) -> StorageConfig:
    """How shards are read, from the keys of a configuration that is not complete yet.

    Raises:
        ConfigError: with every mistake in these keys.
    """
    named = {key: value for layer in layers for key, value in layer.items() if key.startswith("data.storage")}
    words = [word.removeprefix("data.") for word in as_overrides(named)]
    return parse_section(_DataKeys, "{}", "overrides", words).storage


def fine_tuning_config(
    recipe: Recipe,
    *,
    run: Path,
    seed: int,
    lr: float,
    train: str,
    model: Mapping[str, Any],
    init: Mapping[str, Any],
    overrides: Mapping[str, Any],
    nproc: int | None,
    origin: str,
) -> TrainConfig:
    """The configuration of a fine-tuning, checked as far as it can be without its data.

    Args:
        recipe: for the dataset.
        run: folder to train in.
        seed: of the order and the augmentation.
        lr: peak learning rate.
        train: shard set.
        model: keys of the model section.
        init: keys of the init section.
        overrides: the user's keys, which go over all of these.
        nproc: ranks, one by default.
        origin: stands for the file name in messages.

    Raises:
        ConfigError: with every mistake.
        TopologyError: the ranks cannot share the batch.
    """
    keys = {
        "run": str(run),
        "seed": seed,
        **recipe.keys,
        "optim.lr": lr,
        "data.train": train,
        "model": dict(model),
        "init": dict(init),
    }
    config = parse_section(TrainConfig, "{}", origin, as_overrides(keys, overrides))
    resolve_shape(config.model, config.data.image_hw)
    accumulation_steps(config, nproc or 1)
    return config


@dataclass(frozen=True)
class Training:
    """A training run within a job, resumed where it stopped."""

    config: TrainConfig
    nproc: int | None
    """Ranks to start on this machine."""

    def run(self, place: Workplace) -> None:
        """Train to the end.

        Raises:
            Interrupted, CommandError: as :meth:`Workplace.vitscale`.
        """
        path = place.folder / f"{self.config.run.name}.yaml"
        publish_text(path, dump_config(self.config))
        place.vitscale("train", str(path), *ranks_option(self.nproc))

    def remove_checkpoints(self) -> None:
        """They are of no use once the scores are known. The records stay."""
        (self.config.run / CHECKPOINTS_REMOVED).touch()
        shutil.rmtree(self.config.run / "checkpoints", ignore_errors=True)

    def accuracy(self, place: Workplace, test: str) -> float:
        """Of the trained model on a shard set, in percent: what ``vitscale evaluate`` says."""
        weights = () if self.config.optim.ema_decay is None else ("--weights", "ema")
        told = place.vitscale("evaluate", str(self.config.run), "--data", test, *weights, *ranks_option(self.nproc))
        return accuracy(json.loads(told.splitlines()[-1]))


def accuracy(told: Result) -> float:
    """Percent, of what an evaluation tells: top-1, or how often one of several acceptable labels is hit."""
    return 100.0 * float(told["real_top1"] if "real_top1" in told else told["top1"])


def diverged(error: CommandError) -> bool:
    """Whether a training was given up because its numbers were not finite, which is a result, too."""
    return error.exit_code == DivergenceError.exit_code


def ranks_option(nproc: int | None) -> tuple[str, ...]:
    """``--nproc`` as arguments."""
    return () if nproc is None else ("--nproc", str(nproc))

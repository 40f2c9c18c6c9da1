"""One fine-tuning as a job: the configuration it runs with, and what it leaves behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitscale.config.loader import parse_section
from vitscale.config.reference import dump_config
from vitscale.config.schema import TrainConfig
from vitscale.durable import publish_text
from vitscale.errors import DivergenceError
from vitscale.studies.jobs import CommandError, Result, Workplace

Keys = dict[str, Any]
"""Dotted keys of a training configuration and their values: ``{"optim.lr": 0.003, "duration": {"steps": 500}}``."""


def as_overrides(*layers: Mapping[str, Any]) -> list[str]:
    """Keys as on the command line, ``optim.lr=0.003``; those of later layers go over those of earlier ones."""
    # JSON is YAML, so the values come back as they were.
    return [f"{key}={json.dumps(value)}" for layer in layers for key, value in layer.items()]


def compose(*layers: Mapping[str, Any], origin: str) -> TrainConfig:
    """A training configuration from layers of keys.

    Args:
        layers: later ones go over earlier ones.
        origin: stands for the file name in messages.

    Raises:
        ConfigError: with every mistake.
    """
    return parse_section(TrainConfig, "{}", origin, as_overrides(*layers))


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

    def forget(self) -> None:
        """Remove the checkpoints, which nobody needs once the scores are known. The records stay."""
        shutil.rmtree(self.config.run / "checkpoints", ignore_errors=True)


def diverged(error: CommandError) -> bool:
    """Whether a training was given up because its numbers were not finite: a result, in a search of learning rates."""
    return error.exit_code == DivergenceError.exit_code


def score(place: Workplace, training: Training, test: str) -> Result:
    """Accuracy of the trained model on a shard set: what ``vitscale evaluate`` says, as percentages where it says
    shares."""
    weights = () if training.config.optim.ema_decay is None else ("--weights", "ema")
    told = place.vitscale("evaluate", str(training.config.run), "--data", test, *weights, *ranks_option(training.nproc))
    result: Result = json.loads(told.splitlines()[-1])
    return result


def ranks_option(nproc: int | None) -> tuple[str, ...]:
    """``--nproc`` as arguments."""
    return () if nproc is None else ("--nproc", str(nproc))

"""The configuration as folders keep it: the same from anywhere, and its passwords for its owner alone. No torch."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from vitscale.config.evaluators import AccuracyEvaluator, Evaluator
from vitscale.config.reference import dump_config
from vitscale.config.schema import TrainConfig
from vitscale.data.storage.drivers import without_secrets
from vitscale.data.storage.files import absolute
from vitscale.durable import published


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The same configuration, seen from any folder."""
    train, held_out, cache = config.data.train, config.data.eval, config.data.storage.cache
    data = dataclasses.replace(
        config.data,
        train=absolute(train) if isinstance(train, str) else {absolute(key): weight for key, weight in train.items()},
        eval=held_out and absolute(held_out),
        storage=dataclasses.replace(config.data.storage, cache=cache and cache.absolute()),
    )
    folder, weights = config.checkpoint.folder, config.init.path
    evaluators = {name: _absolute_sets(evaluator) for name, evaluator in config.evaluation.evaluators.items()}
    return dataclasses.replace(
        config,
        run=config.run.absolute(),
        data=data,
        init=dataclasses.replace(config.init, path=weights and weights.absolute()),
        checkpoint=dataclasses.replace(config.checkpoint, folder=folder and absolute(folder)),
        evaluation=dataclasses.replace(config.evaluation, evaluators=evaluators),
    )


def _absolute_sets(evaluator: Evaluator) -> Evaluator:
    if isinstance(evaluator, AccuracyEvaluator):
        return dataclasses.replace(evaluator, data=absolute(evaluator.data))
    return dataclasses.replace(evaluator, train=absolute(evaluator.train), test=absolute(evaluator.test))


def publish_config(path: Path, config: TrainConfig) -> None:
    """Write a configuration with all its defaults, for the owner alone if it holds passwords or signatures.

    Raises:
        OSError: it cannot be written.
    """
    text = dump_config(config)
    with published(path) as file:
        if without_secrets(text) != text:
            # Before the first byte, so that no other user can ever read it.
            os.fchmod(file.fileno(), 0o600)
        file.write(text.encode())

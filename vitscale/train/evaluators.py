"""Further evaluations during training, each with a name and a cadence of its own (evaluation.evaluators)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vitscale.checkpoint.state import TrainState
from vitscale.config.duration import is_due
from vitscale.config.evaluators import AccuracyEvaluator, Evaluator
from vitscale.config.schema import TrainConfig
from vitscale.data.manifest import Manifest
from vitscale.distributed import Ranks
from vitscale.errors import ConfigError, DataError
from vitscale.evaluation.accuracy import evaluation_batches, head_accuracy, open_labelled_set
from vitscale.evaluation.evaluators import evaluate_features, open_feature_sets
from vitscale.evaluation.features import Features, extract_features
from vitscale.plan import RunPlan
from vitscale.train.engine import model_input
from vitscale.train.metrics import MetricLog


@dataclass(frozen=True)
class NamedEvaluator:
    """One of them, ready."""

    name: str
    settings: Evaluator
    every: int | None
    """Steps between two evaluations; None evaluates after the last step only."""
    sets: tuple[Manifest, ...]


def open_evaluators(config: TrainConfig, plan: RunPlan, classes: Sequence[str] | None) -> list[NamedEvaluator]:
    """Open their shard sets.

    Args:
        config: names them.
        plan: tells the length of a run.
        classes: of the training set.

    Raises:
        DataError: a set cannot be used.
        ConfigError: a cadence comes to no step.
    """
    found = []
    for name, settings in config.evaluation.evaluators.items():
        sets: tuple[Manifest, ...]
        if isinstance(settings, AccuracyEvaluator):
            sets = (open_labelled_set(settings.data, config.data.storage, config.model.num_classes, classes),)
        else:
            sets = open_feature_sets(settings, config.data.storage)
        found.append(NamedEvaluator(name, settings, _steps(name, settings, plan), sets))
    return found


def _steps(name: str, settings: Evaluator, plan: RunPlan) -> int | None:
    if settings.every is None:
        return None
    steps = settings.every.to_steps(
        global_batch_size=plan.global_batch_size, num_samples=plan.num_samples, total_steps=plan.total_steps
    )
    if steps < 1:
        raise ConfigError(
            f"evaluation.evaluators.{name}.every: {settings.every} comes to no step at {plan.global_batch_size} images "
            f"per step and {plan.num_samples} images per epoch; give it in steps, or make it longer"
        )
    return steps


def is_evaluation_due(step: int, every: int | None, total_steps: int) -> bool:
    """After the last step always, before that at the cadence, but not shortly before the last step."""
    # There, it would tell nothing new.
    near_the_end = 4 * (total_steps - step) < (every or 0)
    return step == total_steps or (is_due(step, every) and not near_the_end)


def due_evaluators(
    evaluators: Sequence[NamedEvaluator], state: TrainState, plan: RunPlan, log: MetricLog
) -> list[NamedEvaluator]:
    """Those that are to run after a step; each once for a step, also across attempts. The same on every rank."""
    return [
        each
        for each in evaluators
        if is_evaluation_due(state.step, each.every, plan.total_steps)
        and not log.was_evaluated(state.step, mark=_mark(each.name))
    ]


def run_evaluators(
    engine: Any,
    config: TrainConfig,
    due: Sequence[NamedEvaluator],
    state: TrainState,
    log: MetricLog,
    ranks: Ranks,
    is_stopping: Callable[[], bool],
) -> bool:
    """Evaluate and record, one after another. Collective.

    Sets that several of them name are gone through once.

    Returns:
        Whether a stop was requested meanwhile, on all ranks alike.
    """
    features: dict[tuple[str, str], Features] = {}

    def features_of(manifest: Manifest) -> Features | None:
        key = (manifest.shown, manifest.digest)
        if key not in features:
            with representing(engine):
                found = extract_features(
                    lambda images: engine(model_input(images, engine)),
                    evaluation_batches(
                        manifest, config.data, num_classes=None, batch_size=config.micro_batch_size, ranks=ranks
                    ),
                    ranks=ranks,
                    is_stopping=is_stopping,
                )
            if found is None:
                return None
            features[key] = found
        return features[key]

    engine.eval()
    for each in due:
        start = time.perf_counter()
        results: dict[str, Any] | None
        try:
            if isinstance(each.settings, AccuracyEvaluator):
                accuracy = head_accuracy(
                    lambda images: engine(model_input(images, engine)),
                    each.sets[0],
                    config.data,
                    num_classes=config.model.num_classes,
                    batch_size=config.micro_batch_size,
                    ranks=ranks,
                    is_stopping=is_stopping,
                )
                results = None if accuracy is None else dict(accuracy.to_json())
            else:
                train_set, test_set = each.sets
                results = evaluate_features(
                    each.settings, (train_set, test_set), features_of, ranks=ranks, is_stopping=is_stopping
                )
        except DataError as error:
            # Not worth a run: sets that are too small for what is asked of them. What one rank meets alone is.
            if not error.agreed:
                raise
            results = {"images": 0, "error": str(error)}
        if results is None:
            engine.train()
            return True
        log.evaluator(state, each.name, results, time.perf_counter() - start)
    engine.train()
    return False


@contextmanager
def representing(engine: Any) -> Iterator[None]:
    """Let the engine give representations [B, D] instead of logits for the length of a ``with`` block.

    Through the engine's own forward pass, by which ZeRO 3 gathers the parameters.
    """
    module = engine.module
    module.forward = module.representation
    try:
        yield
    finally:
        del module.forward


def _mark(name: str) -> str:
    """A key that each record of an evaluator has."""
    return f"{name}/images"

"""What a run evaluates: data.eval, and evaluations with a name and a cadence of their own (evaluation.evaluators)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vitscale.checkpoint.state import TrainState
from vitscale.config.duration import is_due
from vitscale.config.evaluators import AccuracyEvaluator, Evaluator
from vitscale.config.schema import TrainConfig
from vitscale.data.manifest import Manifest
from vitscale.data.mixing import Mixture
from vitscale.data.shard_set import open_evaluation_set
from vitscale.distributed import Ranks
from vitscale.errors import ConfigError, DataError
from vitscale.evaluation.accuracy import evaluation_batches, head_accuracy, open_labelled_set
from vitscale.evaluation.evaluators import evaluate_features, open_feature_sets
from vitscale.evaluation.features import Features, extract_features
from vitscale.plan import RunPlan
from vitscale.train.engine import model_input
from vitscale.train.metrics import MetricLog


@dataclass(frozen=True)
class RunEvaluator:
    """One evaluation of a run, ready."""

    name: str | None
    """None for that on data.eval."""
    settings: Evaluator
    every: int | None
    """Steps between two evaluations; None evaluates after the last step only."""
    sets: tuple[Manifest, ...]

    @property
    def mark(self) -> str:
        """A key that each of its records has, and no other."""
        return "eval_top1" if self.name is None else f"{self.name}/images"


def open_evaluators(config: TrainConfig, plan: RunPlan, train_set: Mixture) -> list[RunEvaluator]:
    """Open the shard sets of a run's evaluations, data.eval first. Labels must mean what they mean in training.

    Raises:
        DataError: a set cannot be used.
        ConfigError: a cadence comes to no step.
    """
    storage, num_classes, classes = config.data.storage, config.model.num_classes, train_set.classes
    found = []
    if config.data.eval is not None:
        held_out = open_evaluation_set(config.data.eval, storage, num_classes=num_classes, classes=classes)
        settings: Evaluator = AccuracyEvaluator(data=config.data.eval)
        found.append(RunEvaluator(None, settings, plan.evaluate_every, (held_out,)))
    for name, settings in config.evaluation.evaluators.items():
        sets: tuple[Manifest, ...]
        if isinstance(settings, AccuracyEvaluator):
            sets = (open_labelled_set(settings.data, storage, num_classes, classes),)
        else:
            sets = open_feature_sets(settings, storage)
        found.append(RunEvaluator(name, settings, _steps(name, settings, plan), sets))
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
    evaluators: list[RunEvaluator], state: TrainState, plan: RunPlan, log: MetricLog
) -> list[RunEvaluator]:
    """Those that are to run after a step; each once for a step, also across attempts. The same on every rank."""
    return [
        each
        for each in evaluators
        if is_evaluation_due(state.step, each.every, plan.total_steps)
        and not log.was_evaluated(state.step, mark=each.mark)
    ]


def run_evaluators(
    engine: Any,
    config: TrainConfig,
    due: list[RunEvaluator],
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

    def outputs(images: Any) -> Any:
        return engine(model_input(images, engine))

    def features_of(manifest: Manifest) -> Features | None:
        key = (manifest.shown, manifest.digest)
        if key not in features:
            with representing(engine):
                batches = evaluation_batches(
                    manifest, config.data, num_classes=None, batch_size=config.micro_batch_size, ranks=ranks
                )
                found = extract_features(outputs, batches, ranks=ranks, is_stopping=is_stopping)
            if found is None:
                return None
            features[key] = found
        return features[key]

    def evaluate(each: RunEvaluator) -> dict[str, Any] | None:
        if isinstance(each.settings, AccuracyEvaluator):
            accuracy = head_accuracy(
                outputs,
                each.sets[0],
                config.data,
                num_classes=config.model.num_classes,
                batch_size=config.micro_batch_size,
                ranks=ranks,
                is_stopping=is_stopping,
            )
            return None if accuracy is None else dict(accuracy.to_json())
        train_set, test_set = each.sets
        return evaluate_features(
            each.settings, (train_set, test_set), features_of, ranks=ranks, is_stopping=is_stopping
        )

    engine.eval()
    try:
        for each in due:
            start = time.perf_counter()
            try:
                results = evaluate(each)
            except DataError as error:
                # Not worth a run: sets that are too small for what is asked of them. What one rank meets alone is, and
                # so is a data.eval of which nothing can be read.
                if each.name is None or not error.agreed:
                    raise
                results = {"images": 0, "error": str(error)}
            if results is None:
                return True
            log.evaluation(state, each.name, results, time.perf_counter() - start)
    finally:
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

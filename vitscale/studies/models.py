"""The pre-trained models that a study starts from."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitscale.checkpoint.choices import Weights
from vitscale.config.schema import ModelConfig
from vitscale.errors import ConfigError
from vitscale.evaluation.pretrained import describe_pretrained
from vitscale.studies.compute import compute_of, training_records
from vitscale.weights.told import model_text

# Families whose pre-training head has a hidden layer, which fine-tuning does without (ViT paper, section 3.2).
WITH_HIDDEN_LAYER = ("vit", "hybrid")
RECORDS = ("plan.json", "metrics.jsonl", "attempts.jsonl")


@dataclass(frozen=True)
class StartingPoint:
    """A pre-trained model."""

    name: str
    """Column of a table, and folder."""
    path: Path
    """Run folder or file of weights."""
    step: int | None
    """Of a run's checkpoint, so that all fine-tunings begin with the same one while the run goes on."""
    weights: Weights
    config: ModelConfig
    family: str
    digest: str
    """Of the weights' content."""
    device_days: float | None
    """Of its pre-training, where a run folder tells."""

    def model_keys(self, *, num_classes: int) -> dict[str, Any]:
        """Of the model section for fine-tuning on ``num_classes`` classes."""
        return fine_tuned_model(self.config, self.family, num_classes=num_classes)

    def init_keys(self, *, resize: str) -> dict[str, Any]:
        """Of the init section."""
        return init_keys(self.path, step=self.step, weights=self.weights, resize=resize)


def init_keys(path: Path, *, step: int | None, weights: Weights, resize: str) -> dict[str, Any]:
    """Keys of the init section for fine-tuning: a new head and no hidden layer before it.

    Args:
        path: run folder or file of weights.
        step: of a run's checkpoint, None for a file.
        weights: of a run.
        resize: mode for embeddings of another size.
    """
    keys = {"path": str(path), "resize": resize, "head": "new", "pre_logits": "drop"}
    of_run = {} if weights is Weights.RAW else {"weights": str(weights)}
    return {**keys, **of_run} if step is None else {**keys, **of_run, "step": step}


def fine_tuned_model(config: ModelConfig, family: str, *, num_classes: int) -> dict[str, Any]:
    """The model with one linear layer for its head and no dropout, as keys of a configuration's model section.

    Args:
        config: of the pre-trained model.
        family: of its variant.
        num_classes: of the new head.
    """
    plain = {"representation_layer": False} if family in WITH_HIDDEN_LAYER else {}
    changed = dataclasses.replace(
        config,
        num_classes=num_classes,
        head="classes",
        head_bias=0.0,
        dropout=0.0,
        stochastic_depth=0.0,
        **plain,  # type: ignore[arg-type]
    )
    keys: dict[str, Any] = json.loads(model_text(changed))
    return keys


def starting_points(
    locations: Sequence[Path], *, step: int | None = None, weights: Weights = Weights.RAW
) -> list[StartingPoint]:
    """What the models are, without reading their weights' values into memory.

    Args:
        locations: run folders or files of weights.
        step: checkpoint of a run, the newest by default; for a single model.
        weights: of runs.

    Raises:
        ConfigError: two of them have one name, or ``step`` is given for several.
        VitscaleError: one of them cannot be used.
    """
    if step is not None and len(locations) > 1:
        raise ConfigError(f"--step {step} is for a single model, and there are {len(locations)}; name one of them")
    found = [_starting_point(location, step, weights) for location in locations]
    names = [point.name for point in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"two models are called {twice[0]}, after their folders or files, and a table needs different names; "
            f"rename one, or name it through a link"
        )
    return found


def _starting_point(location: Path, step: int | None, weights: Weights) -> StartingPoint:
    told = describe_pretrained(location, step=step, weights=weights)
    has_records = all((location / name).is_file() for name in RECORDS) and bool(training_records(location))
    return StartingPoint(
        # A link keeps its own name.
        name=Path(os.path.normpath(location.absolute())).name.removesuffix(".safetensors"),
        path=location.resolve(),
        step=None if told.checkpoint is None else told.checkpoint.step,
        weights=weights,
        config=told.config,
        family=told.family,
        digest=told.digest,
        device_days=compute_of(location).device_days if has_records else None,
    )

"""The pre-trained models that a study starts from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitscale.config.schema import ModelConfig
from vitscale.errors import ConfigError
from vitscale.evaluation.pretrained import describe_pretrained
from vitscale.studies.compute import compute_of, training_records
from vitscale.weights.told import model_text

# Families whose pre-training head has a hidden layer, which fine-tuning does without (ViT paper, section 3.2).
WITH_HIDDEN_LAYER = ("vit", "hybrid")


@dataclass(frozen=True)
class StartingPoint:
    """A pre-trained model."""

    name: str
    """Column of a table, and folder."""
    path: Path
    """Run folder or file of weights."""
    config: ModelConfig
    family: str
    digest: str
    """Of the weights' content."""
    device_days: float | None
    """Of its pre-training, where a run folder tells."""

    def keys(self, *, num_classes: int) -> dict[str, Any]:
        """Of the model section for fine-tuning on ``num_classes`` classes."""
        return fine_tuned_model(self.config, self.family, num_classes=num_classes)


def fine_tuned_model(config: ModelConfig, family: str, *, num_classes: int) -> dict[str, Any]:
    """The model with one linear layer for its head, as keys of a configuration's model section.

    Args:
        config: of the pre-trained model.
        family: of its variant.
        num_classes: of the new head.
    """
    plain = {"representation_layer": False} if family in WITH_HIDDEN_LAYER else {}
    changed = dataclasses.replace(config, num_classes=num_classes, head="classes", head_bias=0.0, **plain)  # type: ignore[arg-type]
    keys: dict[str, Any] = json.loads(model_text(changed))
    return keys


def starting_points(locations: Sequence[Path]) -> list[StartingPoint]:
    """What the models are, without reading their weights' values into memory.

    Raises:
        ConfigError: two of them have one name.
        VitscaleError: one of them cannot be used.
    """
    found = [_starting_point(location) for location in locations]
    names = [point.name for point in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"two models are called {twice[0]}, after their folders or files, and a table needs different names; "
            f"rename one, or name it through a link"
        )
    return found


def _starting_point(location: Path) -> StartingPoint:
    told = describe_pretrained(location)
    is_run = (location / "metrics.jsonl").is_file() and bool(training_records(location))
    return StartingPoint(
        name=location.resolve().name.removesuffix(".safetensors"),
        path=location.resolve(),
        config=told.config,
        family=told.family,
        digest=told.digest,
        device_days=compute_of(location).device_days if is_run else None,
    )

"""Evaluations that a run may name for itself, and that commands make: what each kind of them listens to."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vitscale.config.bounds import NonNegative, Positive, Weight
from vitscale.config.duration import Duration
from vitscale.config.section import section

EvaluatorName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
"""It stands before the names of results, with a slash."""


@section
class AccuracyEvaluator:
    """Accuracy of the head on another shard set than data.eval, which may have several labels per image."""

    kind: Literal["accuracy"] = "accuracy"
    """Say accuracy."""
    data: str
    """The shard set; its labels mean the same as in training."""
    every: Duration | None = None
    """Distance between two evaluations; null evaluates after the last step only."""


@section
class FewshotEvaluator:
    """Few-shot linear accuracy of the frozen representation: ridge regression in closed form (ViT paper, section 4.1;
    big_vision's few-shot evaluator)."""

    kind: Literal["fewshot"] = "fewshot"
    """Say fewshot."""
    train: str
    """The shard set that shots are drawn from."""
    test: str
    """The shard set that is classified, with the same classes."""
    shots: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 5, 10, 25)
    """Images per class."""
    seeds: Positive = 3
    """Draws to average over."""
    ridge: Annotated[tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...], Field(min_length=1)] = (1024.0,)
    """Strengths of the penalty. Of several, each number of shots takes the best on training images that were not
    drawn."""
    every: Duration | None = None
    """Distance between two evaluations; null evaluates after the last step only."""


@section
class KnnEvaluator:
    """Accuracy of the nearest neighbours by the frozen representation: votes that are weighted by exp(cosine
    similarity / temperature) (DINO, arXiv 2104.14294)."""

    kind: Literal["knn"] = "knn"
    """Say knn."""
    train: str
    """The shard set of the neighbours."""
    test: str
    """The shard set that is classified, with the same classes."""
    k: Annotated[tuple[Positive, ...], Field(min_length=1)] = (10, 20)
    """Numbers of neighbours."""
    temperature: Weight = 0.07
    """What similarities are divided by."""
    every: Duration | None = None
    """Distance between two evaluations; null evaluates after the last step only."""


@section
class ProbeEvaluator:
    """Accuracy of a linear classifier that is trained on the frozen, standardised representation; cosine schedule, no
    augmentation. The learning rate is the best on a held-out part of the training set, which it then trains on too."""

    kind: Literal["probe"] = "probe"
    """Say probe."""
    train: str
    """The shard set to learn from."""
    test: str
    """The shard set that is classified, with the same classes."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd has momentum 0.9."""
    lr: Annotated[tuple[Weight, ...], Field(min_length=1)] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    """Learning rates to choose from; a single one is taken as it is."""
    epochs: Positive = 30
    """Passes over the training set."""
    batch_size: Positive = 256
    """Images per step."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of the kernel; torch's, so that adamw multiplies it by the learning rate."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the training images on which the learning rate is chosen."""
    seed: NonNegative = 0
    """Of the held-out part and of the order of images."""
    every: Duration | None = None
    """Distance between two evaluations; null evaluates after the last step only."""


FeatureEvaluator = FewshotEvaluator | KnnEvaluator | ProbeEvaluator
Evaluator = AccuracyEvaluator | FeatureEvaluator

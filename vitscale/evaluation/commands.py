"""What ``vitscale evaluate``, ``fewshot``, ``knn`` and ``probe`` do: load a model, go through sets, tell a result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from vitscale.config.evaluators import FeatureEvaluator
from vitscale.config.schema import EngineConfig
from vitscale.data.loader import Batch, Quarantined
from vitscale.data.manifest import Manifest
from vitscale.distributed import Ranks, connect
from vitscale.errors import ConfigError
from vitscale.evaluation.accuracy import evaluation_batches, head_accuracy, open_labelled_set
from vitscale.evaluation.choices import CacheChoice, ModelChoice, Reading
from vitscale.evaluation.confusion import check_confusion, write_confusion
from vitscale.evaluation.evaluators import evaluate_features, open_feature_sets
from vitscale.evaluation.feature_cache import identity_of, load_features, save_features
from vitscale.evaluation.features import Features, extract_features
from vitscale.evaluation.metrics import Accuracy
from vitscale.evaluation.pretrained import Pretrained, on_pixels, open_pretrained
from vitscale.evaluation.progress import progress
from vitscale.evaluation.unreadable import NAMED, check_readable, gather_unreadable
from vitscale.topology import Topology

# The run's own value is known only once its folder was read, which the connected ranks do together.
TIMEOUT_S = EngineConfig().timeout_s


def evaluate_model(
    choice: ModelChoice,
    data: str | None,
    *,
    reading: Reading,
    confusion: Path | None,
    topology: Topology,
) -> dict[str, Any] | None:
    """Accuracy of a model's head. Returns the result on rank 0, ``None`` elsewhere.

    Args:
        choice: of the model.
        data: shard set; by default the run's data.eval.
        reading: how it is gone through.
        confusion: picture of the confusion matrix to write, with an .npz beside it.
        topology: of this rank.

    Raises:
        VitscaleError: the model or the shard set cannot be used, or too many of its images.
    """
    with connect(topology, timeout_s=TIMEOUT_S) as ranks:
        pretrained = open_pretrained(choice, ranks)
        manifest = ranks.on_main(lambda: _labelled_set(pretrained, data))
        if confusion is not None:
            ranks.on_main(partial(check_confusion, confusion, pretrained.num_classes, multi_label=manifest.multi_label))
        faults: list[Quarantined] = []
        with _progress(f"images of {manifest.shown}", manifest, ranks) as advance:

            def note(batch: Batch) -> None:
                faults.extend(batch.quarantined)
                advance(len(batch.images) * ranks.world_size)

            accuracy = head_accuracy(
                on_pixels(pretrained.model, ranks),
                manifest,
                pretrained.data,
                num_classes=pretrained.num_classes,
                batch_size=reading.batch_size,
                ranks=ranks,
                confusion=confusion is not None,
                note=note,
            )
        assert accuracy is not None
        unreadable = gather_unreadable(ranks, faults)
        check_readable(manifest.shown, manifest.num_samples, unreadable, at_most=reading.max_unreadable)
        if confusion is not None and isinstance(accuracy, Accuracy) and accuracy.confusion is not None:
            draw = partial(write_confusion, confusion, accuracy.confusion, pretrained.classes or manifest.classes)
            ranks.on_main(partial(draw, title=f"{pretrained.name} on {manifest.shown}"))
    result = {**_told(pretrained), "data": manifest.shown, **accuracy.to_json(), **_told_unreadable(unreadable)}
    return result if topology.is_main else None


def judge_features(
    choice: ModelChoice,
    evaluator: FeatureEvaluator,
    *,
    reading: Reading,
    cache: CacheChoice,
    topology: Topology,
) -> dict[str, Any] | None:
    """Few-shot, nearest-neighbour or probe accuracy. Returns the result on rank 0, ``None`` elsewhere.

    Raises:
        VitscaleError: the model or a shard set cannot be used, or a class has too few images.
    """
    with connect(topology, timeout_s=TIMEOUT_S) as ranks:
        pretrained = open_pretrained(choice, ranks)
        sets = ranks.on_main(lambda: open_feature_sets(evaluator, pretrained.data.storage))
        folder = cache.folder_of(choice, is_run=pretrained.step is not None)
        unreadable: list[str] = []

        def features_of(manifest: Manifest) -> Features:
            found, bad = cached_features(pretrained, manifest, folder, reading=reading, ranks=ranks)
            unreadable.extend(bad)
            return found

        results = evaluate_features(evaluator, sets, features_of, ranks=ranks)
    assert results is not None
    train, test = (manifest.shown for manifest in sets)
    settings = {
        key: value
        for key, value in dataclasses.asdict(evaluator).items()
        if key not in ("kind", "train", "test", "every")
    }
    result = {
        **_told(pretrained),
        "train": train,
        "test": test,
        **{key: value[0] if isinstance(value, tuple) and len(value) == 1 else value for key, value in settings.items()},
        **results,
        **_told_unreadable(tuple(unreadable)),
    }
    return result if topology.is_main else None


def cached_features(
    pretrained: Pretrained, manifest: Manifest, folder: Path | None, *, reading: Reading, ranks: Ranks
) -> tuple[Features, tuple[str, ...]]:
    """Features of a set, from the folder if they are there, else made and put there. Collective.

    Returns:
        The features, all on rank 0 and none elsewhere, and on every rank the images that cannot be read.

    Raises:
        DataError: too many images cannot be read, or the folder holds features of something else under their name.
    """
    identity = identity_of(pretrained, manifest)
    kept: list[Features] = []

    def load() -> tuple[str, ...] | None:
        features = None if folder is None else load_features(folder, identity)
        kept.extend([] if features is None else [features])
        return None if features is None else features.unreadable

    unreadable = ranks.on_main(load)
    if unreadable is None:
        features = _extract(pretrained, manifest, reading, ranks)
        unreadable = ranks.on_main(lambda: features.unreadable)
        check_readable(manifest.shown, manifest.num_samples, unreadable, at_most=reading.max_unreadable)
        if folder is not None:
            ranks.on_main(partial(save_features, folder, identity, features))
        return features, unreadable
    check_readable(manifest.shown, manifest.num_samples, unreadable, at_most=reading.max_unreadable)
    return (kept[0] if kept else Features.none()), unreadable


def _extract(pretrained: Pretrained, manifest: Manifest, reading: Reading, ranks: Ranks) -> Features:
    batches = evaluation_batches(
        manifest, pretrained.data, num_classes=None, batch_size=reading.batch_size, ranks=ranks
    )
    representation_of: Callable[[Tensor], Tensor] = on_pixels(pretrained.model.representation, ranks)
    with _progress(f"features of {manifest.shown}", manifest, ranks) as advance:
        features = extract_features(
            representation_of, batches, ranks=ranks, advance=lambda images: advance(images * ranks.world_size)
        )
    assert features is not None
    return features


def _progress(what: str, manifest: Manifest, ranks: Ranks) -> AbstractContextManager[Callable[[int], None]]:
    return progress(what, manifest.num_samples, shown=ranks.is_main)


def _labelled_set(pretrained: Pretrained, data: str | None) -> Manifest:
    """The set that a head is judged on. Its labels must mean what the head's outputs do."""
    config = pretrained.config
    if config.label_classes is None:
        raise ConfigError(
            f"model.head {config.head} tells no classes, so there is no accuracy; measure the weights with "
            "vitscale fewshot"
        )
    location = data or pretrained.data.eval
    if location is None:
        lack = "the run has no data.eval" if pretrained.step is not None else "a file of weights tells no shard set"
        raise ConfigError(f"{lack}; name a shard set with --data")
    return open_labelled_set(location, pretrained.data.storage, config.num_classes, pretrained.classes)


def _told(pretrained: Pretrained) -> dict[str, Any]:
    """What a result says of the model."""
    told: dict[str, Any] = {"model": pretrained.name, "step": pretrained.step, "weights": str(pretrained.weights)}
    return told


def _told_unreadable(unreadable: tuple[str, ...]) -> dict[str, Any]:
    return {"unreadable_images": list(unreadable[:NAMED])} if unreadable else {}

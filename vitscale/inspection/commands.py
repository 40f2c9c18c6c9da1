"""What ``vitscale inspect`` does: pictures of one model, and the arrays behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitscale.checkpoint.choices import Weights
from vitscale.data.loader import value_range
from vitscale.durable import published
from vitscale.errors import ConfigError, DataError
from vitscale.evaluation.choices import ModelChoice, Reading
from vitscale.evaluation.image_sources import ImageSources, find_images
from vitscale.evaluation.one_process import one_process
from vitscale.evaluation.pretrained import Pretrained, open_pretrained
from vitscale.evaluation.progress import progress
from vitscale.evaluation.unreadable import check_readable
from vitscale.inspection import pictures
from vitscale.inspection.attention import AttentionWatch, ImageBatch
from vitscale.inspection.embeddings import filter_components, position_similarities
from vitscale.inspection.watch import Transformer
from vitscale.models.t2t import T2tVit
from vitscale.models.vit import VisionTransformer
from vitscale.topology import Topology

FOLDER = "inspection"
"""In a run folder, where nothing else is said."""


@dataclass
class Inspected:
    """What was drawn, what was not and why, and what went wrong with images."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    images: int = 0
    """That were looked at, unreadable ones included."""
    unreadable: list[str] = field(default_factory=list)


def inspect_model(
    choice: ModelChoice,
    images: Sequence[str],
    *,
    out: Path | None,
    num_images: int,
    overlays: int,
    reading: Reading,
    topology: Topology,
) -> Inspected:
    """Draw embedding filters, position similarities, attention distances and attention rollouts.

    Args:
        choice: of the model.
        images: what :func:`find_images` takes; by default the held-out set of the run.
        out: folder to write; by default one in the run folder, named by the step.
        num_images: that attention distances are averaged over, spread evenly over ``images``.
        overlays: images that a rollout is drawn of, evenly spread over the others.
        reading: how images are gone through.
        topology: of this process, which must be the only one.

    Raises:
        VitscaleError: the model is no transformer, or it, the images or the folder cannot be used, or too many images.
    """
    with one_process(topology, "inspect") as ranks:
        pretrained = open_pretrained(choice, ranks)
        network = _transformer(pretrained)
        # What cannot be used is told before anything is computed.
        sources = _images(images, pretrained)
        inspected = Inspected(_folder(choice.location, out, pretrained))
        _draw_weights(network, pretrained, inspected)
        if sources is None:
            inspected.left_out.append(
                "attention distance and rollout: there are no images; name some, or a shard set (the run has no "
                "data.eval)"
            )
            return inspected
        inspected.images = min(num_images, sources.num_images)
        watch = AttentionWatch(network, overlays=overlays, images=inspected.images)
        with progress("attention", inspected.images) as advance:
            for batch in sources.batches(pretrained.data, batch_size=reading.batch_size, at_most=num_images):
                inspected.unreadable += [f"{bad.name} ({bad.reason})" for bad in batch.unreadable]
                if batch.names:
                    watch.add(ImageBatch(batch.names, batch.images), value_range(batch.images.to(ranks.device)))
                advance(len(batch.names) + len(batch.unreadable))
        check_readable("attention", inspected.images, inspected.unreadable, at_most=reading.max_unreadable)
        _draw_attention(watch, pretrained, inspected, overlays=overlays)
    return inspected


def _transformer(pretrained: Pretrained) -> Transformer:
    if isinstance(pretrained.model, VisionTransformer | T2tVit):
        return pretrained.model
    raise ConfigError(
        f"{pretrained.config.variant} has no patches, positions or attention to look at; vitscale inspect takes "
        "ViT-*, its hybrids (R50+ViT-* ...) and T2T-ViT-*"
    )


def _folder(location: Path, out: Path | None, pretrained: Pretrained) -> Path:
    if out is None:
        if pretrained.step is None:
            raise ConfigError(f"{location} is a file, which has no folder for pictures; name one with --out")
        kind = "" if pretrained.weights is Weights.RAW else f"-{pretrained.weights}"
        out = location / FOLDER / f"step-{pretrained.step:09}{kind}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be made: {error.strerror or error}; choose another folder (--out)") from error
    return out


def _images(words: Sequence[str], pretrained: Pretrained) -> ImageSources | None:
    if not words and pretrained.data.eval is None:
        return None
    return find_images(words or [str(pretrained.data.eval)], pretrained.data.storage)


def _draw_weights(network: Transformer, pretrained: Pretrained, inspected: Inspected) -> None:
    title = _title(pretrained)
    filters = filter_components(network)
    _save(inspected, "filters", components=filters.components, explained=filters.explained)
    pictures.draw_filters(filters, title, _next(inspected, "filters"))
    similarities = position_similarities(network)
    for found in similarities:
        name = "position_similarity" + ("" if found.table == "input" else f"_{found.table}")
        _save(inspected, name, similarity=found.similarity)
        pictures.draw_positions(found, title, _next(inspected, name))
    if not similarities:
        inspected.left_out.append(
            f"similarity of position embeddings: with model.position {pretrained.config.position} no vectors are added"
        )


def _draw_attention(watch: AttentionWatch, pretrained: Pretrained, inspected: Inspected, *, overlays: int) -> None:
    title = _title(pretrained)
    distance = watch.distance()
    _save(
        inspected,
        "attention_distance",
        distance_px=distance.distance_px,
        entropy_nats=distance.entropy_nats,
        uniform_px=np.array(np.nan if distance.uniform_px is None else distance.uniform_px),
        layers=np.array(distance.layers),
        images=np.array(distance.images),
    )
    pictures.draw_distances(distance, title, _next(inspected, "attention_distance"))
    if overlays:
        rollout = watch.rollout()
        _save(inspected, "rollout", maps=rollout.maps, pixels=rollout.pixels, names=np.array(rollout.names))
        pictures.draw_rollout(rollout, title, _next(inspected, "rollout"))


def _title(pretrained: Pretrained) -> str:
    step = "" if pretrained.step is None else f", step {pretrained.step:,}"
    average = "" if pretrained.weights is Weights.RAW else f" ({pretrained.weights})"
    return f"{pretrained.config.variant}{step}{average}"


def _save(inspected: Inspected, name: str, **arrays: NDArray[np.generic]) -> None:
    path = inspected.folder / f"{name}.npz"
    with published(path) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    inspected.files.append(path)


def _next(inspected: Inspected, name: str) -> Path:
    path = inspected.folder / f"{name}.png"
    inspected.files.append(path)
    return path

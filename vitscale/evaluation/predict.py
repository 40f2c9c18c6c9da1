"""The most likely classes of images that a user names: what ``vitscale predict`` does.

B images of a batch, K classes, C classes that are told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vitscale.errors import ConfigError, DataError
from vitscale.evaluation.choices import ModelChoice
from vitscale.evaluation.image_sources import find_images
from vitscale.evaluation.names import output_names
from vitscale.evaluation.one_process import one_process
from vitscale.evaluation.pretrained import RUN_CONFIG, Pretrained, on_pixels, open_pretrained, read_run_config
from vitscale.evaluation.progress import progress
from vitscale.topology import Topology

Probabilities = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Guess:
    """One class of an image."""

    label: int
    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What the model says of an image, or why it could not be asked."""

    image: str
    """Path of the file, or key of the sample in its shard set."""
    guesses: tuple[Guess, ...] = ()
    """Most likely first."""
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for a line of JSON."""
        if self.error is not None:
            return {"image": self.image, "error": self.error}
        classes = [{"label": g.label, "name": g.name, "probability": g.probability} for g in self.guesses]
        return {"image": self.image, "classes": classes}


def predict_images(
    choice: ModelChoice,
    images: Sequence[str],
    *,
    tell: Callable[[Prediction], None],
    top: int,
    probabilities: Probabilities | None,
    class_names: Path | None,
    most_unreadable: int,
    batch_size: int,
    topology: Topology,
    show_progress: bool,
) -> None:
    """Classify images, in order; unreadable ones are told after the others of their batch.

    Args:
        choice: of the model.
        images: what :func:`find_images` takes.
        tell: is given every prediction.
        top: classes of each image, all of them if there are fewer.
        probabilities: how logits become probabilities; by default as the run was trained, of a file softmax.
        class_names: text file with a name on each line, where the model does not tell them.
        most_unreadable: images that may be unreadable before the rest is given up.
        batch_size: images per forward pass.
        topology: of this process, which must be the only one.
        show_progress: on standard error.

    Raises:
        VitscaleError: the model or the images cannot be used.
        DataError: at the end, if there were unreadable images; or once there are more than ``most_unreadable``.
    """
    with one_process(topology, "predict") as ranks:
        pretrained = open_pretrained(choice, ranks)
        if pretrained.config.label_classes is None:
            raise ConfigError(f"model.head {pretrained.config.head} tells no classes; take weights that do")
        names = _names(pretrained, class_names)
        kind = probabilities or _trained_with(choice.location)
        sources = find_images(images, pretrained.data.storage)
        logits_of = on_pixels(pretrained.model, ranks)
        unreadable: list[Prediction] = []
        with progress("predictions", sources.num_images, shown=show_progress) as advance:
            for batch in sources.batches(pretrained.data, batch_size=batch_size):
                with torch.inference_mode():
                    guesses = most_likely(logits_of(batch.images), names, kind, top) if batch.names else []
                for image, guess in zip(batch.names, guesses, strict=True):
                    tell(Prediction(image, guess))
                for bad in batch.unreadable:
                    unreadable.append(Prediction(bad.name, error=bad.reason))
                    tell(unreadable[-1])
                    if len(unreadable) > most_unreadable:
                        raise _unreadable(unreadable, f"more than {most_unreadable} (--most-unreadable); given up")
                advance(len(batch.names) + len(batch.unreadable))
        if unreadable:
            raise _unreadable(unreadable, f"of {sources.num_images} images; mend them or leave them out")


def most_likely(logits: Tensor, names: Sequence[str], kind: Probabilities, top: int) -> Iterator[tuple[Guess, ...]]:
    """The likeliest classes of each image of a batch, likeliest first.

    Args:
        logits: [B, K].
        names: of the K classes.
        kind: softmax: the classes exclude each other. sigmoid: each for itself.
        top: how many; all if there are fewer.
    """
    logits = logits.double()
    found = logits.softmax(dim=1) if kind == "softmax" else logits.sigmoid()
    values, labels = found.topk(min(top, logits.shape[1]), dim=1)  # [B, C]
    for of_image in zip(values.tolist(), labels.tolist(), strict=True):
        yield tuple(Guess(label, names[label], value) for value, label in zip(*of_image, strict=True))


def _names(pretrained: Pretrained, file: Path | None) -> Sequence[str]:
    if file is None:
        return output_names(pretrained.classes, pretrained.num_classes)
    try:
        names = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error}); a text file with a name on each line is needed") from error
    if len(names) != pretrained.num_classes:
        raise DataError(
            f"{file}: has {len(names)} lines, but the model tells {pretrained.num_classes} classes; one name on each "
            "line is needed, in the order of the labels"
        )
    return names


def _trained_with(location: Path) -> Probabilities:
    if (location / RUN_CONFIG).is_file():
        return "sigmoid" if read_run_config(location).loss.kind == "sigmoid" else "softmax"
    return "softmax"


def _unreadable(found: Sequence[Prediction], rest: str) -> DataError:
    return DataError(f"{len(found)} unreadable, the first being {found[0].image} ({found[0].error}): {rest}")

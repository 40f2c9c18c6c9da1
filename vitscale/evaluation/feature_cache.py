"""Features on disk, so that a model runs over a set once, whatever is asked of its features.

A file is found by all that its content depends on: the weights' content, the model, how images become pixels, and the
set's content. It tells all of it in its metadata too, with a checksum, so features of another checkpoint are never
taken, whatever a file is called.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vitscale.config.reference import dump_config
from vitscale.config.schema import DataConfig
from vitscale.data.manifest import Manifest
from vitscale.durable import published
from vitscale.errors import DataError
from vitscale.evaluation.features import Features
from vitscale.evaluation.pretrained import Pretrained
from vitscale.weights.told import model_text

logger = logging.getLogger(__name__)

FORMAT = "vitscale-features-1"
# How bytes arrive and what training does with them; anything else of the section may change an evaluation's pixels.
_NOT_SEEN = frozenset(
    {
        *("train", "eval", "crop", "crop_from", "crop_area", "crop_aspect", "flip"),
        *("window", "lanes", "workers", "processes", "prefetch_batches", "read_ahead_batches", "storage"),
        *("max_bad_samples", "max_bad_share"),
    }
)
_IDENTITY, _CHECKSUM, _UNREADABLE = "identity", "sha256", "unreadable"


@dataclass(frozen=True)
class Identity:
    """All that features depend on."""

    weights: str
    """Digest of their content."""
    model: str
    preprocessing: str
    data: str
    """Digest of the set's content; with its place, where that alone does not tell the content."""

    @property
    def file_name(self) -> str:
        """Of the features."""
        return f"{hashlib.sha256(self.to_text().encode()).hexdigest()[:32]}.safetensors"

    def to_text(self) -> str:
        """For the metadata."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def identity_of(pretrained: Pretrained, manifest: Manifest) -> Identity:
    """Of the features that a model makes of a set."""
    data = manifest.digest
    if any(shard.sha256 is None for shard in manifest.shards):
        data += f" {manifest.shown}"
    return Identity(
        weights=pretrained.digest,
        model=f"{model_text(pretrained.config)} {pretrained.image_hw}",
        preprocessing=preprocessing_text(pretrained.data),
        data=data,
    )


def preprocessing_text(data: DataConfig) -> str:
    """How an evaluation makes pixels of images."""
    return " ".join(line for line in dump_config(data).splitlines() if _is_seen(line))


def _is_seen(line: str) -> bool:
    # Lines of inner sections are indented, and there is none but of how bytes arrive.
    return not line.startswith(" ") and line.partition(":")[0] not in _NOT_SEEN


def load_features(folder: Path, identity: Identity) -> Features | None:
    """Features that were saved, or ``None`` if there are none, or damaged ones, of which a warning tells.

    Raises:
        DataError: the file is there but out of reach, or holds the features of something else.
    """
    path = folder / identity.file_name
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            values, labels = file.get_tensor("values"), file.get_tensor("labels")
        unreadable = tuple(str(each) for each in json.loads(metadata[_UNREADABLE]))
        whole = metadata[_CHECKSUM] == _checksum(values, labels, metadata[_IDENTITY], unreadable)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); remove it, or leave it out with --no-cache") from error
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        logger.warning("%s: damaged features (%s); they are made anew", path, error)
        return None
    if not whole:
        logger.warning("%s: damaged features (another checksum); they are made anew", path)
        return None
    if metadata[_IDENTITY] != identity.to_text():
        raise DataError(
            f"{path}: holds the features of {_difference(metadata[_IDENTITY], identity)}, under the name of others, so "
            f"it was renamed or copied; remove it"
        )
    return Features(values, labels, unreadable)


def save_features(folder: Path, identity: Identity, features: Features) -> None:
    """Save features for later. A folder that cannot be written is told in a warning."""
    told = identity.to_text()
    metadata = {
        "format": FORMAT,
        _IDENTITY: told,
        _CHECKSUM: _checksum(features.values, features.labels, told, features.unreadable),
        _UNREADABLE: json.dumps(features.unreadable),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with published(folder / identity.file_name) as file:
            file.write(save({"values": features.values, "labels": features.labels}, metadata))
    except OSError as error:
        logger.warning("%s: features are not kept: %s", folder, error.strerror or error)


def _checksum(
    values: np.ndarray[tuple[int, ...], np.dtype[np.floating]],
    labels: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    identity: str,
    unreadable: tuple[str, ...],
) -> str:
    digest = hashlib.sha256(json.dumps([identity, unreadable, values.shape, labels.shape]).encode())
    for array in (values, labels):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _difference(found: str, wanted: Identity) -> str:
    """The parts of an identity that are others."""
    told = json.loads(found)
    names = {"weights": "checkpoint", "model": "model", "preprocessing": "preprocessing", "data": "shard set"}
    return " and ".join(
        f"another {name} ({told.get(key)!s:.40})"
        for key, name in names.items()
        if told.get(key) != getattr(wanted, key)
    )

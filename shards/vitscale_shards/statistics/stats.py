"""What a shard set holds, in numbers: shards, labels, images, and how well it is shuffled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vitscale.data.manifest import INDEX_NAME, Manifest, ShardInfo
from vitscale.errors import DataError
from vitscale_shards.checking.samples import Part, SampleError, as_sample, content_of, read_parts
from vitscale_shards.checking.survey import read_idx_lines
from vitscale_shards.checking.whole_set import beside_index, read_index
from vitscale_shards.images import check_header
from vitscale_shards.parallel import in_order
from vitscale_shards.place import Place
from vitscale_shards.rows import BadImageError
from vitscale_shards.statistics.shuffle_quality import NO_LABEL, Labels, ShuffleQuality, measure_shuffle
from vitscale_shards.tar import key_of

MAX_IMAGES = 10_000
_VERIFY = "'vitscale shards verify' names all faults"
QUANTILES = {"min": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "max": 1.0}


@dataclass(frozen=True)
class Spread:
    """Smallest, mean and largest of some numbers."""

    min: float
    mean: float
    max: float


@dataclass(frozen=True)
class LabelStats:
    """Labels of all samples."""

    counts: dict[int, int]
    """Images by label, for the labels in use."""

    num_unlabelled: int
    """Images without any label."""

    num_classes: int | None
    """Classes that the index names, or None."""

    @property
    def num_labels(self) -> int:
        """Labels of all images together."""
        return sum(self.counts.values())

    @property
    def unused(self) -> list[int]:
        """Classes that the index names without an image of them."""
        return [label for label in range(self.num_classes or 0) if label not in self.counts]


@dataclass(frozen=True)
class ImageStats:
    """Images of a sample of the set; quantiles by the names in ``QUANTILES``."""

    num_images: int
    """How many were looked at, evenly spread over the set; all if there are few."""

    num_bad: int
    """How many of these have no readable header; they count nowhere below."""

    formats: dict[str, int]
    widths_px: dict[str, int]
    heights_px: dict[str, int]
    num_bytes: dict[str, int]
    short_sides_px: list[int]
    """Of each image, to draw a histogram."""


@dataclass(frozen=True)
class SetStats:
    """What :func:`gather_stats` finds."""

    url: str
    split: str
    source: str
    num_samples: int
    num_shards: int
    num_bytes: int
    shard_samples: Spread
    shard_bytes: Spread
    multi_label: bool
    classes: tuple[str, ...] | None
    labels: LabelStats
    images: ImageStats
    shuffle: ShuffleQuality | None

    def to_json(self) -> dict[str, Any]:
        """All of it but the lists that only histograms need, as JSON; ``counts`` is by label."""
        content = asdict(self)
        del content["images"]["short_sides_px"]
        content["labels"]["unused"] = self.labels.unused
        content["labels"]["num_labels"] = self.labels.num_labels
        if self.shuffle is not None:
            content["shuffle"]["is_clumped"] = self.shuffle.is_clumped
        return content


class _Image(NamedTuple):
    extension: str
    width_px: int
    height_px: int
    num_bytes: int


@dataclass(frozen=True)
class _ShardStats:
    first_labels: Labels
    labels: Counter[int]
    images: list[_Image | None]
    """Those looked at; None for a bad one."""


def gather_stats(
    place: Place,
    *,
    workers: int = 1,
    max_images: int = MAX_IMAGES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> SetStats:
    """Read the labels of all samples, and headers of images spread evenly over the set.

    Only labels and these images are read, by the ``.idx`` files. Memory is 4 bytes per sample.

    Args:
        workers: processes that share the tars.
        max_images: how many images to look at, at most.
        on_progress: is told samples read and samples to read after each tar.

    Raises:
        DataError: the set is not complete or a label is not readable; 'vitscale shards verify' names all faults.
    """
    manifest = beside_index(read_index(place), place)
    tasks = list(zip(manifest.shards, _spread_evenly(manifest, max_images), strict=True))
    first_labels: list[Labels] = []
    counts: Counter[int] = Counter()
    images: list[_Image | None] = []
    done = 0
    for shard in in_order(partial(_read_shard, place), tasks, workers):
        first_labels.append(shard.first_labels)
        counts.update(shard.labels)
        images += shard.images
        done += len(shard.first_labels)
        on_progress(done, manifest.num_samples)
    num_classes = None if manifest.classes is None else len(manifest.classes)
    if num_classes is not None and max(counts, default=0) >= num_classes:
        raise DataError(f"{place.url}: label {max(counts)} where the index names {num_classes} classes; {_VERIFY}")
    unlabelled = sum(int(np.count_nonzero(labels == NO_LABEL)) for labels in first_labels)
    return SetStats(
        url=place.url,
        split=manifest.split,
        source=manifest.source,
        num_samples=manifest.num_samples,
        num_shards=len(manifest.shards),
        num_bytes=manifest.num_bytes,
        shard_samples=_spread([shard.num_samples for shard in manifest.shards]),
        shard_bytes=_spread([shard.num_bytes for shard in manifest.shards]),
        multi_label=manifest.multi_label,
        classes=manifest.classes,
        labels=LabelStats(dict(sorted(counts.items())), unlabelled, num_classes),
        images=_image_stats(images),
        shuffle=measure_shuffle(first_labels),
    )


def _spread_evenly(manifest: Manifest, max_images: int) -> Iterator[list[int]]:
    """For every shard the positions of the samples whose images are looked at: the middles of equal stretches."""
    total = manifest.num_samples
    wanted = min(total, max_images)
    chosen = ((2 * i + 1) * total // (2 * wanted) for i in range(wanted))
    next_one = next(chosen, None)
    first = 0
    for shard in manifest.shards:
        positions = []
        while next_one is not None and next_one < first + shard.num_samples:
            positions.append(next_one - first)
            next_one = next(chosen, None)
        yield positions
        first += shard.num_samples


def _read_shard(place: Place, task: tuple[ShardInfo, list[int]]) -> _ShardStats:
    shard, positions = task
    result = _ShardStats(np.full(shard.num_samples, NO_LABEL), Counter(), [])
    looked_at = set(positions)
    sample = -1
    try:
        with place.open(shard.name) as file:
            for sample, members in enumerate(read_idx_lines(place, shard.name)):
                found = as_sample(key_of(members[0].name), [Part(member, None) for member in members])
                labels = replace(found, label=_read(file, found.label)).labels()
                if labels:
                    result.first_labels[sample] = labels[0]
                    result.labels.update(labels)
                if sample in looked_at:
                    result.images.append(_look_at(_read(file, found.image)))
    except (OSError, SampleError, DataError, ValueError, IndexError, OverflowError) as error:
        raise DataError(f"{place.url}/{shard.name}: sample {sample}: {error}; {_VERIFY}") from error
    if sample + 1 != shard.num_samples:
        raise DataError(
            f"{place.url}/{shard.idx_name}: lists {sample + 1} samples where {INDEX_NAME} says {shard.num_samples}; "
            f"{_VERIFY}"
        )
    return result


def _read(file: BinaryIO, part: Part) -> Part:
    """The same member, with its bytes."""
    return next(read_parts(file, [part.member], frozenset({part.member.extension.lower()})))


def _look_at(image: Part) -> _Image | None:
    try:
        content = content_of(image)
        extension, (width, height) = check_header(content)
    except (SampleError, BadImageError):
        return None  # counted as bad
    return _Image(extension, width, height, len(content))


def _spread(values: list[int]) -> Spread:
    return Spread(min(values), sum(values) / len(values), max(values))


def _image_stats(found: list[_Image | None]) -> ImageStats:
    images = [image for image in found if image is not None]
    return ImageStats(
        num_images=len(found),
        num_bad=len(found) - len(images),
        formats=dict(Counter(image.extension for image in images).most_common()),
        widths_px=_quantiles([image.width_px for image in images]),
        heights_px=_quantiles([image.height_px for image in images]),
        num_bytes=_quantiles([image.num_bytes for image in images]),
        short_sides_px=[min(image.width_px, image.height_px) for image in images],
    )


def _quantiles(values: list[int]) -> dict[str, int]:
    """Values that occur, none in between."""
    if not values:
        return {}
    found = np.quantile(values, list(QUANTILES.values()), method="nearest")
    return {name: int(value) for name, value in zip(QUANTILES, found, strict=True)}

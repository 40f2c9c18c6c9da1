"""Existing WebDataset tars, to be shuffled anew, merged, filtered or cut into other shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

from vitscale.data.manifest import INDEX_NAME, Member
from vitscale.data.stream import LABEL_EXTENSIONS
from vitscale.errors import DataError
from vitscale_shards.rows import BadImageError, Row, image_key
from vitscale_shards.sources.archive import ArchiveReader, first_members, place_of
from vitscale_shards.sources.folder import IMAGE_SUFFIXES
from vitscale_shards.sources.sample_labels import Labels, UnusableLabelError, parse_labels
from vitscale_shards.sources.sample_tars import SampleTar, find_tars, is_pattern, sample_members
from vitscale_shards.tar import extension_of, key_of

_MAX_LABEL_BYTES = 1 << 20
_TRIES = 100_000  # samples without a label after which it is clear that the set has none
_MAX_LABEL = (1 << 31) - 1  # a plan holds 32 bits


class _Sample(NamedTuple):
    tar: SampleTar
    key: str
    image: Member
    labels: Labels


class WebDatasetTars:
    """Tars whose neighbouring members with one key are a sample: an image and its label.

    The label is ``cls`` (a whole number, or the name of a class) or ``json`` (``label``: a number or a name, or
    ``labels``: a list of them); of both, ``cls`` counts, unless an index says that labels are lists. All samples of a
    set have the same kind of label. A tar that an ``index.json`` beside it lists is read through its ``.idx``; others
    are walked header by header.
    """

    def __init__(self, location: str, classes: Sequence[str] | None = None, *, prefix_keys: bool = False) -> None:
        """Nothing is listed yet.

        Args:
            location: a folder of tars, a tar, or a pattern such as ``/data/{a,b}/train-{000..099}.tar`` or
                ``/data/*.tar``.
            classes: class names in the order of their labels. By default those of the index; without an index, the
                sorted names if labels are names, and none if they are numbers. If tars have an index with other
                classes, their labels are translated by name.
            prefix_keys: put the tar's name before each key, for sets whose keys start anew in each tar.

        Raises:
            DataError: there is nothing at ``location``, or it is not on a file system.
        """
        self.location = location
        self.ignored: Counter[str] = Counter()
        self._given = None if classes is None else tuple(classes)
        self._prefix_keys = prefix_keys
        self._reader = ArchiveReader()
        if "://" in location or location.startswith("pipe:"):
            raise DataError(f"{location}: is not on a file system; copy the tars to a folder, or mount the storage")
        if not is_pattern(location) and not Path(location).exists():
            raise DataError(f"{location}: no such file; a folder of tars, a tar or a pattern of tars is needed")

    @cached_property
    def name(self) -> str:
        """Name of the folder, or of the one tar."""
        only = Path(self.location)
        return only.stem if only.is_file() else self._found[0].resolve().name

    @cached_property
    def classes(self) -> tuple[str, ...] | None:
        """Class names, if they are known. Without an index, labels that are names take a pass over all of them.

        Raises:
            DataError: indexes name different classes, or see :meth:`rows`.
        """
        if self._given is not None:
            return self._given
        named = {tar.classes: tar for tar in self._tars.values()}
        if len(named) > 1:
            one, other = (tar.file for tar in islice(named.values(), 2))
            raise DataError(
                f"{self.location}: {one} and {other} have different classes by the indexes beside them; give the list "
                f"of all classes, and labels are translated by name"
            )
        classes = next(iter(named))
        if classes is None and self._first.labels.are_names:
            return tuple(sorted({str(v) for sample in self._samples(Counter()) for v in sample.labels.values}))
        return classes

    @property
    def multi_label(self) -> bool:
        """Whether labels are lists; the index or the first sample says it.

        Raises:
            DataError: see :meth:`rows`.
        """
        return self._first.labels.multi

    def rows(self) -> Iterator[Row]:
        """Samples in the order of the tars and their members. Labels are read, images are not.

        Samples without an image or a label are counted in ``ignored``, as are members that are neither.

        Raises:
            DataError: no tar, no sample with image and label, a tar that is compressed or damaged or does not fit its
                index, a label that is not among the classes, or labels of several kinds.
        """
        positions = None if self.classes is None else {name: label for label, name in enumerate(self.classes)}
        first = self._first
        self.ignored.clear()
        for sample in self._samples(self.ignored):
            self._check_kind(sample, first)
            labels = tuple(self._label(value, sample, positions) for value in sample.labels.values)
            place = f"{sample.tar.name}:{place_of(sample.image.name, sample.image.offset, sample.image.size)}"
            yield Row(self._key(sample), labels, place, sample.image.size)

    def read(self, row: Row) -> bytes:
        """The member's bytes.

        Raises:
            BadImageError: they cannot be read, or the tar has changed.
        """
        name, _, place = row.path.partition(".tar:")
        tar = self._tars.get(f"{name}.tar")
        if tar is None:
            raise BadImageError(f"{row.path!r} is in none of the {len(self._tars)} tars: plan the source again")
        return self._reader.read_member(tar.file, place)

    def _key(self, sample: _Sample) -> str:
        prefix = sample.tar.name.removesuffix(".tar") + "/" if self._prefix_keys else ""
        return image_key(f"{prefix}{sample.key}.{sample.image.extension}")

    @cached_property
    def _first(self) -> _Sample:
        """The first sample with image and label; others must be labelled in the same way."""
        ignored: Counter[str] = Counter()
        first: _Sample | None = None
        for tried, sample in enumerate(self._tried(ignored), 1):
            first = first or sample
            if sample and sample.labels.values:  # an empty list does not say whether labels are names
                return sample
            if first is None and tried >= _TRIES:
                break
        if first is None:
            found = ", ".join(f"{count} x {reason}" for reason, count in ignored.most_common(5)) or "no member"
            raise DataError(
                f"{self.location}: none of the first samples has an image and a label ({found}); members KEY.jpg (or "
                f"png, webp ...) and KEY.cls, or KEY.json with 'label' or 'labels', are needed"
            )
        return first

    def _check_kind(self, sample: _Sample, first: _Sample) -> None:
        # An empty list has values of no kind.
        if sample.labels.multi != first.labels.multi or (
            sample.labels.values and first.labels.values and sample.labels.are_names != first.labels.are_names
        ):
            raise DataError(
                f"{sample.tar.file}: sample {sample.key!r} has {sample.labels.kind}, but {first.key!r} has "
                f"{first.labels.kind}; all samples of a set must be labelled in one way: shard the tars separately"
            )

    def _label(self, value: int | str, sample: _Sample, positions: dict[str, int] | None) -> int:
        """Position of a label in :attr:`classes`."""
        theirs = sample.tar.classes
        if isinstance(value, int):
            known = theirs if theirs is not None else self.classes
            if value >= (_MAX_LABEL + 1 if known is None else len(known)):
                allowed = f"0 to {_MAX_LABEL if known is None else len(known) - 1}"
                raise DataError(
                    f"{sample.tar.file}: sample {sample.key!r} has label {value}; {allowed} are allowed: give the "
                    f"right list of classes"
                )
            if theirs is None or theirs == self.classes:
                return value
            value = theirs[value]
        if positions is None or value not in positions:
            raise DataError(
                f"{sample.tar.file}: sample {sample.key!r} is of class {value!r}, which is none of the "
                f"{len(positions or ())} known classes: add it to the list of classes, or exclude the sample"
            )
        return positions[value]

    def _samples(self, ignored: Counter[str]) -> Iterator[_Sample]:
        return (sample for sample in self._tried(ignored) if sample is not None)

    def _tried(self, ignored: Counter[str]) -> Iterator[_Sample | None]:
        for tar in self._tars.values():
            for group in sample_members(tar, ignored):
                yield self._sample(tar, group, ignored)

    def _sample(self, tar: SampleTar, group: list[Member], ignored: Counter[str]) -> _Sample | None:
        """Image and label of neighbouring members; None if one is missing, which is counted."""
        parts: dict[str, Member] = {}
        for member in group:
            if (extension := member.extension.lower()) in parts:
                raise DataError(
                    f"{tar.file}: {member.name} comes twice, at bytes {parts[extension].offset} and {member.offset}; "
                    f"a sample has each of its members once: write this tar again"
                )
            parts[extension] = member
        image = next((part for extension, part in parts.items() if f".{extension}" in IMAGE_SUFFIXES), None)
        order = LABEL_EXTENSIONS if not tar.multi_label else LABEL_EXTENSIONS[::-1]
        label = next((parts[extension] for extension in order if extension in parts), None)
        ignored.update(f".{extension}" for extension, part in parts.items() if part is not image and part is not label)
        if image is None or label is None:
            ignored["sample without " + ("image" if image is None else "label")] += 1
            return None
        try:
            return _Sample(tar, key_of(image.name), image, self._read_label(tar, label))
        except UnusableLabelError as error:
            ignored[f"sample {error}"] += 1
            return None

    def _read_label(self, tar: SampleTar, member: Member) -> Labels:
        if member.size > _MAX_LABEL_BYTES:
            raise UnusableLabelError(f"with a label of more than {_MAX_LABEL_BYTES} bytes")
        try:
            data = self._reader.read_member(tar.file, place_of(member.name, member.offset, member.size))
        except BadImageError as error:
            cure = "write the index again" if tar.indexed else "try again"
            raise DataError(f"{tar.file}: label {member.name}: {error}; {cure}") from error
        return parse_labels(member.extension.lower(), data)

    @property
    def _tars(self) -> dict[str, SampleTar]:
        """The tars by name, in order."""
        return self._found[1]

    @cached_property
    def _found(self) -> tuple[Path, dict[str, SampleTar]]:
        root, tars = find_tars(self.location)
        return root, {tar.name: tar for tar in tars}


def is_webdataset(location: str) -> bool:
    """Whether a location is a pattern of tars, or a folder with an index of tars, or holds an image with its label.

    Only the first members of the first tar are looked at; it may be compressed: to open it says what to do.
    """
    path = Path(location)
    if is_pattern(location):
        return location.endswith(".tar")
    if _has_shard_index(path):
        return True
    names = first_members(path)
    samples = [{extension_of(name).lower() for name in run} for _, run in groupby(names, key=key_of)]
    return any(s.intersection(LABEL_EXTENSIONS) and any(f".{e}" in IMAGE_SUFFIXES for e in s) for s in samples)


def _has_shard_index(folder: Path) -> bool:
    try:
        with (folder / INDEX_NAME).open("rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    return b'"wids' in head or b'"shardlist"' in head

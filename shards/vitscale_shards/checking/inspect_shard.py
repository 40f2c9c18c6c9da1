"""Read one tar of a shard set once and find what is wrong with its bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from vitscale.data.decode import BadSampleError, decode_image
from vitscale.data.manifest import IDX_VERSION, Member, format_idx_line
from vitscale.data.stream import IMAGE_EXTENSIONS, LABEL_EXTENSIONS
from vitscale_shards.checking.faults import FaultKind, SetFault
from vitscale_shards.checking.keys import Hashes, hash_keys
from vitscale_shards.checking.reading import DigestingReader
from vitscale_shards.checking.samples import (
    Part,
    Sample,
    SampleError,
    as_sample,
    content_of,
    group_samples,
    read_parts,
)
from vitscale_shards.checking.survey import idx_name_of
from vitscale_shards.images import MAX_PIXELS, check_header
from vitscale_shards.place import Place
from vitscale_shards.rows import MAX_KEY_CHARS, BadImageError
from vitscale_shards.tar import TarError, walk

MAX_FAULTS = 1000
_OUR_KEYS = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_KEY_CHARS}}}")
_READ = IMAGE_EXTENSIONS | set(LABEL_EXTENSIONS)


@dataclass(frozen=True)
class Rules:
    """What the samples of a set must be like."""

    num_classes: int | None = None
    """Labels are below this; None if the classes are not known."""

    multi_label: bool | None = None
    """Whether labels are in ``json`` members, or None if the index does not say."""

    ours: bool = False
    """Whether ``vitscale shards write`` made the set: it keeps stricter rules than the field does."""


@dataclass(frozen=True)
class Inspection:
    """What to look at in a tar."""

    name: str
    digest: bool
    """Whether to compute its checksum."""

    samples: bool
    """Whether to look into its members."""

    pixels: bool
    """Whether to decode every image in full."""

    idx: bool
    """Whether its ``.idx`` is there to be compared."""

    rules: Rules


@dataclass
class Findings:
    """What came out. ``num_samples`` is None if the tar could not be walked to its end."""

    name: str
    sha256: str | None = None
    num_samples: int | None = None
    keys: Hashes = field(default_factory=lambda: np.zeros(0, np.uint64))
    faults: list[SetFault] = field(default_factory=list)
    num_faults: int = 0

    def add(self, kind: FaultKind, offset: int | None, key: str | None, message: str, *, file: str = "") -> None:
        """Keep a fault, unless there are very many."""
        self.num_faults += 1
        if self.num_faults <= MAX_FAULTS:
            self.faults.append(SetFault(kind, file or self.name, offset, key, message))


def inspect_shard(place: Place, what: Inspection) -> Findings:
    """Read a tar from its beginning to its end; memory is that of its largest member, and of its keys."""
    findings = Findings(what.name)
    if not what.digest and not what.samples:
        return findings
    at = 0
    try:
        with place.open(what.name) as file:
            reader = DigestingReader(file)
            try:
                if what.samples:
                    _inspect_samples(place, what, reader, findings)
                if what.digest:
                    findings.sha256 = reader.sha256()
            finally:
                at = reader.num_digested
    except OSError as error:
        findings.add("tar", at, None, f"cannot be read: {error.strerror or error}")
    if findings.num_faults > MAX_FAULTS:
        message = f"{findings.num_faults - MAX_FAULTS} more faults in this tar"
        findings.faults.append(SetFault("sample", what.name, None, None, message))
    return findings


def _inspect_samples(place: Place, what: Inspection, file: BinaryIO, findings: Findings) -> None:
    keys: list[str] = []
    seen: set[str] = set()
    lines = _Lines(place, what.name) if what.idx else None
    try:
        for key, parts in group_samples(read_parts(file, walk(file), _READ)):
            if lines is not None:
                lines.compare([part.member for part in parts])
            if key in seen:
                reason = "the key stands for an earlier sample of this tar already; its members must be neighbours"
                findings.add("sample", parts[0].member.offset, key, reason)
            seen.add(key)
            keys.append(key)
            _inspect_sample(key, parts, what, findings)
    except TarError as error:
        findings.add("tar", error.offset, None, f"{error.reason}; nothing behind it was looked at")
    else:
        findings.num_samples = len(keys)
        if lines is not None:
            lines.finish(len(keys), findings)
    finally:
        findings.keys = hash_keys(keys)
        if lines is not None:
            lines.close()


def _inspect_sample(key: str, parts: list[Part], what: Inspection, findings: Findings) -> None:
    if what.rules.ours and not _OUR_KEYS.fullmatch(key):
        reason = f"the key has {len(key)} characters; 1 to {MAX_KEY_CHARS} of A-Z a-z 0-9 _ - are allowed"
        findings.add("sample", parts[0].member.offset, key, reason)
    try:
        sample = as_sample(key, parts)
    except SampleError as error:
        findings.add("sample", error.offset, key, error.reason)
        return
    checks: tuple[Callable[[], None], ...] = (
        lambda: _check_members(sample, what.rules),
        lambda: _check_labels(sample, what.rules),
        lambda: _check_image(sample.image, what),
    )
    for check in checks:
        try:
            check()
        except SampleError as error:
            findings.add("sample", error.offset, key, error.reason)


def _check_members(sample: Sample, rules: Rules) -> None:
    label = sample.label.member
    if rules.multi_label is not None and sample.multi_label != rules.multi_label:
        wanted = "json" if rules.multi_label else "cls"
        raise SampleError(
            label.offset, f"the label is in {label.name}; the index says that this set has {wanted} labels"
        )
    if rules.ours and sample.others:
        other = sample.others[0].member
        raise SampleError(other.offset, f"{other.name} is neither the image nor the label")


def _check_labels(sample: Sample, rules: Rules) -> None:
    for label in sample.labels():
        if rules.num_classes is not None and label >= rules.num_classes:
            reason = f"label {label}; the index names {rules.num_classes} classes, so at most {rules.num_classes - 1}"
            raise SampleError(sample.label.member.offset, f"{reason} is allowed")


def _check_image(image: Part, what: Inspection) -> None:
    member, content = image.member, content_of(image)
    try:
        extension, _ = check_header(content)
        if what.pixels:
            decode_image(content, max_pixels=MAX_PIXELS)
    except (BadImageError, BadSampleError) as error:
        raise SampleError(member.offset, f"{member.name}: {error}") from None
    if what.rules.ours and member.extension != extension:
        raise SampleError(member.offset, f"{member.name} is of the kind {extension} by its content")


class _Lines:
    """An ``.idx``, held against what its tar really has, line by line."""

    def __init__(self, place: Place, name: str) -> None:
        self._name = idx_name_of(name)
        self._file = place.open(self._name)
        self._header = self._file.readline()
        self._number = 1
        self._first: tuple[int, str] | None = None

    def compare(self, members: Iterable[Member]) -> None:
        """Take the next sample of the tar."""
        self._number += 1
        if self._first is not None:
            return
        offset, right = self._file.tell(), format_idx_line(list(members))
        line = self._file.readline().decode(errors="replace").removesuffix("\n")
        if line != right:
            self._first = offset, f"line {self._number} is {_short(line)} where the tar has {_short(right)}"

    def finish(self, num_samples: int, findings: Findings) -> None:
        """Say what is wrong, now that the tar is known to its end."""
        right = f"{IDX_VERSION} {num_samples}"
        if self._header.decode(errors="replace") != right + "\n":
            self._first = 0, f"line 1 is {self._header[:80]!r} where the tar has {right!r}"
        elif self._first is None and self._file.read(1):
            self._first = self._file.tell() - 1, f"more lines than the {num_samples} samples of the tar"
        if self._first is not None:
            findings.add("idx", self._first[0], None, self._first[1], file=self._name)

    def close(self) -> None:
        self._file.close()


def _short(line: str) -> str:
    return repr(line if len(line) <= 100 else line[:97] + "...")

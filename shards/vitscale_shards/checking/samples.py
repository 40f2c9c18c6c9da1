"""Tar members put together to samples: an image, its label, and whatever else a foreign tar has beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import BinaryIO, NamedTuple

from vitscale.data.decode import BadSampleError
from vitscale.data.manifest import Member
from vitscale.data.stream import IMAGE_EXTENSIONS, LABEL_EXTENSIONS, labels_of
from vitscale_shards.rows import MAX_IMAGE_BYTES
from vitscale_shards.tar import key_of

MAX_LABEL_BYTES = 1 << 24
_META = re.compile(r"__[^/]*__($|/)")


class SampleError(Exception):
    """A sample that training could not use; ``offset`` is where the bytes of the member at fault start in the tar."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"at byte {offset}: {reason}")
        self.offset = offset
        self.reason = reason


class Part(NamedTuple):
    """A member, with its bytes if they were read."""

    member: Member
    content: bytes | None


@dataclass(frozen=True)
class Sample:
    """One image with its label. ``others`` are further members, which training does not use."""

    key: str
    image: Part
    label: Part
    others: tuple[Part, ...]

    @property
    def multi_label(self) -> bool:
        """Whether the label is a list in a ``json`` member, not one integer in a ``cls`` member."""
        return self.label.member.extension.lower() == "json"

    def labels(self) -> tuple[int, ...]:
        """Dense class indices, by the rules of the training loader.

        Raises:
            SampleError: the label is not readable.
        """
        member = self.label.member
        try:
            return labels_of({member.extension.lower(): content_of(self.label)})
        except BadSampleError as error:
            raise SampleError(member.offset, f"{member.name}: {error}") from None


def read_parts(file: BinaryIO, members: Iterable[Member], extensions: frozenset[str]) -> Iterator[Part]:
    """Members one by one, with the bytes of those that have one of the ``extensions``: one pass through the file.

    Members too large for an image or a label are not read, nor those of which a forged header says a negative size.
    """
    for member in members:
        if member.extension.lower() not in extensions or not 0 <= member.size <= _max_bytes(member):
            yield Part(member, None)
        else:
            file.seek(member.offset)
            yield Part(member, file.read(member.size))


def content_of(part: Part) -> bytes:
    """Bytes of a member that should have been read.

    Raises:
        SampleError: it was too large to be read.
    """
    if part.content is None:
        member = part.member
        reason = f"{member.name} has {member.size} bytes; at most {_max_bytes(member)} are allowed"
        raise SampleError(member.offset, reason)
    return part.content


def _max_bytes(member: Member) -> int:
    return MAX_LABEL_BYTES if member.extension.lower() in LABEL_EXTENSIONS else MAX_IMAGE_BYTES


def group_samples(parts: Iterable[Part]) -> Iterator[tuple[str, list[Part]]]:
    """Runs of neighbouring members with the same key.

    Hidden files are passed over, as DALI's wds2idx does; files without an extension and folders named ``__...__``
    also, as ``webdataset`` does.
    """
    named = (part for part in parts if _belongs(part.member.name))
    for key, run in groupby(named, key=lambda part: key_of(part.member.name)):
        yield key, list(run)


def _belongs(name: str) -> bool:
    base = name.rpartition("/")[2]
    return "." in base[1:] and base[0] != "." and not _META.match(name)


def as_sample(key: str, parts: list[Part]) -> Sample:
    """Find the image and the label among the members of a sample.

    Raises:
        SampleError: there is not exactly one of each, or a member stands twice.
    """
    by_extension: dict[str, Part] = {}
    for part in parts:
        if by_extension.setdefault(part.member.extension.lower(), part) is not part:
            raise SampleError(part.member.offset, f"the sample has two members {part.member.name}")
    found = ", ".join(part.member.name for part in parts)
    images = [part for extension, part in by_extension.items() if extension in IMAGE_EXTENSIONS]
    if not images:
        raise SampleError(parts[0].member.offset, f"no image among the members {found}")
    if len(images) > 1:
        raise SampleError(images[1].member.offset, f"{len(images)} images among the members {found}; one is allowed")
    label = next((by_extension[ext] for ext in LABEL_EXTENSIONS if ext in by_extension), None)
    if label is None:
        raise SampleError(parts[0].member.offset, f"no label among the members {found}; a cls or json member is needed")
    others = tuple(part for part in parts if part is not images[0] and part is not label)
    return Sample(key, images[0], label, others)

"""What a shard set holds: ``index.json`` (a wids shard index with extra keys) and one DALI ``.idx`` per tar.

The format is specified in shards/README.md. Only the standard library is used here, so that login nodes and
data-preparation nodes can read a shard set.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

from vitscale.data.storage.drivers import without_secrets
from vitscale.errors import DataError

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
IDX_VERSION = "v1.2"


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One tar file of a shard set, or of a part of it."""

    name: str
    num_samples: int
    """That belong to the set."""
    num_bytes: int
    """Of the whole tar."""
    sha256: str | None = None
    first_sample: int = 0
    """Place in the tar of the first one that belongs to the set; the others follow it."""
    tar_samples: int | None = None
    """Samples of the whole tar, if not all belong to the set."""

    @property
    def num_in_tar(self) -> int:
        """Samples of the whole tar."""
        return self.num_samples if self.tar_samples is None else self.tar_samples

    @property
    def idx_name(self) -> str:
        """File name of the member index beside the tar."""
        return self.name.removesuffix(".tar") + ".idx"


@dataclass(frozen=True)
class Manifest:
    """A shard set: its tars in order, its classes, and where it came from."""

    location: str
    """Folder or URL prefix that holds the index and the member indexes."""
    shards: tuple[ShardInfo, ...]
    classes: tuple[str, ...] | None = None
    multi_label: bool = False
    split: str = "train"
    source: str = ""
    plan: str | None = None
    """Digest of the plan that the set was written from."""
    base_url: str | None = None
    """Folder of the tars, as a URL or an absolute path, when they do not lie beside the index."""
    order: str | None = None
    """How the samples were ordered when the set was written: shuffled, stratified or source."""
    part: str = ""
    """What was asked for of a larger set: "[:98%]", see :mod:`vitscale.data.parts`."""

    @property
    def shown(self) -> str:
        """The location for messages and records: without passwords and signatures."""
        return without_secrets(self.location) + self.part

    @property
    def tars(self) -> str:
        """Folder or URL prefix that holds the tars."""
        return self.location if self.base_url is None else self.base_url

    @property
    def num_samples(self) -> int:
        """Images in the set."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tars, or of the stretches that belong to a part."""
        return sum(shard.num_bytes * shard.num_samples // shard.num_in_tar for shard in self.shards)

    @property
    def digest(self) -> str:
        """Identity of the content: equal digests mean equal samples in equal places."""
        rows = [
            [s.name, s.num_samples, s.num_bytes, s.sha256]
            + ([] if s.tar_samples is None else [s.first_sample, s.tar_samples])
            for s in self.shards
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The content of ``index.json``, of a whole set."""
        known = {"order": self.order, "base_url": self.base_url}
        return {
            "__kind__": "wids-shard-index-v1",
            "wids_version": 1,
            "name": self.split,
            "shardlist": [
                {"url": s.name, "nsamples": s.num_samples, "filesize": s.num_bytes, "sha256": s.sha256}
                for s in self.shards
            ],
            "vitscale": {
                "format_version": FORMAT_VERSION,
                "split": self.split,
                "num_samples": self.num_samples,
                "classes": None if self.classes is None else list(self.classes),
                "multi_label": self.multi_label,
                "source": self.source,
                "plan": self.plan,
                **{key: value for key, value in known.items() if value is not None},
            },
        }


def read_manifest(folder: Path) -> Manifest:
    """Read ``folder/index.json``.

    Raises:
        DataError: the folder or its index is missing, empty or not of this format.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such shard set; a folder with {INDEX_NAME} and *.tar files is needed: "
            f"write one with 'vitscale shards write SOURCE OUT'"
        )
    path = folder / INDEX_NAME
    if not path.is_file():
        inside = sorted(p.parent.name for p in folder.glob(f"*/{INDEX_NAME}"))
        hint = f"did you mean {folder / inside[0]}?" if inside else "write one with 'vitscale shards write SOURCE OUT'"
        raise DataError(f"{folder}: holds no {INDEX_NAME}, so it is not a shard set; {hint}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a shard index ({error!r}); write the shard set again") from error
    return parse_manifest(text, str(folder))


def parse_manifest(text: str, location: str) -> Manifest:
    """The shard set that the text of an ``index.json`` describes.

    Args:
        location: where the text comes from: a folder, or a URL prefix.

    Raises:
        DataError: the text is not of this format, or the set is empty.
    """
    path = f"{without_secrets(location)}/{INDEX_NAME}"
    try:
        raw = json.loads(text)
        extra = raw.get("vitscale", {})
        version = extra.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path}: format version {version}; this vitscale reads version {FORMAT_VERSION}: use the vitscale "
                f"that wrote it, or write the shard set again"
            )
        shards = tuple(_shard_info(path, entry) for entry in raw["shardlist"])
        classes, base_url, order = extra.get("classes"), extra.get("base_url"), extra.get("order")
        manifest = Manifest(
            location=location,
            shards=shards,
            classes=None if classes is None else tuple(str(name) for name in classes),
            multi_label=bool(extra.get("multi_label", False)),
            split=str(extra.get("split", "")),
            source=str(extra.get("source", "")),
            plan=extra.get("plan"),
            base_url=None if base_url is None else str(base_url),
            order=None if order is None else str(order),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not a shard index ({error!r}); write the shard set again") from error
    if not manifest.num_samples:
        raise DataError(f"{path}: the shard set is empty; at least one sample is needed")
    return manifest


def _shard_info(path: str, entry: dict[str, Any]) -> ShardInfo:
    name = str(entry["url"])
    if Path(name).name != name or not name.endswith(".tar") or "\0" in name:
        raise DataError(f"{path}: shard url {name!r}; a plain file name ending in .tar beside the index is allowed")
    sha256 = entry.get("sha256")
    shard = ShardInfo(name, int(entry["nsamples"]), int(entry["filesize"]), None if sha256 is None else str(sha256))
    if shard.num_samples < 1:
        raise DataError(f"{path}: shard {name} says {shard.num_samples} samples; an empty shard is not allowed")
    return shard


def check_same_classes(manifest: Manifest, classes: Sequence[str] | None, *, of: str) -> None:
    """See that a label means the same in ``manifest`` as in a list of class names; unnamed classes pass.

    Raises:
        DataError: names the first label that differs.
    """
    for label, (ours, theirs) in enumerate(zip(manifest.classes or (), classes or (), strict=False)):
        if ours != theirs:
            raise DataError(
                f"{manifest.shown}: label {label} is {ours!r}, but {theirs!r} in {of}; write both sets from "
                f"sources with the same classes"
            )


class Member(NamedTuple):
    """One file inside a tar: its extension, where its bytes start, how many there are, and its full name."""

    extension: str
    offset: int
    size: int
    name: str


def format_idx(samples: list[list[Member]]) -> str:
    """Text of an ``.idx`` file in NVIDIA DALI's format v1.2: a line per sample, four words per member."""
    lines = [f"{IDX_VERSION} {len(samples)}", *map(format_idx_line, samples)]
    return "\n".join(lines) + "\n"


def format_idx_line(members: Sequence[Member]) -> str:
    """The line of one sample in an ``.idx`` file, without its end."""
    return " ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in members)


def parse_idx_line(line: str, path: Path | str) -> tuple[Member, ...]:
    """Members of the sample that a line of the ``.idx`` file ``path`` describes.

    Raises:
        DataError: it is not such a line.
    """
    words = line.split(" ")
    try:
        numbers = (map(int, words[1::4]), map(int, words[2::4]))
        return tuple(map(Member._make, zip(words[0::4], *numbers, words[3::4], strict=True)))
    except ValueError as error:
        raise DataError(f"{path}: not a DALI member index ({line[:80]!r}); write the shard set again") from error


class MemberIndex(Sequence[tuple[Member, ...]]):
    """The members of every sample of one tar. It remembers where the lines of the ``.idx`` file lie and reads those
    that are asked for: a rank has hundreds of tars open and needs a few lines of each at a time.

    Args:
        path: of the ``.idx`` file, for messages.
        line_ends: where the lines begin, and where the last one ends.
        read: gives bytes of the file from a start to an end; raises OSError.
    """

    def __init__(self, path: str, line_ends: array[int], read: Callable[[int, int], bytes]) -> None:
        self._path, self._line_ends, self._read_bytes = path, line_ends, read
        self.held_bytes = 8 * len(line_ends)
        """Memory that it takes."""

    def __len__(self) -> int:
        return len(self._line_ends) - 1

    @overload
    def __getitem__(self, item: int) -> tuple[Member, ...]: ...

    @overload
    def __getitem__(self, item: slice) -> list[tuple[Member, ...]]: ...

    def __getitem__(self, item: int | slice) -> tuple[Member, ...] | list[tuple[Member, ...]]:
        samples = range(len(self))[item]
        if isinstance(samples, int):
            return self._read(samples, samples + 1)[0]
        if not samples:
            return []
        first, last = sorted((samples[0], samples[-1]))
        return self._read(first, last + 1)[:: samples.step]

    def _read(self, first: int, stop: int) -> list[tuple[Member, ...]]:
        """Members of the samples ``first`` to ``stop - 1``: one read."""
        try:
            lines = self._read_bytes(self._line_ends[first], self._line_ends[stop]).decode().split("\n")[:-1]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self._path}: cannot be read ({error}); write the shard set again") from error
        if len(lines) != stop - first:
            raise DataError(f"{self._path}: cannot be read (it has changed since); write the shard set again")
        return [parse_idx_line(line, self._path) for line in lines]


def read_idx(path: Path) -> MemberIndex:
    """Open an ``.idx`` file.

    Raises:
        DataError: the file is missing or not of the format.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing; write the shard set again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the file system") from error

    def read(start: int, end: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    return parse_idx(content, str(path), read)


def parse_idx(content: bytes, path: str, read: Callable[[int, int], bytes] | None = None) -> MemberIndex:
    """The member index in the bytes of an ``.idx`` file.

    Args:
        content: all of the file.
        path: of the file, for messages.
        read: reads the lines again when they are needed; without it, ``content`` is kept.

    Raises:
        DataError: it is not of the format.
    """
    line_ends = array("Q", (match.end() for match in re.finditer(rb"\n", content)))
    header = content[: line_ends[0]].decode(errors="replace").rstrip("\n") if line_ends else ""
    right = f"{IDX_VERSION} {max(0, len(line_ends) - 1)}"
    if header != right:
        raise DataError(f"{path}: begins with {header[:80]!r} where {right!r} is right; write the shard set again")
    if read is not None:
        return MemberIndex(path, line_ends, read)
    index = MemberIndex(path, line_ends, lambda start, end: content[start:end])
    index.held_bytes += len(content)
    return index

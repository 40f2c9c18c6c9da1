"""Tars of samples: which there are at a location, and the members of their samples."""

from __future__ import annotations

import glob
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from braceexpand import braceexpand

from vitscale.data.manifest import INDEX_NAME, Member, ShardInfo, read_idx, read_manifest
from vitscale.errors import DataError
from vitscale_shards.sources.archive import check_not_named_compressed, file_names, list_folder, members, plain_name
from vitscale_shards.tar import key_of

_MAX_TARS = 1_000_000
_SAMPLES_AT_A_TIME = 1024
_GLOB_SIGNS = "*?["


@dataclass(frozen=True, slots=True)
class SampleTar:
    """One tar."""

    name: str
    """Its path below the folder that all tars of the location have in common."""

    file: str
    """Its absolute path."""

    indexed: ShardInfo | None = None
    """What ``index.json`` beside it says of it, if it has an ``.idx``."""

    classes: tuple[str, ...] | None = None
    """Class names of that index."""

    multi_label: bool = False
    """Whether that index says that labels are lists, in ``json`` members."""

    @property
    def path(self) -> Path:
        """Where it lies."""
        return Path(self.file)


def is_pattern(location: str) -> bool:
    """Whether a location stands for several tars, by braces or the wildcards of a shell."""
    return any(sign in location for sign in "{" + _GLOB_SIGNS) and not Path(location).exists()


def find_tars(location: str) -> tuple[Path, list[SampleTar]]:
    """The folder that all tars at a location have in common, and the tars in order.

    Args:
        location: a folder, a tar, or a pattern of tars.

    Raises:
        DataError: there are none, or other files, or they are not those of the index beside them.
    """
    # Strings, because with 10^5 tars Path objects would take every worker seconds.
    folders: dict[str, _Folder] = {}
    if Path(location).is_dir():
        root = os.path.abspath(location)  # noqa: PTH100
        folders[root] = _Folder(root)
        files = folders[root].tars()
    else:
        files = [os.path.abspath(file) for file in _expand(location)]  # noqa: PTH100
        root = os.path.commonpath({_parent(file) for file in files})
    tars = []
    for file in files:
        folder, base, name = _parent(file), file.rpartition("/")[2], file[len(root.rstrip("/")) + 1 :]
        if folder not in folders:
            folders[folder] = _Folder(folder)
        if not base.endswith(".tar") or ".tar:" in name:
            check_not_named_compressed(base, folder)
            raise DataError(f"{file}: is not named like a tar, NAME.tar without a colon; leave it out or rename it")
        tars.append(folders[folder].tar(name, file))
    return Path(root), tars


def _parent(file: str) -> str:
    return file.rpartition("/")[0] or "/"


class _Folder:
    """A folder with tars, and what the index in it, if there is one, says of them."""

    def __init__(self, folder: str) -> None:
        self._path = Path(folder)
        self._manifest = read_manifest(self._path) if (self._path / INDEX_NAME).is_file() else None
        shards = () if self._manifest is None else self._manifest.shards
        self._shards = {shard.name: shard for shard in shards}
        self._idx = {name for name in file_names(self._path) if name.endswith(".idx")} if shards else set()

    def tar(self, name: str, file: str) -> SampleTar:
        """One of the tars, with what the index says of it, if that lists it."""
        shard = self._shards.get(file.rpartition("/")[2])
        if self._manifest is None or shard is None:
            return SampleTar(name, file)
        indexed = shard if shard.idx_name in self._idx else None
        return SampleTar(name, file, indexed, self._manifest.classes, self._manifest.multi_label)

    def tars(self) -> list[str]:
        """The tars that the index lists, or all there are; they must be the same."""
        names = list_folder(self._path)
        for name in names:
            check_not_named_compressed(name, str(self._path))
        tars = [name for name in names if name.endswith(".tar")]
        if self._manifest is not None:
            if others := sorted(set(tars) - set(self._shards)):
                raise DataError(
                    f"{self._path}: {INDEX_NAME} does not list {others[0]} ({len(others)} of {len(tars)} tars); take "
                    f"them out, or write the index again with 'vitscale shards index'"
                )
            if self._manifest.base_url is not None and len(tars) < len(self._shards):
                raise DataError(
                    f"{self._path}: holds an index of tars that lie in {self._manifest.base_url}; name that place, or "
                    f"link the tars into {self._path} and name them as {self._path}/*.tar"
                )
            tars = list(self._shards)
        if not tars:
            raise DataError(f"{self._path}: holds no tar; a folder of *.tar files is needed")
        return [str(self._path / name) for name in tars]


def sample_members(tar: SampleTar, ignored: Counter[str]) -> Iterator[list[Member]]:
    """Members of each sample: neighbours with one key. Files without an extension and hidden ones are counted.

    Raises:
        DataError: the tar is missing, compressed or damaged, or its index is of another tar.
    """
    if tar.indexed is None:
        kept = (member for member in members(tar.path) if _counts(member, ignored))
        yield from (list(run) for _, run in groupby(kept, key=lambda member: key_of(member.name)))
        return
    _check_size(tar.path, tar.indexed)
    index = read_idx(tar.path.parent / tar.indexed.idx_name)
    if len(index) != tar.indexed.num_samples:
        raise DataError(
            f"{tar.path}: {tar.indexed.idx_name} lists {len(index)} samples where {INDEX_NAME} says "
            f"{tar.indexed.num_samples}; write the index again with 'vitscale shards index'"
        )
    for start in range(0, len(index), _SAMPLES_AT_A_TIME):
        for sample in index[start : start + _SAMPLES_AT_A_TIME]:
            yield [Member(m.extension, m.offset, m.size, plain_name(m.name)) for m in sample]


def _counts(member: Member, ignored: Counter[str]) -> bool:
    if member.name.rpartition("/")[2].startswith("."):
        ignored["hidden"] += 1
        return False
    if not member.extension:
        ignored["no extension"] += 1
        return False
    return True


def _check_size(path: Path, shard: ShardInfo) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {INDEX_NAME} lists it: copy it again") from error
    if size != shard.num_bytes:
        raise DataError(
            f"{path}: has {size} bytes where {INDEX_NAME} says {shard.num_bytes}; copy the tar again, or write the "
            f"index again with 'vitscale shards index'"
        )


def _expand(location: str) -> list[str]:
    """Paths that a pattern stands for, in its order; wildcards in the order of names."""
    if not is_pattern(location):
        return [location]
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", location)
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges) > _MAX_TARS:
        raise DataError(f"{location}: stands for more than {_MAX_TARS} tars; name fewer at a time")
    try:
        patterns = list(braceexpand(location))
    except ValueError as error:
        raise DataError(f"{location}: {error}; write braces as in /data/{{000..099}}.tar") from error
    paths: dict[str, None] = {}
    for pattern in patterns:
        found = sorted(glob.glob(pattern)) if any(sign in pattern for sign in _GLOB_SIGNS) else [pattern]  # noqa: PTH207
        if not found:
            raise DataError(f"{pattern}: matches no file; a pattern of tars is needed")
        paths.update(dict.fromkeys(found))
    return list(paths)

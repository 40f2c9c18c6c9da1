"""Make a foreign WebDataset set ours: write the index files, and leave its tars as they are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitscale.data.manifest import INDEX_NAME, Manifest, ShardInfo
from vitscale.data.storage.drivers import package_of
from vitscale.errors import DataError
from vitscale_shards.checking.keys import Hashes, find_repeated
from vitscale_shards.checking.survey import read_idx_lines
from vitscale_shards.checking.whole_set import INDEXING
from vitscale_shards.indexing.index_tar import IndexedTar, TarIndexer
from vitscale_shards.indexing.tar_urls import find_tars
from vitscale_shards.parallel import in_order
from vitscale_shards.place import LocalPlace, Place
from vitscale_shards.planning.plan import PLAN_NAME
from vitscale_shards.remote import RemotePlace
from vitscale_shards.tar import key_of
from vitscale_shards.writing.records import PROGRESS

MAX_BAD_TARS = 10


@dataclass(frozen=True)
class IndexedSet:
    """What came out: the index that was written, and what a person should know besides, one line each."""

    manifest: Manifest
    notes: tuple[str, ...]


def index_set(
    url: str,
    *,
    out: Path | None = None,
    classes: Sequence[str] | None = None,
    checksums: bool = True,
    overwrite: bool = False,
    workers: int = 1,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> IndexedSet:
    """Write an ``.idx`` for every tar, and ``index.json`` last. Given again after an interruption, it goes on.

    Tars without a sample are left out. Labels are ``cls`` or ``json`` members as in our own sets. Keys must be unique
    in a tar, and should be in the set.

    Args:
        url: the tars, see :func:`vitscale_shards.indexing.tar_urls.find_tars`.
        out: folder for the index, if it is not to lie beside the tars.
        classes: class names in the order of their labels.
        checksums: whether to note the SHA-256 of every tar, for which all of it is read.
        overwrite: whether to replace an index that is there.
        workers: processes that share the tars.
        on_progress: is told tars done and tars to do after each.

    Raises:
        DataError: there are no tars, an index is there already, or tars cannot be used as they are: names the first,
            the sample and the byte.
    """
    source, names = find_tars(url)
    target, base_url = _target(url, source, out)
    _check_classes(classes)
    _check_no_index(target, overwrite)
    try:
        tars, keys = _index_tars(TarIndexer(source, target, checksums), names, classes, workers, on_progress)
        full = [tar for tar in tars if tar.num_samples]
        if not full:
            raise DataError(f"{url}: no tar holds a sample; members KEY.jpg (or png ...) and KEY.cls are needed")
        _check_one_kind(source, full)
        manifest = Manifest(
            location=target.url,
            shards=tuple(ShardInfo(tar.name, tar.num_samples, tar.num_bytes, tar.sha256) for tar in full),
            classes=None if classes is None else tuple(classes),
            multi_label=full[0].multi_label,
            split=_folder_name(source),
            source=_folder_name(source) if isinstance(source, LocalPlace) else source.url,
            base_url=base_url,
        )
        target.sync()
        target.publish_text(INDEX_NAME, json.dumps(manifest.to_json()))
        target.sync()
        notes = [*_note_empty(tars), *_note_repeated_keys(target, full, keys)]
        target.remove_folder(INDEXING)
    except OSError as error:
        raise DataError(
            f"{target.url}: the index cannot be written ({error}); mend that and give the same command again, or give "
            f"--out FOLDER"
        ) from error
    return IndexedSet(manifest, tuple(notes))


def _target(url: str, source: Place, out: Path | None) -> tuple[Place, str | None]:
    """Where the index is to lie, and where the tars are if that is somewhere else."""
    if out is None:
        if isinstance(source, RemotePlace) and package_of(source.url) is None:
            raise DataError(f"{url}: nothing can be written there; give a folder for the index with --out FOLDER")
        return source, None
    if not isinstance(source, LocalPlace):
        return LocalPlace(out), source.url
    folder = source.folder.resolve()
    return LocalPlace(out), None if out.resolve() == folder else str(folder)


def _check_classes(classes: Sequence[str] | None) -> None:
    twice = [name for name, count in Counter(classes or ()).items() if count > 1]
    if twice:
        raise DataError(f"classes: {twice[0]!r} stands twice; a class has one label: name it once")


def _check_no_index(target: Place, overwrite: bool) -> None:
    if target.size(PLAN_NAME) is not None or target.names(PROGRESS):
        raise DataError(
            f"{target.url}: was written from a plan, so that its index must come from there; 'vitscale shards write "
            f"{target.url}' goes on with an unfinished set, 'vitscale shards repair {target.url}' mends a complete one"
        )
    if overwrite or target.size(INDEX_NAME) is None:
        return
    try:
        ours = "vitscale" in json.loads(target.read_text(INDEX_NAME))
    except (ValueError, TypeError):
        ours = False
    if ours:
        raise DataError(
            f"{target.url}: is a vitscale shard set already, which 'vitscale shards verify' checks; to index its tars "
            f"anew, give --overwrite"
        )
    raise DataError(
        f"{target.url}: holds an {INDEX_NAME} of another program; replace it with --overwrite, or have ours written "
        f"elsewhere with --out FOLDER"
    )


def _index_tars(
    indexer: TarIndexer,
    names: list[str],
    classes: Sequence[str] | None,
    workers: int,
    on_progress: Callable[[int, int], None],
) -> tuple[list[IndexedTar], list[Hashes]]:
    """Index all tars, and go on behind a few bad ones, so that they are named together."""
    tars: list[IndexedTar] = []
    keys: list[Hashes] = []
    bad: list[str] = []
    for done, result in enumerate(in_order(indexer, names, workers), start=1):
        if isinstance(result, DataError):
            bad.append(str(result))
        elif classes is not None and result[0].max_label >= len(classes):
            bad.append(_beyond(indexer.source, result[0], len(classes)))
        else:
            tars.append(result[0])
            if result[0].num_samples:
                keys.append(result[1])
        on_progress(done, len(names))
        if len(bad) == MAX_BAD_TARS:
            break
    if bad:
        more = f" (and {len(bad) - 1} more tars of the first {done} have faults)" if len(bad) > 1 else ""
        raise DataError(bad[0] + more)
    return tars, keys


def _beyond(source: Place, tar: IndexedTar, num_classes: int) -> str:
    return (
        f"{source.url}/{tar.name}: sample {tar.max_label_key} at byte {tar.max_label_offset}: label {tar.max_label}; "
        f"{num_classes} classes were named, so that 0 to {num_classes - 1} are allowed: name all classes"
    )


def _check_one_kind(source: Place, tars: list[IndexedTar]) -> None:
    first = tars[0]
    other = next((tar for tar in tars if tar.multi_label != first.multi_label), None)
    if other is not None:
        kinds = ("json", "cls") if first.multi_label else ("cls", "json")
        raise DataError(
            f"{source.url}: labels are in {kinds[0]} members in {first.name} (sample {first.first_key}), but in "
            f"{kinds[1]} members in {other.name} (sample {other.first_key}); a set has one kind: index them apart, "
            f"in two folders"
        )


def _folder_name(place: Place) -> str:
    return Path(place.url).resolve().name if isinstance(place, LocalPlace) else place.url.rpartition("/")[2]


def _note_empty(tars: list[IndexedTar]) -> list[str]:
    empty = [tar.name for tar in tars if not tar.num_samples]
    if not empty:
        return []
    more = ", ..." if len(empty) > 3 else ""
    return [f"{len(empty)} of {len(tars)} tars hold no sample and are left out: {', '.join(empty[:3])}{more}"]


def _note_repeated_keys(target: Place, tars: list[IndexedTar], keys: list[Hashes]) -> list[str]:
    groups, count = find_repeated(keys, limit=1)
    if not groups:
        return []
    (first, sample), (second, _), *_ = groups[0]
    members = next(line for at, line in enumerate(read_idx_lines(target, tars[first].name)) if at == sample)
    return [
        f"about {count} keys occur in more than one tar, such as {key_of(members[0].name)} in {tars[first].name} and "
        f"{tars[second].name}; training does not mind, but samples cannot be told apart by their keys"
    ]

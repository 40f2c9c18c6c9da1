"""Shard sets are opened here: where the index is read, and what is checked before anything is streamed. No torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from vitscale.config.schema import DataConfig, StorageConfig
from vitscale.data.manifest import INDEX_NAME, Manifest, check_same_classes, parse_manifest, read_manifest
from vitscale.data.mixing import Mixture
from vitscale.data.parts import split_part, take_part
from vitscale.data.storage.cache import CachedFiles
from vitscale.data.storage.drivers import is_path, without_secrets
from vitscale.data.storage.fetch import RemoteFiles, open_files
from vitscale.data.storage.files import LocalFiles, ShardFiles
from vitscale.data.storage.node_cache import CacheCounters, NextUses, NodeCache
from vitscale.errors import DataError

logger = logging.getLogger(__name__)

# Tars of a remote set that are looked at before a run: a request each, where a listing may take minutes or not exist.
REMOTE_CHECKS = 64
CHECKS_AT_A_TIME = 16
OPENING_S = 30.0
DEFAULT_STORAGE = StorageConfig()

# Of this process. Whoever counts what was read does not open a cache for it.
_opened_caches: list[NodeCache] = []


@dataclass(frozen=True)
class ShardSource:
    """An opened shard set: its index and the ways to its bytes."""

    manifest: Manifest
    tars: ShardFiles
    indexes: ShardFiles


def open_source(
    manifest: Manifest, storage: StorageConfig = DEFAULT_STORAGE, *, next_uses: NextUses | None = None
) -> ShardSource:
    """The ways to a set's bytes; remote ones through the node's cache if there is one.

    Args:
        manifest: the set.
        storage: how it is read.
        next_uses: in how many steps this node needs each shard, for the cache.

    Raises:
        DataError: no such storage, its driver is missing, or the cache's folder cannot be used.
    """

    def files(location: str) -> ShardFiles:
        origin = open_files(location, storage)
        if storage.cache is None and location.startswith("pipe:"):
            logger.warning("%s: runs the command anew for each window; set data.storage.cache", origin.location)
        if storage.cache is None or isinstance(origin, LocalFiles):
            return origin
        cache = _node_cache(storage.cache, int(storage.cache_gb * 1e9), storage.request_timeout_s)
        # A command gives a file from its start on, whatever is asked of it.
        in_parts = origin.parts if isinstance(origin, RemoteFiles) and location.startswith("pipe:") else None
        return CachedFiles(origin, manifest.shards, cache, next_uses, read_in_parts=in_parts)

    tars = files(manifest.tars)
    return ShardSource(manifest, tars, tars if manifest.base_url is None else files(manifest.location))


@lru_cache
def _node_cache(folder: Path, max_bytes: int, patience_s: float) -> NodeCache:
    """One for all sets of a process."""
    cache = NodeCache(folder, max_bytes, patience_s=patience_s, warn=logger.warning)
    _opened_caches.append(cache)
    return cache


def cache_counters() -> CacheCounters | None:
    """What the reads of this process through its caches have come to so far; None if it has opened none."""
    return sum((cache.counters() for cache in _opened_caches), CacheCounters()) if _opened_caches else None


def open_shard_set(location: str, storage: StorageConfig = DEFAULT_STORAGE) -> Manifest:
    """Read the index of a set and compare it with the files: all of a folder, a few spread ones of a remote set.

    Args:
        location: folder or URL of the set, or of a part of it: ``path/train[:98%]``, see :mod:`vitscale.data.parts`.
        storage: how it is read.

    Raises:
        DataError: there is no such set or part, its index is damaged, or its files are missing or of another size.
    """
    manifest = _read_index(location, storage)
    if manifest.part and manifest.order is None:
        logger.warning(
            "%s: the index does not say that the set was shuffled when it was written, and a part of a sorted one "
            "lacks classes; see how it is with 'vitscale shards stats %s'",
            manifest.shown,
            without_secrets(manifest.location),
        )
    check_files(manifest, storage)
    return manifest


def _read_index(location: str, storage: StorageConfig) -> Manifest:
    larger, part = split_part(location)
    if part is not None:
        return take_part(_read_index(larger, storage), part)
    return read_manifest(Path(location)) if is_path(location) else _read_remote(location, storage)


def _in_short(storage: StorageConfig) -> StorageConfig:
    """Before a run, nobody waits for minutes until a mistyped address is given up."""
    return replace(storage, total_timeout_s=min(storage.total_timeout_s, OPENING_S))


def open_training_data(data: DataConfig, *, global_batch_size: int) -> Mixture:
    """The set or the sets to train on.

    Raises:
        DataError: one of them cannot be used, or their labels mean different things.
        ConfigError: a weight comes to no image of a batch.
    """
    weights = {data.train: 1.0} if isinstance(data.train, str) else data.train
    manifests = [open_shard_set(location, data.storage) for location in weights]
    return Mixture.create(manifests, list(weights.values()), global_batch_size=global_batch_size)


def open_evaluation_set(
    location: str,
    storage: StorageConfig = DEFAULT_STORAGE,
    *,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    of: str = "the training set",
) -> Manifest:
    """Open a set that is evaluated on.

    Args:
        location: folder or URL of the set.
        storage: how it is read.
        num_classes: outputs of the head that is evaluated, if there is one.
        classes: what the labels have to mean, if it is known.
        of: where ``classes`` come from.

    Raises:
        DataError: it cannot be used, its images have several labels, it has more classes than the head, or its labels
            mean something else.
    """
    manifest = open_shard_set(location, storage)
    if manifest.multi_label:
        raise DataError(
            f"{manifest.shown}: images have several labels; accuracy and few-shot need one per image: "
            f"name a single-label set, or leave data.eval out"
        )
    if manifest.classes is not None and num_classes is not None and len(manifest.classes) > num_classes:
        raise DataError(
            f"{manifest.shown}: has {len(manifest.classes)} classes, but the model's head has {num_classes} "
            f"outputs; evaluate on a set with the classes of the training set"
        )
    check_same_classes(manifest, classes, of=of)
    return manifest


def check_files(manifest: Manifest, storage: StorageConfig = DEFAULT_STORAGE) -> None:
    """Compare sizes of tars with the index and look for their member indexes.

    Raises:
        DataError: names the first files that are missing or of another size, and how many there are.
    """
    tars, indexes = (open_files(location, _in_short(storage)) for location in (manifest.tars, manifest.location))
    shards = manifest.shards
    if manifest.tars.startswith("pipe:"):
        return  # a command tells no sizes; it would have to transfer everything
    if not is_path(manifest.tars) and len(shards) > REMOTE_CHECKS:
        shards = tuple(shards[i * len(shards) // REMOTE_CHECKS] for i in range(REMOTE_CHECKS))
    with ThreadPoolExecutor(CHECKS_AT_A_TIME) as pool:
        try:
            tar_sizes = list(pool.map(lambda shard: tars.size(shard.name), shards))
            idx_sizes = list(pool.map(lambda shard: indexes.size(shard.idx_name), shards))
        except OSError as error:
            raise DataError(
                f"{tars.location}: cannot be looked at ({error.strerror or error}); check the storage and your rights"
            ) from error
    faults = []
    for shard, tar_bytes, idx_bytes in zip(shards, tar_sizes, idx_sizes, strict=True):
        if tar_bytes is None:
            faults.append(f"{shard.name} is missing")
            continue
        if tar_bytes != shard.num_bytes:
            faults.append(f"{shard.name} has {tar_bytes} bytes where the index says {shard.num_bytes}")
        if idx_bytes is None:
            faults.append(f"{shard.idx_name} is missing")
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        elsewhere = "" if manifest.base_url is None else f" (the tars lie in {tars.location})"
        raise DataError(
            f"{manifest.shown}: {'; '.join(faults[:3])}{more}{elsewhere}; the index and the tars must come from one "
            f"writing: copy the set again or write it anew with 'vitscale shards write'"
        )


def _read_remote(location: str, storage: StorageConfig) -> Manifest:
    files = open_files(location, _in_short(storage))
    shown = files.location
    if shown.endswith(f"/{INDEX_NAME}"):
        raise DataError(f"{shown}: name the folder that holds the index, not the index")
    try:
        text = files.read_all(INDEX_NAME).decode()
    except FileNotFoundError as error:
        raise DataError(
            f"{shown}: holds no {INDEX_NAME}, so it is not a shard set; give the folder that holds it, or make one "
            f"with 'vitscale shards index {shown}'"
        ) from error
    except OSError as error:
        raise DataError(
            f"{shown}: {INDEX_NAME} cannot be read ({error.strerror or error}); check the storage and your rights"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{shown}/{INDEX_NAME}: not a shard index ({error!r}); write the shard set again") from error
    return parse_manifest(text, location)

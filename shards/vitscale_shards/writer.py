"""Put a plan on disk: OUT/<split>/{*.tar,*.idx,index.json}. What has no leading dot is a finished file.

While a set is being written, ``.progress`` holds one record per finished shard, so that the same command goes
on after any interruption; ``index.json`` comes last, and a folder with an index is complete.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from vitscale.data.manifest import (
    INDEX_NAME,
    Manifest,
    Member,
    ShardInfo,
    check_files,
    format_idx,
    read_manifest,
)
from vitscale.durable import Lock, publish_text, published, sync_folder
from vitscale.errors import DataError
from vitscale_shards.plan import ShardPlan, SplitPlan
from vitscale_shards.sources import BadImageError, Row, Source

PROGRESS_NAME = ".progress"
FAILURES_NAME = "failures.jsonl"
_ADVICE = "one folder holds one set: choose another OUT, or remove {} first"


@dataclass(frozen=True)
class Failure:
    """An image that was left out."""

    key: str
    path: str
    reason: str


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a finished shard. A shard all of whose images are bad has no samples and no file."""

    shard: ShardInfo
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class SplitResult:
    """A complete shard set and how it came about."""

    manifest: Manifest
    failures: tuple[Failure, ...]
    already_complete: bool


class _BudgetSpentError(Exception):
    """More bad images than allowed; carries those of the shard at hand."""

    def __init__(self, failures: list[Failure]) -> None:
        super().__init__(failures)
        self.failures = failures


def check_target(plan: SplitPlan, folder: Path) -> bool:
    """Whether ``folder`` already holds the complete set of this plan. Nothing is written.

    Raises:
        DataError: the folder holds something else, or an unfinished set of another plan.
    """
    with _explain_disk_errors(folder):
        _check_siblings(plan, folder)
        if (folder / INDEX_NAME).exists():
            _check_complete(plan, folder)
            return True
        if folder.exists():
            _check_unfinished(plan, folder)
        return False


def _check_complete(plan: SplitPlan, folder: Path) -> None:
    manifest = read_manifest(folder)
    if manifest.plan != plan.digest:
        raise DataError(
            f"{folder}: holds a set of other images or settings ({manifest.num_samples} samples of "
            f"{manifest.source or 'unknown'} in {len(manifest.shards)} shards); {_ADVICE.format(folder)}"
        )
    check_files(manifest)


def _check_unfinished(plan: SplitPlan, folder: Path) -> None:
    progress = folder / PROGRESS_NAME
    records = [json.loads(path.read_text(encoding="utf-8")) for path in progress.glob("*.json")]
    if any(record["plan"] != plan.digest for record in records):
        raise DataError(
            f"{folder}: holds {len(records)} shards of an unfinished set from other images or settings; "
            f"repeat the former command to finish it; {_ADVICE.format(folder)}"
        )
    if records:
        return
    own = {FAILURES_NAME, plan.shards[0].name, plan.shards[0].name.removesuffix(".tar") + ".idx"}
    visible = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if others := sorted(visible - own if progress.is_dir() else visible):
        raise DataError(f"{folder}: holds {len(others)} other files, such as {others[0]}; {_ADVICE.format(folder)}")


def _check_siblings(plan: SplitPlan, folder: Path) -> None:
    """Sets under one OUT are used together, so their labels must mean the same."""
    for index in sorted(folder.parent.glob(f"*/{INDEX_NAME}")):
        try:
            classes = read_manifest(index.parent).classes
        except DataError:  # not a shard set, so no matter of ours
            continue
        if index.parent.name != folder.name and classes not in (None, plan.classes):
            raise DataError(
                f"{folder}: its classes would differ from those of {index.parent}, a label would mean two "
                f"things; give both sources the same class folders (empty ones count) or choose another OUT"
            )


def write_split(
    plan: SplitPlan,
    source: Source,
    folder: Path,
    *,
    max_failures: int = 0,
    advance: Callable[[int], None] = lambda samples: None,
) -> SplitResult:
    """Write what is missing of the plan's shard set.

    Args:
        max_failures: bad images of this split to leave out before giving up.
        advance: is told how many more images of the plan are done.

    Raises:
        DataError: too many bad images, the folder belongs to something else, or the disk is full.
    """
    with _explain_disk_errors(folder):
        if check_target(plan, folder):
            shutil.rmtree(folder / PROGRESS_NAME, ignore_errors=True)
            return SplitResult(read_manifest(folder), _read_failures(folder), already_complete=True)
        (folder / PROGRESS_NAME).mkdir(parents=True, exist_ok=True)
        with _only_writer(folder):
            records = _write_shards(plan, source, folder, max_failures, advance)
            return _finish(plan, folder, records)


def write_shard(
    shard: ShardPlan, source: Source, folder: Path, failures_allowed: int, advance: Callable[[int], None]
) -> ShardRecord:
    """Write one tar and its member index.

    Raises:
        OSError: the disk is full or broken; nothing is left under a final name that is not complete.
    """
    failures: list[Failure] = []
    samples = _good_samples(shard.rows, source, failures, failures_allowed, advance)
    first = next(samples, None)
    if first is None:
        return ShardRecord(ShardInfo(shard.name, 0, 0), tuple(failures))
    with published(folder / shard.name) as file:
        digesting = _write_tar(file, itertools.chain([first], samples))
        file.flush()
        members = _read_members(Path(file.name))
    info = ShardInfo(shard.name, len(members), digesting.num_bytes, digesting.sha256.hexdigest())
    publish_text(folder / info.idx_name, format_idx(members))
    return ShardRecord(info, tuple(failures))


def _write_shards(
    plan: SplitPlan, source: Source, folder: Path, max_failures: int, advance: Callable[[int], None]
) -> list[ShardRecord]:
    records: list[ShardRecord] = []
    failures: list[Failure] = []
    for shard in plan.shards:
        record = _read_record(folder, shard)
        if record is None:
            try:
                record = write_shard(shard, source, folder, max_failures - len(failures), advance)
            except _BudgetSpentError as spent:
                raise _too_many(folder, failures + spent.failures, max_failures) from None
            _write_record(folder, record, plan)
        else:
            advance(len(shard.rows))
        records.append(record)
        failures += record.failures
        if len(failures) > max_failures:  # recorded by a former attempt that allowed more
            raise _too_many(folder, failures, max_failures)
    return records


def _too_many(folder: Path, failures: list[Failure], allowed: int) -> DataError:
    _publish_failures(folder, failures)
    last = failures[-1]
    return DataError(
        f"{last.path}: {last.reason}; bad image {len(failures)}, allowed are {allowed} (all are listed in "
        f"{folder / FAILURES_NAME}); mend the file, or leave bad images out with --max-failures N"
    )


def _finish(plan: SplitPlan, folder: Path, records: list[ShardRecord]) -> SplitResult:
    shards = tuple(record.shard for record in records if record.shard.num_samples)
    failures = [failure for record in records for failure in record.failures]
    _publish_failures(folder, failures)
    if not shards:
        raise DataError(f"{folder}: all {plan.num_samples} images are bad; see {folder / FAILURES_NAME}")
    manifest = Manifest(folder, shards, plan.classes, split=plan.split, source=plan.source, plan=plan.digest)
    publish_text(folder / INDEX_NAME, json.dumps(manifest.to_json(), indent=1) + "\n")
    sync_folder(folder)
    sync_folder(folder.parent)
    shutil.rmtree(folder / PROGRESS_NAME)
    return SplitResult(manifest, tuple(failures), already_complete=False)


def _good_samples(
    rows: tuple[Row, ...],
    source: Source,
    failures: list[Failure],
    allowed: int,
    advance: Callable[[int], None],
) -> Iterator[dict[str, str | bytes]]:
    """The rows' images as webdataset wants them; what cannot be read goes to ``failures``."""
    for row in rows:
        try:
            extension, data = source.read(row)
        except BadImageError as error:
            failures.append(Failure(row.key, row.path, str(error)))
            if len(failures) > allowed:
                raise _BudgetSpentError(failures) from None
        else:
            yield {"__key__": row.key, "cls": b"%d" % row.label, extension: data}
        advance(1)


class _DigestingFile:
    """Counts and digests the bytes on their way to the file."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.num_bytes = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.num_bytes += len(data)
        self.sha256.update(data)
        return self.file.write(data)


def _write_tar(file: BinaryIO, samples: Iterator[dict[str, str | bytes]]) -> _DigestingFile:
    from webdataset import TarWriter

    digesting = _DigestingFile(file)
    # Everything that could differ between two machines is fixed: time, owner, mode.
    with TarWriter(digesting, user="vitscale", group="vitscale", mode=0o444, mtime=0, encoder=False) as tar:
        for sample in samples:
            tar.write(sample)
    return digesting


def _read_members(path: Path) -> list[list[Member]]:
    """Members of a tar by sample, read back from the file itself."""
    with tarfile.open(path, "r:") as tar:
        members = [Member(i.name.partition(".")[2], i.offset_data, i.size, i.name) for i in tar]
    by_key = itertools.groupby(members, key=lambda member: member.name.partition(".")[0])
    return [list(group) for _, group in by_key]


def _write_record(folder: Path, record: ShardRecord, plan: SplitPlan) -> None:
    sync_folder(folder)  # the record must not outlive the names it vouches for
    content = {"plan": plan.digest, **asdict(record)}
    publish_text(folder / PROGRESS_NAME / f"{record.shard.name}.json", json.dumps(content))


def _read_record(folder: Path, shard: ShardPlan) -> ShardRecord | None:
    """The record of a finished shard whose files still stand there."""
    try:
        content = json.loads((folder / PROGRESS_NAME / f"{shard.name}.json").read_text(encoding="utf-8"))
        info = ShardInfo(**content["shard"])
        if info.num_samples:
            check_files(Manifest(folder, (info,)))
    except (FileNotFoundError, DataError):
        return None
    return ShardRecord(info, tuple(Failure(**failure) for failure in content["failures"]))


def _publish_failures(folder: Path, failures: list[Failure]) -> None:
    if failures:
        publish_text(folder / FAILURES_NAME, "".join(json.dumps(asdict(f)) + "\n" for f in failures))
    else:
        (folder / FAILURES_NAME).unlink(missing_ok=True)


def _read_failures(folder: Path) -> tuple[Failure, ...]:
    path = folder / FAILURES_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return tuple(Failure(**json.loads(line)) for line in lines)


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Keep a second writer out of the folder."""
    lock = Lock(folder / PROGRESS_NAME / "lock")
    if not lock.take():
        raise DataError(f"{folder}: another command is writing here; wait for it or stop it")
    try:
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
        yield
    finally:
        lock.release()


@contextmanager
def _explain_disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: cannot be written ({error.strerror or error}); finished shards are "
            f"kept: make room or mend the permissions, then give the same command again"
        ) from error

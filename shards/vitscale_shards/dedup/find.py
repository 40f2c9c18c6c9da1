"""Duplicates between a dataset and held-out test sets, and within it.

"We de-duplicate the pre-training datasets w.r.t. the test sets of the downstream tasks" (Dosovitskiy et al. 2021, ViT,
section 4.1, following Kolesnikov et al. 2020, BiT), so that no test image has been trained on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vitscale.durable import Lock
from vitscale.errors import DataError
from vitscale_shards.dedup.candidates import count_images, find_candidates
from vitscale_shards.dedup.decisions import decide
from vitscale_shards.dedup.fingerprint_sets import FingerprintSet
from vitscale_shards.dedup.report import Report, write_report
from vitscale_shards.dedup.settings import DedupSettings
from vitscale_shards.progress import Advance
from vitscale_shards.sources import SourceSpec

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]")


def find_duplicates(
    source: SourceSpec,
    against: Sequence[SourceSpec],
    folder: Path,
    settings: DedupSettings,
    *,
    workers: int = 1,
    advance: Advance = lambda what, done, total: None,
) -> Report:
    """Find the images of a source that match held-out images or each other, and write a report about them.

    The fingerprints in ``folder/fingerprints`` are kept: after an interruption, or with other settings, the same call
    goes on with those that are there. They are computed again where keys, labels, paths or sizes of the source have
    changed; new bytes of the same number in the same place are not noticed.

    Args:
        source: what is to be trained on.
        against: what is held out for tests.
        folder: where the report is to lie: ``exclude.txt``, ``duplicates.jsonl``, ``unreadable.jsonl``,
            ``sheet-NNN.jpg``, ``summary.json``; another one there is replaced.
        workers: processes that read images; with one it is this process.
        advance: is told how far it is.

    Raises:
        DataError: nothing to compare, a source is missing or empty, a worker was killed, the folder is in use or
            cannot be written.
    """
    if not against and not settings.within:
        raise DataError("dedup: nothing to compare: name held-out sets with --against, or search within the source")
    try:
        _refuse_others_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder / ".lock")
        if not lock.take():
            raise DataError(f"{folder}: another dedup is at work here; wait for it, or choose another folder")
        try:
            return _find(source, against, folder, settings, workers, advance)
        finally:
            lock.release()
    except OSError as error:
        raise DataError(
            f"{folder}: reading or writing failed ({error}); mend that and give the same command again: it goes on "
            f"where it stopped"
        ) from error


def _refuse_others_folder(folder: Path) -> None:
    """See that a report does not come among other files, which might be a dataset."""
    own = {"fingerprints", "summary.json", ".lock"}
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and not names & own:
        raise DataError(
            f"{folder}: holds {len(names)} other files, such as {min(names)}; give the report a folder of its own"
        )


def _find(
    source: SourceSpec,
    against: Sequence[SourceSpec],
    folder: Path,
    settings: DedupSettings,
    workers: int,
    advance: Advance,
) -> Report:
    sets: list[FingerprintSet] = []
    for spec in (source, *against):
        opened = spec.open()
        name = _unused_name(opened.name, {images.name for images in sets})
        sets.append(FingerprintSet(name, opened, folder / "fingerprints" / name))
        sets[-1].compute(spec, decode=settings.match != "bytes", workers=workers, advance=advance)
    counts = [count_images(images, settings.match) for images in sets]
    candidates = find_candidates(sets[0], sets[1:], settings, advance=advance)
    decisions = decide(candidates, settings)
    return write_report(folder, settings, sets, counts, candidates, decisions)


def _unused_name(name: str, used: set[str]) -> str:
    """A name for a folder and for reports that no other set has."""
    plain = _NOT_IN_NAMES.sub("_", name).lstrip(".")[:80] or "source"
    names = [plain, *(f"{plain}-{number}" for number in range(2, len(used) + 2))]
    return next(name for name in names if name not in used)

"""What ``vitscale shards dedup`` leaves behind: the pairs, the keys to leave out, and sheets to look at.

The text files are the same to the byte whenever the images and settings are.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vitscale.durable import publish_text, published, sync_folder
from vitscale_shards.dedup.candidates import Candidates, Counts
from vitscale_shards.dedup.decisions import KINDS, Decisions
from vitscale_shards.dedup.fingerprint_sets import FingerprintSet, path_of
from vitscale_shards.dedup.fingerprints import VERSION, decoder_versions
from vitscale_shards.dedup.pairs import Pair, PairImage, read_pairs
from vitscale_shards.dedup.settings import DedupSettings
from vitscale_shards.dedup.sheet import MAX_SHEETS, PAIRS_PER_SHEET, draw_sheets

SUMMARY_NAME = "summary.json"
PAIRS_NAME = "duplicates.jsonl"
EXCLUDE_NAME = "exclude.txt"
UNREADABLE_NAME = "unreadable.jsonl"


@dataclass(frozen=True)
class SetReport:
    """Images of one set."""

    name: str
    images: int
    unreadable: int
    """Cannot be read or decoded, so they were not compared."""

    plain: int
    """Too plain for a perceptual hash, so only their pixels were compared."""

    matched: int
    """Of the source: those that match a held-out image. Of a held-out set: those that match one of the source."""


@dataclass(frozen=True)
class Report:
    """What was found. ``summary.json`` holds the same."""

    settings: DedupSettings
    source: SetReport
    against: tuple[SetReport, ...]
    repeated: int
    """Images of the source that match no held-out one, but one of the source that is kept."""

    pairs: dict[str, int]
    """Lines of ``duplicates.jsonl`` by kind, those of kind near by distance too (``near 4``)."""

    sheets: int
    pairs_not_shown: int
    """More pairs than there is room for on the sheets."""

    @property
    def excluded(self) -> int:
        """Lines of ``exclude.txt``."""
        return self.source.matched + self.repeated


def write_report(
    folder: Path,
    settings: DedupSettings,
    sets: Sequence[FingerprintSet],
    counts: Sequence[Counts],
    candidates: Candidates,
    decisions: Decisions,
) -> Report:
    """Write all files; ``summary.json`` is the last one, so that a report with it is complete.

    Args:
        sets: the source and the held-out sets, with the ``counts`` of their images.
    """
    (folder / SUMMARY_NAME).unlink(missing_ok=True)
    _publish_lines(folder / UNREADABLE_NAME, _unreadable_lines(sets))
    _publish_lines(folder / PAIRS_NAME, map(_pair_line, read_pairs(sets, candidates, decisions)))
    _publish_lines(folder / EXCLUDE_NAME, _excluded_keys(candidates, decisions))
    num_shown = MAX_SHEETS * PAIRS_PER_SHEET
    num_sheets = draw_sheets(folder, read_pairs(sets, candidates, decisions, num_shown))
    matched = _matched(len(sets), candidates, decisions)
    reports = [
        SetReport(sets[i].name, counts[i].images, counts[i].unreadable, counts[i].plain, matched[i])
        for i in range(len(sets))
    ]
    report = Report(
        settings=settings,
        source=reports[0],
        against=tuple(reports[1:]),
        repeated=int(decisions.repeated.sum()),
        pairs=dict(Counter(_likeness(*pair) for pair in zip(decisions.kind, decisions.distance, strict=True))),
        sheets=num_sheets,
        pairs_not_shown=max(0, len(decisions.first) - num_shown),
    )
    summary = {
        **asdict(report),
        "excluded": report.excluded,
        "fingerprints": {"version": VERSION, **decoder_versions()},
    }
    publish_text(folder / SUMMARY_NAME, json.dumps(summary, indent=1) + "\n")
    sync_folder(folder)
    return report


def _likeness(kind: int, bits: int) -> str:
    return f"{KINDS[kind]} {bits}" if KINDS[kind] == "near" else KINDS[kind]


def _pair_line(pair: Pair) -> str:
    content = {
        "kind": pair.kind,
        "distance": pair.distance,
        "same_label": pair.same_label,
        "left_out": _image(pair.left_out),
        "matches": _image(pair.matches),
    }
    return json.dumps(content)


def _image(image: PairImage) -> dict[str, str]:
    return {"source": image.images.name, "key": image.row.key, "path": image.row.path}


def _unreadable_lines(sets: Sequence[FingerprintSet]) -> Iterator[str]:
    for images in sets:
        for table in images.tables(only=["key", "path", "reason"]):
            for row in table.filter(table["reason"].is_valid()).to_pylist():
                content = {"source": images.name, "key": row["key"], "path": path_of(row), "reason": row["reason"]}
                yield json.dumps(content)


def _excluded_keys(candidates: Candidates, decisions: Decisions) -> list[str]:
    excluded = np.flatnonzero(decisions.matches_held_out | decisions.repeated)
    return sorted(candidates.table["key"].take(excluded).to_pylist())


def _matched(num_sets: int, candidates: Candidates, decisions: Decisions) -> list[int]:
    """For each set how many of its images match one on the other side."""
    held_out = np.unique(decisions.second[decisions.second >= candidates.num_source])
    matched = np.bincount(candidates.table["set"].to_numpy()[held_out], minlength=num_sets)
    matched[0] = decisions.matches_held_out.sum()
    return [int(number) for number in matched]


def _publish_lines(path: Path, lines: Iterable[str]) -> None:
    with published(path) as file:
        for line in lines:
            file.write(f"{line}\n".encode())

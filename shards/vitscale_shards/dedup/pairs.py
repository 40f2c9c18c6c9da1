"""The pairs that were decided on, with all that is known of their images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vitscale_shards.dedup.candidates import Candidates
from vitscale_shards.dedup.decisions import KINDS, Decisions
from vitscale_shards.dedup.fingerprint_sets import FingerprintSet, path_of
from vitscale_shards.rows import Row

_PAIRS_AT_A_TIME = 10_000


@dataclass(frozen=True)
class PairImage:
    """One image of a pair."""

    images: FingerprintSet
    """Where it is from."""

    row: Row


@dataclass(frozen=True)
class Pair:
    """Two images that are alike."""

    kind: str
    """One of ``KINDS``."""

    distance: int
    left_out: PairImage
    matches: PairImage

    @property
    def same_label(self) -> bool | None:
        """Whether the images have the same labels; None if their sets do not have the same classes."""
        first, second = (image.images.source.classes for image in (self.left_out, self.matches))
        if self.left_out.images is not self.matches.images and (first is None or first != second):
            return None
        return set(self.left_out.row.labels) == set(self.matches.row.labels)


def read_pairs(
    sets: Sequence[FingerprintSet], candidates: Candidates, decisions: Decisions, stop: int | None = None
) -> Iterator[Pair]:
    """The pairs in order, or those before ``stop``.

    Args:
        sets: the source and the held-out sets.
    """

    def image(content: dict[str, Any]) -> PairImage:
        row = Row(content["key"], tuple(content["labels"]), path_of(content), content["num_bytes"])
        return PairImage(sets[content["set"]], row)

    stop = len(decisions.first) if stop is None else min(stop, len(decisions.first))
    for start in range(0, stop, _PAIRS_AT_A_TIME):
        part = slice(start, min(start + _PAIRS_AT_A_TIME, stop))
        columns = (
            decisions.kind[part].tolist(),
            decisions.distance[part].tolist(),
            candidates.table.take(decisions.first[part]).to_pylist(),
            candidates.table.take(decisions.second[part]).to_pylist(),
        )
        for kind, distance, left_out, matches in zip(*columns, strict=True):
            yield Pair(KINDS[kind], distance, image(left_out), image(matches))

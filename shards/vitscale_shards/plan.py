"""Which image goes into which shard: a pure function of the rows and the settings."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from math import ceil

from vitscale.errors import DataError
from vitscale_shards.sources import Row

SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
HASH_RANGE = 1 << 64


@dataclass(frozen=True)
class ShardPlan:
    """One tar file to be: its name and its images in order."""

    name: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class SplitPlan:
    """One shard set to be."""

    split: str
    source: str
    classes: tuple[str, ...]
    shards: tuple[ShardPlan, ...]

    @property
    def num_samples(self) -> int:
        """Images in all shards."""
        return sum(len(shard.rows) for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """Identity: equal digests mean the same names, labels and places (not the same pixels)."""
        digest = hashlib.sha256(json.dumps([self.split, self.source, self.classes]).encode())
        for shard in self.shards:
            digest.update(json.dumps([shard.name, shard.rows]).encode())
        return digest.hexdigest()


def parse_split(text: str) -> dict[str, Fraction]:
    """Shares by split name from ``train=0.8,val=0.2``; a share is a decimal or a fraction such as 1/3.

    Raises:
        DataError: a name or share is not allowed, or the shares do not sum to exactly 1.
    """
    shares: dict[str, Fraction] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        if not SPLIT_NAME.fullmatch(name) or name in shares:
            raise DataError(f"split {text!r}: {name!r} is no name or stands twice; write NAME=SHARE,NAME=SHARE")
        try:
            shares[name] = Fraction(value)
        except (ValueError, ZeroDivisionError):
            raise DataError(f"split {text!r}: share {value!r} of {name}; write a number such as 0.8 or 4/5") from None
        if shares[name] <= 0:
            raise DataError(f"split {text!r}: share {value} of {name}; a share must be above 0: leave {name} out")
    if (total := sum(shares.values())) != 1:
        raise DataError(f"split {text!r}: the shares sum to {float(total):g}; they must sum to exactly 1")
    return shares


def make_plan(
    rows: Iterable[Row],
    *,
    source: str,
    classes: Sequence[str],
    split: str = "train=1",
    samples_per_shard: int = 10_000,
    seed: int = 0,
) -> tuple[SplitPlan, ...]:
    """Divide the rows into splits, shuffle each, cut it into shards of almost equal size.

    The side of an image depends on its key and the shares alone, so it stays when images are added or the
    seed changes. The order depends on the seed and the key.

    Raises:
        DataError: two rows with one key, a split that gets no image, or a wrong setting.
    """
    if samples_per_shard < 1:
        raise DataError(f"samples per shard: {samples_per_shard}; at least 1 is needed")
    shares = parse_split(split)
    sides: dict[str, list[Row]] = {name: [] for name in sorted(shares)}
    limits = _limits(shares)
    for row in rows:
        position = _hash(row.key)
        sides[next(name for name, limit in limits if position < limit)].append(row)
    for name, members in sides.items():
        if not members:
            total = sum(map(len, sides.values()))
            raise DataError(f"split {name!r} gets none of {total} images; give it a larger share or leave it out")
        members.sort(key=lambda row: (_hash(f"{seed}:{row.key}"), row.key))
        _refuse_equal_keys(members)
    return tuple(
        SplitPlan(name, source, tuple(classes), _cut(name, members, samples_per_shard))
        for name, members in sides.items()
    )


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _limits(shares: dict[str, Fraction]) -> list[tuple[str, int]]:
    """Upper end of every split's range of hashes; sorted, so that the order in the text plays no part."""
    limits, end = [], Fraction(0)
    for name in sorted(shares):
        end += shares[name]
        limits.append((name, ceil(end * HASH_RANGE)))
    return limits


def _refuse_equal_keys(shuffled: list[Row]) -> None:
    """Equal keys have equal hashes, so they stand side by side after the shuffle."""
    for first, second in pairwise(shuffled):
        if first.key == second.key:
            raise DataError(
                f"{first.path} and {second.path} both get the key {first.key!r}; keys must differ: rename one of them"
            )


def _cut(split: str, rows: list[Row], samples_per_shard: int) -> tuple[ShardPlan, ...]:
    count = -(-len(rows) // samples_per_shard)
    edges = [len(rows) * i // count for i in range(count + 1)]
    return tuple(
        ShardPlan(f"{split}-{i:06d}.tar", tuple(rows[start:end])) for i, (start, end) in enumerate(pairwise(edges))
    )

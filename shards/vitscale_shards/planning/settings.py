"""How a plan is to be made: what the options of ``vitscale shards plan`` mean."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any, Literal, cast, get_args

from vitscale.errors import DataError
from vitscale_shards.images import Treatment

SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
HASH_RANGE = 1 << 64

Order = Literal["shuffled", "stratified", "source"]


@dataclass(frozen=True)
class PlanSettings:
    """Everything but the source that decides which image goes where."""

    split: str = "train=1"
    """Shares by split name."""

    lists: tuple[tuple[str, str], ...] = ()
    """Split name and file: the images whose key or path is a line of the file go to that split, not by shares."""

    subset: str = ""
    """Share of all splits, or shares by split name, that is kept. Smaller subsets lie in larger ones."""

    exclude: tuple[str, ...] = ()
    """Files with a key or path of an image to leave out on each line."""

    samples_per_shard: int | None = None
    bytes_per_shard: int | None = None
    """At most so many samples, or about so many bytes in a shard; 10,000 samples if neither is given."""

    order: Order = "shuffled"
    """Globally shuffled; shuffled so that every class is spread evenly, too; or as the source lists the images."""

    seed: int = 0
    treatment: Treatment = field(default_factory=Treatment)

    def __post_init__(self) -> None:
        """See that the settings make sense together.

        Raises:
            DataError: they do not.
        """
        if self.samples_per_shard is not None and self.bytes_per_shard is not None:
            raise DataError("samples per shard and bytes per shard: both are given; give one of them")
        for value, what in ((self.samples_per_shard, "samples"), (self.bytes_per_shard, "bytes")):
            if value is not None and value < 1:
                raise DataError(f"{what} per shard: {value}; at least 1 is needed")
        if self.order not in get_args(Order):
            raise DataError(f"order: {self.order!r}; {', '.join(get_args(Order))} are allowed")
        for name, file in self.lists:
            if not SPLIT_NAME.fullmatch(name):
                raise DataError(f"list {file} of split {name!r}: a split's name has letters, digits, _ and - only")

    def to_json(self) -> dict[str, Any]:
        """Values for the plan's file, just as they are when they have been read from there."""
        return cast(dict[str, Any], json.loads(json.dumps(asdict(self))))


def parse_split(text: str) -> dict[str, Fraction]:
    """Shares by split name from ``train=0.8,val=0.2``; a share is a decimal or a fraction such as 1/3.

    Raises:
        DataError: a name or share is not allowed, or the shares do not sum to exactly 1.
    """
    shares = _parse_shares(text, "split")
    if (total := sum(shares.values())) != 1:
        raise DataError(f"split {text!r}: the shares sum to {float(total):g}; they must sum to exactly 1")
    return shares


def parse_subset(text: str, splits: list[str]) -> dict[str, Fraction]:
    """Shares to keep by split name, from ``10%`` (of every split) or ``train=0.1`` (others are kept whole).

    Raises:
        DataError: a share is not above 0 and at most 1, or a split is unknown.
    """
    if not text:
        return {}
    if "=" not in text:
        text = ",".join(f"{name}={text}" for name in splits)
    shares = _parse_shares(text, "subset")
    for name, share in shares.items():
        if name not in splits:
            raise DataError(f"subset {text!r}: no split is called {name!r}; there are {', '.join(splits)}")
        if share > 1:
            raise DataError(f"subset {text!r}: share {float(share):g} of {name}; at most 1 (100%) can be kept")
    return shares


def _parse_shares(text: str, what: str) -> dict[str, Fraction]:
    shares: dict[str, Fraction] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        if not SPLIT_NAME.fullmatch(name) or name in shares:
            raise DataError(f"{what} {text!r}: {name!r} is no name or stands twice; write NAME=SHARE,NAME=SHARE")
        try:
            shares[name] = Fraction(value[:-1]) / 100 if value.endswith("%") else Fraction(value)
        except (ValueError, ZeroDivisionError):
            raise DataError(
                f"{what} {text!r}: share {value!r} of {name}; write a number such as 0.8, 4/5 or 80%"
            ) from None
        if shares[name] <= 0:
            raise DataError(f"{what} {text!r}: share {value} of {name}; a share must be above 0: leave {name} out")
    return shares


def upper_limits(shares: dict[str, Fraction]) -> list[int]:
    """Upper ends of the ranges of 64-bit hashes that belong to the splits, by name: the text's order plays no part."""
    limits, end = [], Fraction(0)
    for name in sorted(shares):
        end += shares[name]
        limits.append(ceil(end * HASH_RANGE))
    return limits


def read_list(path: Path, what: str, *, may_be_empty: bool = False) -> list[str]:
    """The lines of a file of keys, paths or class names; empty ones do not count.

    Raises:
        DataError: the file cannot be read, or holds nothing although it must.
    """
    try:
        # Not splitlines: it would also cut names at control characters. Windows puts a mark before the first line.
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list of {what} ({error}); one per line is needed") from error
    if not lines and not may_be_empty:
        raise DataError(f"{path}: holds no {what}; one per line is needed")
    return lines

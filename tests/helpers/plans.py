"""Sources that have their rows in memory, and plans of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from vitscale_shards.place import LocalPlace
from vitscale_shards.planning import row_tables
from vitscale_shards.planning.plan import Plan
from vitscale_shards.planning.planner import make_plans
from vitscale_shards.planning.settings import PlanSettings
from vitscale_shards.planning.spool import Spool
from vitscale_shards.rows import Row

SPEC: dict[str, Any] = {"locations": ["somewhere"]}
SPLIT = "train=0.7,val=0.3"
ORDERS = ("shuffled", "stratified", "source")


@dataclass
class Listed:
    """A source that has its rows in memory."""

    listed: Sequence[Row]
    classes: tuple[str, ...] | None = ("a", "b", "c")
    multi_label: bool = False
    name: str = "s"
    ignored: Counter[str] = field(default_factory=Counter)

    def rows(self) -> Iterator[Row]:
        yield from self.listed

    def read(self, row: Row) -> bytes:
        raise AssertionError("planning opens no image")


def rows(count: int, start: int = 0) -> list[Row]:
    """Rows of three classes in turn, and of many sizes."""
    return [Row(f"k{i}", (i % 3,), f"c/{i}.jpg", 100 + i * 37 % 5000) for i in range(start, start + count)]


def plan(out: Path, listed: Sequence[Row] | Listed, spec: dict[str, Any] = SPEC, **values: Any) -> dict[str, Plan]:
    """Plans by split; ``values`` are settings."""
    source = listed if isinstance(listed, Listed) else Listed(listed)
    plans = make_plans(source, spec, PlanSettings(**values), LocalPlace(out))
    return {made.head.split: made for made in plans}


def shards(made: Plan) -> list[list[Row]]:
    """Rows of every shard."""
    return [made.rows(shard) for shard in range(made.num_shards)]


def members(made: Plan) -> list[Row]:
    """Rows of all shards in order."""
    return [row for shard in shards(made) for row in shard]


def keys(made: Plan) -> list[str]:
    """Keys of all shards in order."""
    return [row.key for row in members(made)]


def named(folder: Path, name: str, *lines: str) -> str:
    """A file of names, one per line."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return str(folder / name)


def hold(patch: pytest.MonkeyPatch, *, rows_at_a_time: int, rows_in_memory: int) -> None:
    """Let planners have fewer rows in memory than they would."""
    patch.setattr(row_tables, "ROWS_AT_A_TIME", rows_at_a_time)
    patch.setitem(Spool.__init__.__kwdefaults__, "rows_in_memory", rows_in_memory)  # type: ignore[arg-type]


def hash_of(text: str) -> int:
    """The first 64 bits of its SHA-256."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)

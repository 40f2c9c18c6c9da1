"""Which kernel is used on a GPU under ``auto``: the one that was measured to be faster there.

``measured.json`` holds what ``benchmarks/attention.py`` measured: ``{"measurements": [row, ...]}``, a row being an
object with at least

- ``arch``: ``sm_90`` for compute capability 9.0;
- ``head_dim`` and ``tokens``, the shape;
- ``direction``: ``forward``, ``backward``, or ``both`` for one after the other;
- ``best_library``: the fastest library kernel there, by name;
- ``ratio``: the time of that kernel over the time of vitscale's, from bfloat16 inputs.

vitscale's kernel wins where every row of the shape has a ratio of at least 1. At a number of tokens that was not
measured it is used only between two neighbours, of the same architecture, head dimension and direction, that it both
wins; beyond the shortest and the longest measured, and where nothing was measured, never.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch

Direction = Literal["forward", "backward", "both"]
Table = dict[tuple[str, int, str], tuple[tuple[int, bool], ...]]
"""For architecture, head dimension and direction: numbers of tokens, rising, and whether vitscale's kernel wins."""

MEASURED = Path(__file__).with_name("measured.json")


def read_table(rows: Iterable[dict[str, Any]]) -> Table:
    """The table of measured rows; the module's description says what is in one."""
    points: dict[tuple[str, int, str], dict[int, bool]] = {}
    for row in rows:
        wins = points.setdefault((row["arch"], row["head_dim"], row["direction"]), {})
        wins[row["tokens"]] = wins.get(row["tokens"], True) and row["ratio"] >= 1
    return {key: tuple(sorted(wins.items())) for key, wins in points.items()}


_TABLE = read_table(json.loads(MEASURED.read_text())["measurements"])


def choose(
    arch: str, head_dim: int, tokens: int, direction: Direction, table: Table | None = None
) -> Literal["triton", "sdpa"]:
    """The faster kernel for a shape: ``triton`` is vitscale's, ``sdpa`` is torch's.

    Args:
        arch: as :func:`architecture` gives it.
        head_dim: D.
        tokens: N.
        direction: ``both`` where a backward pass follows.
        table: by default what ``measured.json`` holds.
    """
    below = above = False
    for measured, wins in (_TABLE if table is None else table).get((arch, head_dim, direction), ()):
        if measured <= tokens:
            below = wins
        if measured >= tokens:
            above = wins
            break
    return "triton" if below and above else "sdpa"


def architecture(device: torch.device) -> str:
    """``sm_90`` for a GPU of compute capability 9.0."""
    return _architecture(device)


# All that torch.compiler.assume_constant_result does, but that imports the compiler: a second for every process.
architecture._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"

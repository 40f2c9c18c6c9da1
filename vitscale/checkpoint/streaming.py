"""Tensors of a checkpoint one after the other, a few in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from vitscale.checkpoint.format import Checkpoint
from vitscale.checkpoint.reading import Wanted, read_wanted

# Bytes of tensors that are in memory at a time; one tensor may be larger.
GROUP_BYTES = 256 << 20


class Range(NamedTuple):
    """``numel`` elements of a flattened logical tensor from ``start``."""

    name: str
    kind: str
    start: int
    numel: int


def stream(checkpoint: Checkpoint, ranges: Sequence[Range]) -> Iterator[Wanted]:
    """Read ranges in the given order; raises like :func:`~vitscale.checkpoint.reading.read_wanted`.

    Neighbours in the files should be neighbours in the order, since they share reads.
    """
    for group in _groups(ranges):
        yield from _read(checkpoint, group)


def _groups(ranges: Sequence[Range]) -> Iterator[list[Range]]:
    group: list[Range] = []
    size = 0
    for each in ranges:
        if group and size + 4 * each.numel > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(each)
        size += 4 * each.numel
    if group:
        yield group


def _read(checkpoint: Checkpoint, group: list[Range]) -> list[Wanted]:
    wanted = [Wanted(each.name, each.kind, each.start, torch.empty(each.numel)) for each in group]
    read_wanted(checkpoint, wanted)
    return wanted

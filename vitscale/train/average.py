"""An exponential moving average of the weights, kept in the partitions of ZeRO: no communication, 4 bytes per parameter
over all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vitscale.checkpoint.fragments import masters, push_masters


class WeightAverage:
    """The average of a DeepSpeed engine's fp32 master weights.

    Args:
        engine: whose weights are averaged; the average begins with those that it has.
        decay: share of the old average that each step keeps.
    """

    def __init__(self, engine: Any, *, decay: float) -> None:
        self._engine, self._decay = engine, decay
        self.partitions: list[Tensor] = [flat.detach().clone() for flat in masters(engine)]
        """Of this rank, beside those of the master weights."""

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        for average, flat in zip(self.partitions, masters(self._engine), strict=True):
            average.lerp_(flat, 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model compute with the average for the length of a ``with`` block. Collective."""
        self._swap()
        yield
        # Not after an error: other ranks may be gone, and nothing is trained or saved any more.
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, flat in zip(self.partitions, masters(self._engine), strict=True):
            kept = flat.clone()
            flat.copy_(average)
            average.copy_(kept)
        push_masters(self._engine)

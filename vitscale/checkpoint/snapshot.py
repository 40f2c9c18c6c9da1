"""A rank's fragments, copied to host memory as the file that they become."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from vitscale.checkpoint.digest import add_digest
from vitscale.checkpoint.format import BLOCK_BYTES, fragment_key
from vitscale.checkpoint.fragments import Fragment
from vitscale.tensor_file import safetensors_header


class Snapshot:
    """Memory for one copy of a rank's fragments, used again by each save.

    Args:
        pin_memory: page-lock it, for fast copies from a GPU.
    """

    def __init__(self, *, pin_memory: bool) -> None:
        self._pin_memory = pin_memory
        self._header = b""
        self._image = torch.empty(0, dtype=torch.uint8)
        self._fragments: list[tuple[str, str, int, Tensor]] = []

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self._image.numel()

    def take(self, fragments: Sequence[Fragment]) -> None:
        """Copy fragments. They may change when this returns."""
        header = _header(fragments)
        if header != self._header:
            self._allocate(header, fragments)
        for (_, _, _, copy), fragment in zip(self._fragments, fragments, strict=True):
            copy.copy_(fragment.values, non_blocking=True)
        for device in {fragment.values.device for fragment in fragments if fragment.values.is_cuda}:
            torch.cuda.current_stream(device).synchronize()

    def blocks(self, checksums: list[int]) -> Iterator[memoryview]:
        """The file's blocks, each of which adds its CRC-32 to ``checksums``."""
        image = self._image.numpy().data
        for start in range(0, len(image), BLOCK_BYTES):
            block = image[start : start + BLOCK_BYTES]
            checksums.append(zlib.crc32(block))
            yield block

    def digests(self) -> dict[str, int]:
        """By kind, this rank's part of the state's digest."""
        digests: dict[str, int] = {}
        for name, kind, start, values in self._fragments:
            add_digest(digests, name, kind, start, values)
        return digests

    def _allocate(self, header: bytes, fragments: Sequence[Fragment]) -> None:
        size = len(header) + sum(fragment.values.nbytes for fragment in fragments)
        # The old memory goes first.
        self._fragments, self._image = [], torch.empty(0, dtype=torch.uint8)
        if self._pin_memory:
            self._image = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        else:
            # numpy asks the kernel for huge pages, so that the first copy does not wait for each small one.
            self._image = torch.from_numpy(np.empty(size, dtype=np.uint8))
        self._header = header
        self._image[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        end = len(header)
        for fragment in fragments:
            start, end = end, end + fragment.values.nbytes
            copy = self._image[start:end].view(torch.float32)
            self._fragments.append((fragment.name, fragment.kind, fragment.start, copy))


def _header(fragments: Sequence[Fragment]) -> bytes:
    """Of the file of these fragments."""
    entries, end = {}, 0
    for fragment in fragments:
        start, end = end, end + fragment.values.nbytes
        entries[fragment_key(fragment.name, fragment.kind, fragment.start)] = {
            "dtype": "F32",
            "shape": [fragment.values.numel()],
            "data_offsets": [start, end],
        }
    return safetensors_header(entries)

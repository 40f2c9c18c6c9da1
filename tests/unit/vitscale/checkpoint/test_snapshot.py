"""A snapshot is the file that safetensors' own library reads, and nothing changes it after it was taken."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from torch import Tensor

from tests.unit.vitscale.checkpoint.small_state import blocks_of
from vitscale.checkpoint.digest import part_digest
from vitscale.checkpoint.format import BLOCK_BYTES
from vitscale.checkpoint.fragments import Fragment
from vitscale.checkpoint.snapshot import Snapshot

KINDS = ("master", "exp_avg")


def some(*numels: int, seed: int = 0) -> list[Fragment]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Fragment(f"blocks.{index}.weight", kind, 10 * index, torch.randn(numel, generator=generator))
        for index, numel in enumerate(numels)
        for kind in KINDS
    ]


def taken(fragments: list[Fragment]) -> Snapshot:
    snapshot = Snapshot(pin_memory=False)
    snapshot.take(fragments)
    return snapshot


def file_of(snapshot: Snapshot) -> bytes:
    return b"".join(snapshot.blocks([]))


def as_saved(fragments: list[Fragment]) -> dict[str, Tensor]:
    return {f"{fragment.name}|{fragment.kind}|{fragment.start}": fragment.values for fragment in fragments}


def holds(snapshot: Snapshot, fragments: list[Fragment]) -> bool:
    read, saved = load(file_of(snapshot)), as_saved(fragments)
    return read.keys() == saved.keys() and all(torch.equal(read[key], saved[key]) for key in saved)


@settings(deadline=None)
@given(st.lists(st.integers(1, 300), max_size=6), st.sampled_from([1, 64, 100, 4096]))
def test_the_blocks_are_a_safetensors_file(numels: list[int], block_bytes: int) -> None:
    fragments = some(*numels)
    with blocks_of(block_bytes):
        snapshot, checksums = taken(fragments), list[int]()
        blocks = [bytes(block) for block in snapshot.blocks(checksums)]
    assert all(len(block) == block_bytes for block in blocks[:-1])
    assert 0 < len(blocks[-1]) <= block_bytes
    assert checksums == [zlib.crc32(block) for block in blocks]
    data = b"".join(blocks)
    assert snapshot.num_bytes == len(data)
    assert holds(snapshot, fragments)
    assert {key: value.dtype for key, value in load(data).items()} == dict.fromkeys(as_saved(fragments), torch.float32)


def test_a_rank_that_owns_nothing_has_a_file_too() -> None:
    assert load(file_of(taken([]))) == {}


@pytest.mark.parametrize("length", range(1, 70))
def test_data_begin_on_a_cache_line(length: int) -> None:
    data = file_of(taken([Fragment("n" * length, "master", 0, torch.arange(3.0))]))
    header = int.from_bytes(data[:8], "little")
    assert (8 + header) % 64 == 0
    assert list(json.loads(data[8 : 8 + header])) == [f"{'n' * length}|master|0"]
    assert data[8 + header :] == np.arange(3, dtype="<f4").tobytes()


def test_the_file_of_more_than_one_block() -> None:
    fragments = some(BLOCK_BYTES // 4, 5)
    snapshot, checksums = taken(fragments), list[int]()
    assert [len(block) for block in snapshot.blocks(checksums)][:2] == [BLOCK_BYTES, BLOCK_BYTES]
    assert len(checksums) == 3
    assert holds(snapshot, fragments)


def test_what_changes_afterwards_is_not_in_it() -> None:
    fragments = some(50, 20)
    before = [Fragment(f.name, f.kind, f.start, f.values.clone()) for f in fragments]
    snapshot = taken(fragments)
    digests = snapshot.digests()
    for fragment in fragments:
        fragment.values.fill_(torch.nan)
    assert holds(snapshot, before)
    assert snapshot.digests() == digests


def _address(snapshot: Snapshot) -> int:
    return int(np.frombuffer(next(snapshot.blocks([])), np.uint8).ctypes.data)


def test_memory_is_used_again_for_the_same_layout_only() -> None:
    snapshot = taken(some(50, 20, seed=1))
    address = _address(snapshot)
    snapshot.take(some(50, 20, seed=2))
    assert holds(snapshot, some(50, 20, seed=2))
    assert _address(snapshot) == address
    for other in (some(50, 20, 3), some(20, 50), some(50), []):
        snapshot.take(other)
        assert holds(snapshot, other)
        assert snapshot.num_bytes == len(file_of(taken(other)))


def test_digests_are_those_of_the_fragments() -> None:
    fragments = some(50, 20)
    expected = dict.fromkeys(KINDS, 0)
    for fragment in fragments:
        part = part_digest(fragment.name, fragment.kind, fragment.start, fragment.values)
        expected[fragment.kind] = (expected[fragment.kind] + part) % 2**64
    assert taken(fragments).digests() == expected

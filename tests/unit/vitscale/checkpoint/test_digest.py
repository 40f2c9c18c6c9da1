"""The digest of a state: alike for any partition, another one for any other state."""

from __future__ import annotations

import math
import struct

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vitscale.checkpoint.digest as digest_module
from vitscale.checkpoint.digest import part_digest

# Any 32 bits, so that NaN, infinity and negative zero are among them.
BITS = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=60)
PLACES = st.integers(0, 2**40)


def floats(bits: list[int]) -> Tensor:
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


@given(BITS, PLACES, st.data())
def test_the_parts_of_any_split_sum_to_the_whole(bits: list[int], place: int, data: st.DataObject) -> None:
    values = floats(bits)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(bits)), max_size=5)))
    parts = [
        part_digest("w", "master", place + low, values[low:high])
        for low, high in zip([0, *cuts], [*cuts, len(bits)], strict=True)
    ]
    assert sum(parts) % 2**64 == part_digest("w", "master", place, values)


@given(BITS, PLACES)
def test_it_is_the_sum_that_is_stated(bits: list[int], place: int) -> None:
    """Without tensors: bits times places, times a number that only the name gives."""
    total = sum(value * (2 * (place + index) + 1) for index, value in enumerate(bits))
    salt = part_digest("w", "master", 0, floats([1]))
    assert salt % 2
    assert part_digest("w", "master", place, floats(bits)) == total * salt % 2**64


@given(BITS, st.data())
def test_any_changed_element_changes_it(bits: list[int], data: st.DataObject) -> None:
    before = part_digest("w", "master", 0, floats(bits))
    index = data.draw(st.integers(0, len(bits) - 1))
    bits[index] ^= data.draw(st.sampled_from([1 << bit for bit in range(31)]) | st.just(-1))
    assert part_digest("w", "master", 0, floats(bits)) != before


@given(BITS.filter(lambda bits: len(set(bits)) > 1), st.data())
def test_swapped_elements_change_it(bits: list[int], data: st.DataObject) -> None:
    left = data.draw(st.integers(0, len(bits) - 1))
    right = data.draw(st.sampled_from([i for i in range(len(bits)) if bits[i] != bits[left]] or [left]))
    before = part_digest("w", "master", 0, floats(bits))
    changed = bits[left] != bits[right]
    bits[left], bits[right] = bits[right], bits[left]
    assert (part_digest("w", "master", 0, floats(bits)) != before) == changed


def test_swapped_tensors_change_it() -> None:
    """Two parameters of one shape, or two kinds of one parameter."""
    one, other = torch.arange(5.0), torch.arange(5.0) + 1
    for left, right in ((("q", "master"), ("k", "master")), (("q", "exp_avg"), ("q", "exp_avg_sq"))):
        straight = part_digest(*left, 0, one) + part_digest(*right, 0, other)
        crossed = part_digest(*left, 0, other) + part_digest(*right, 0, one)
        assert straight % 2**64 != crossed % 2**64


def test_a_moved_tensor_changes_it() -> None:
    assert part_digest("w", "master", 0, torch.ones(4)) != part_digest("w", "master", 1, torch.ones(4))


def test_values_that_compare_equal_or_never_do_are_told_apart_by_their_bits() -> None:
    digests = [part_digest("w", "master", 0, torch.tensor([value])) for value in (0.0, -0.0, math.nan, math.inf)]
    assert len(set(digests)) == 4
    (nan_bits,) = struct.unpack("<i", struct.pack("<f", math.nan))
    assert digests[2] == part_digest("w", "master", 0, floats([nan_bits]))


def test_nothing_adds_nothing() -> None:
    assert part_digest("w", "master", 7, torch.empty(0)) == 0


@settings(max_examples=20)
@given(st.integers(1, 9))
def test_pieces_of_a_long_tensor_do_not_matter(chunk: int) -> None:
    values = torch.randn(20, generator=torch.Generator().manual_seed(chunk))
    whole, kept = part_digest("w", "master", 3, values), digest_module._CHUNK
    digest_module._CHUNK = chunk
    try:
        assert part_digest("w", "master", 3, values) == whole
    finally:
        digest_module._CHUNK = kept

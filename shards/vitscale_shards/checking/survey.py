"""The quick look at one shard: sizes, and the ends of the member index. Its tar is not read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from vitscale.data.manifest import IDX_VERSION, INDEX_NAME, Member, ShardInfo, parse_idx_line
from vitscale.errors import DataError
from vitscale_shards.checking.faults import SetFault
from vitscale_shards.place import Place
from vitscale_shards.tar import BLOCK, RECORD, key_of

_LAST_LINE_BYTES = 1 << 16


@dataclass(frozen=True)
class ShardSurvey:
    """What can be seen of a shard without reading its tar."""

    name: str
    num_bytes: int | None
    """Size of the tar, or None if it is not there."""

    num_in_idx: int | None
    """Samples of the ``.idx``, or None if it cannot be read."""

    fits_idx: bool
    """Whether the tar ends where one with the last member of the ``.idx`` ends."""

    size_fault: SetFault | None
    idx_fault: SetFault | None


@dataclass(frozen=True)
class _IdxEnds:
    num_samples: int
    end: int
    """Where the last member ends in the tar, with its padding."""

    def fits(self, num_bytes: int) -> bool:
        # An archive ends with two blocks of zeros and is mostly padded to a record.
        return self.end + 2 * BLOCK <= num_bytes < self.end + 2 * BLOCK + RECORD


def survey_shard(place: Place, shard: tuple[str, ShardInfo | None]) -> ShardSurvey:
    """Look at the sizes of a tar and at its ``.idx``.

    Args:
        shard: name of the tar, and what the index says of it if there is an index.

    Raises:
        DataError: the storage does not answer.
    """
    name, expected = shard
    try:
        num_bytes = place.size(name)
    except OSError as error:
        raise unanswered(place, name, error) from error
    if num_bytes is None:
        return ShardSurvey(name, None, None, False, None, None)
    ends, idx_fault = _look_at_idx(place, name)
    size_fault = None
    if expected is not None and num_bytes != expected.num_bytes:
        size_fault = _size_fault(place, expected, num_bytes, ends)
    elif ends is not None:
        idx_fault = _misfit(name, num_bytes, expected, ends)
    num_in_idx, fits_idx = (None, False) if ends is None else (ends.num_samples, ends.fits(num_bytes))
    return ShardSurvey(name, num_bytes, num_in_idx, fits_idx, size_fault, idx_fault)


def unanswered(place: Place, name: str, error: OSError) -> DataError:
    """What to tell if a file that is there cannot be looked at."""
    return DataError(f"{place.url}/{name}: cannot be looked at ({error.strerror or error}); check the storage")


def idx_name_of(name: str) -> str:
    """Name of the member index of a tar."""
    return ShardInfo(name, 0, 0).idx_name


def _look_at_idx(place: Place, name: str) -> tuple[_IdxEnds | None, SetFault | None]:
    idx_name = idx_name_of(name)
    try:
        with place.open(idx_name) as file:
            return _read_ends(file, idx_name), None
    except FileNotFoundError:
        return None, SetFault("idx", idx_name, None, None, "missing")
    except OSError as error:
        return None, SetFault("idx", idx_name, None, None, f"cannot be read ({error.strerror or error})")
    except (ValueError, DataError):
        return None, SetFault("idx", idx_name, None, None, "not a member index in DALI's format v1.2, or cut off")


def _read_ends(file: BinaryIO, idx_name: str) -> _IdxEnds:
    """Read the first and the last line.

    Raises:
        ValueError, DataError: they are not what they should be.
    """
    header = re.fullmatch(rf"{re.escape(IDX_VERSION)} ([0-9]{{1,18}})\n".encode(), file.readline(64))
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _LAST_LINE_BYTES))
    *_, last, rest = [b"", *file.read().split(b"\n")]
    if header is None or rest:
        raise ValueError
    members = parse_idx_line(last.decode(), idx_name)
    return _IdxEnds(int(header[1]), max(m.offset + m.size + -m.size % BLOCK for m in members))


def _misfit(name: str, num_bytes: int, expected: ShardInfo | None, ends: _IdxEnds) -> SetFault | None:
    """What is wrong between an ``.idx`` and a tar of the right size."""
    idx_name = idx_name_of(name)
    if expected is not None and ends.num_samples != expected.num_samples:
        reason = f"lists {ends.num_samples} samples where {INDEX_NAME} says {expected.num_samples}"
        return SetFault("idx", idx_name, 0, None, reason)
    if ends.end > num_bytes:
        reason = f"its last member ends at byte {ends.end}, but {name} has {num_bytes} bytes"
        return SetFault("idx", idx_name, None, None, reason)
    return None


def _size_fault(place: Place, expected: ShardInfo, num_bytes: int, ends: _IdxEnds | None) -> SetFault:
    name = expected.name
    if num_bytes > expected.num_bytes or (ends is not None and ends.fits(num_bytes)):
        return SetFault("size", name, None, None, f"has {num_bytes} bytes where {INDEX_NAME} says {expected.num_bytes}")
    message = f"truncated: {num_bytes} of {expected.num_bytes} bytes"
    cut = None if ends is None else _first_cut(place, name, num_bytes)
    if cut is None:
        return SetFault("size", name, num_bytes, None, message)
    sample, member = cut
    lost = expected.num_samples - sample
    message += f"; the cut is at {member.name}, and {lost} of {expected.num_samples} samples are not whole"
    return SetFault("size", name, num_bytes, key_of(member.name), message)


def _first_cut(place: Place, name: str, num_bytes: int) -> tuple[int, Member] | None:
    """The first member that ends behind the end of the tar, and the position of its sample."""
    try:
        for sample, members in enumerate(read_idx_lines(place, name)):
            for member in members:
                if member.offset + member.size > num_bytes:
                    return sample, member
    except (OSError, ValueError, DataError):
        return None  # a damaged .idx cannot tell; the truncation is told all the same
    return None


def read_idx_lines(place: Place, name: str) -> Iterator[tuple[Member, ...]]:
    """Members of every sample of a tar, by its ``.idx``, line by line.

    Raises:
        OSError, ValueError, DataError: it is missing or not of the format.
    """
    idx_name = idx_name_of(name)
    with place.open(idx_name) as file:
        file.readline()
        for line in file:
            members = parse_idx_line(line.decode().removesuffix("\n"), f"{place.url}/{idx_name}")
            if any(member.offset < BLOCK for member in members):
                raise DataError(f"{place.url}/{idx_name}: a member is said to begin at byte {members[0].offset}")
            yield members

"""Tar members as bytes: deterministic USTAR headers to write, and a walk that notices every damage.

A member is a header of 512 bytes and its content, padded to 512. Two blocks of zeros end the archive, which is padded
to 10,240 bytes (POSIX.1-1988; ``tarfile`` writes the same).
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from vitscale.data.manifest import Member

if TYPE_CHECKING:
    import numpy as np

Sizes = TypeVar("Sizes", int, "np.ndarray[Any, np.dtype[np.int64]]")
BLOCK = 512
RECORD = 10_240
_ZEROS = bytes(RECORD)


class TarError(Exception):
    """Damage at ``offset`` of a tar."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"at byte {offset}: {reason}")
        self.offset = offset
        self.reason = reason


# Everything that could differ between two machines is fixed: mode 0444, owner and group 0, time 0.
_BEFORE_SIZE = b"0000444\0" + b"0000000\0" * 2
_AFTER_SIZE = b"00000000000\0"
_AFTER_SUM = b"0" + bytes(100) + b"ustar\x0000" + b"vitscale".ljust(32, b"\0") * 2 + bytes(183)
_FIXED_SUM = sum(_BEFORE_SIZE + _AFTER_SIZE + b" " * 8 + _AFTER_SUM)


def header(name: str, size: int) -> bytes:
    """USTAR header of a regular file; ``name`` has at most 100 ASCII characters, ``size`` is below 8 GiB."""
    encoded = name.encode("ascii")
    digits = b"%011o\0" % size
    if len(encoded) > 100 or len(digits) != 12:
        raise ValueError(f"no USTAR header for {name!r} of {size} bytes")
    total = _FIXED_SUM + sum(encoded) + sum(digits)
    return b"".join((encoded.ljust(100, b"\0"), _BEFORE_SIZE, digits, _AFTER_SIZE, b"%06o\0 " % total, _AFTER_SUM))


def padding(size: int) -> bytes:
    """What fills a content of ``size`` bytes up to the next block."""
    return _ZEROS[: -size % BLOCK]


def end(size: int) -> bytes:
    """What ends an archive whose members take ``size`` bytes."""
    return _ZEROS[: 2 * BLOCK] + _ZEROS[: -(size + 2 * BLOCK) % RECORD]


def sample_bytes(num_image_bytes: Sizes, num_label_bytes: int = 1) -> Sizes:
    """What a sample takes in a tar, or each of an array of samples: two headers, an image, a label, their padding."""
    label = num_label_bytes + -num_label_bytes % BLOCK
    return 2 * BLOCK + num_image_bytes + -num_image_bytes % BLOCK + label


def walk(file: BinaryIO) -> Iterator[Member]:
    """Members of an uncompressed tar in order; ``extension`` is what follows the first dot of the base name.

    Only headers are read. Folders are passed over.

    Raises:
        TarError: a damaged header, a member cut short, an end that is missing or followed by something else, or a
            member that is neither file nor folder.
    """
    size = file.seek(0, os.SEEK_END)
    offset = 0
    while True:
        file.seek(offset)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise TarError(min(offset, size), f"the tar ends after {size} bytes without an end mark: it is truncated")
        if not any(block):
            _check_end(file, offset, size)
            return
        if not _is_plain(block):
            yield from _walk_slowly(file, offset, size)
            return
        member = _parse(block, offset)
        _check_whole(member, size)
        offset = member.offset + member.size + -member.size % BLOCK
        yield member


def _is_plain(block: bytes) -> bool:
    """Whether this is the header of a regular file with its name in one piece and its size in octal digits."""
    return block[156:157] == b"0" and block[345] == 0 and block[124] < 0x80


def _parse(block: bytes, offset: int) -> Member:
    try:
        if _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * 32:
            raise ValueError
        size = _number(block[124:136])
    except ValueError:
        raise TarError(offset, f"no tar header ({block[:16]!r} ...)") from None
    name = _checked_name(block[:100].partition(b"\0")[0].decode(errors="surrogateescape"), offset)
    return Member(extension_of(name), offset + BLOCK, size, name)


def _number(digits: bytes) -> int:
    digits = digits.partition(b"\0")[0].strip(b" ") or b"0"
    if not digits.isdigit():  # int() would take signs, and a walk that goes back never ends
        raise ValueError
    return int(digits, 8)


def _checked_name(name: str, offset: int) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise TarError(offset, f"the member's name {name!r} is not UTF-8") from None
    return name


def _check_whole(member: Member, size: int) -> None:
    if member.size < 0 or member.offset + member.size > size:
        have = max(0, size - member.offset)
        raise TarError(member.offset, f"{member.name} is truncated: {have} of {member.size} bytes")


def extension_of(name: str) -> str:
    """What follows the first dot of the base name, as webdataset sees it."""
    return name.rpartition("/")[2].partition(".")[2]


def key_of(name: str) -> str:
    """What stands before the first dot of the base name, with its folder."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _check_end(file: BinaryIO, offset: int, size: int) -> None:
    if size - offset < 2 * BLOCK:
        raise TarError(offset, f"the end mark has {size - offset} of {2 * BLOCK} bytes: the tar is truncated")
    file.seek(offset)
    while rest := file.read(1 << 20):
        if any(rest):
            first = next(i for i, byte in enumerate(rest) if byte)
            raise TarError(offset + first, "bytes behind the end mark of the tar")
        offset += len(rest)


def _walk_slowly(file: BinaryIO, offset: int, size: int) -> Iterator[Member]:
    """The rest of a tar with members of other kinds (long names, pax headers, folders), by the standard library."""
    file.seek(offset)
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while info := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # it would remember all of them
                offset = tar.offset
                if info.isdir():
                    continue
                if not info.isreg() or info.issparse():
                    raise TarError(info.offset, f"{info.name} is no regular file but of type {info.type!r}")
                name = _checked_name(info.name, info.offset)
                member = Member(extension_of(name), info.offset_data, info.size, name)
                _check_whole(member, size)
                yield member
    # Crafted headers make it raise more than its own errors.
    except (tarfile.TarError, ArithmeticError, ValueError, RecursionError) as error:
        raise TarError(min(offset, size), f"damaged tar: {error}") from error
    # The library takes damage for the end.
    file.seek(offset)
    if len(block := file.read(BLOCK)) < BLOCK or any(block):
        raise TarError(min(offset, size), "no tar header and no end mark")
    _check_end(file, offset, size)

"""Images that lie inside larger files: a list of where they are, and one read for each.

A place is written ``name@offset+size``, so that a worker needs no list to read an image that it is told of.
"""

from __future__ import annotations

import io
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from vitscale.data.manifest import Member
from vitscale.errors import DataError
from vitscale_shards.rows import MAX_IMAGE_BYTES, BadImageError
from vitscale_shards.tar import BLOCK, TarError, walk

# Files held open for reading by one source; several merged ones must stay below the usual limit of 1,024.
MAX_OPEN = 64
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
_MAGIC = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
    b"PK\x03\x04": ("zip", "unzip"),
}
UNREADABLE = (
    *(OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError),
    *(ValueError, ArithmeticError, RecursionError),  # of crafted headers
)
"""What :func:`open_tar`, and reading on, raises for a file that is damaged or no tar."""

_PLACE = re.compile(r"(?s)(.*)@(\d{1,18})\+(\d{1,18})")
# Longer names, and those that are not ASCII, are not kept whole in the header itself; two bytes for a leading "./".
_NAME_IN_HEADER = 98


def place_of(name: str, offset: int, size: int) -> str:
    """How a stretch of a file is written in :attr:`Row.path`."""
    return f"{name}@{offset}+{size}"


def parse_place(text: str) -> tuple[str, int, int]:
    """Name, offset and size.

    Raises:
        BadImageError: it is no such text.
    """
    if not (match := _PLACE.fullmatch(text)):
        raise BadImageError(f"{text!r} does not say where the image lies (name@offset+size): plan the source again")
    return match[1], int(match[2]), int(match[3])


class _OpenFile:
    """A descriptor that is closed when the last thread has let go of it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size

    def __del__(self) -> None:
        os.close(self.descriptor)


class ArchiveReader:
    """Reads pieces of files, each with one ``pread``. Safe in threads and after a fork: no position is shared."""

    def __init__(self, max_open: int = MAX_OPEN) -> None:
        """Keep the ``max_open`` files open that were used last."""
        self._open = lru_cache(max_open)(_open)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """``size`` bytes of a file.

        Raises:
            BadImageError: the file cannot be read, or ends before that, or it is more than an image can have.
        """
        if size > MAX_IMAGE_BYTES:
            raise BadImageError(f"has {size} bytes; at most {MAX_IMAGE_BYTES} are allowed")
        try:
            file = self._open(path)
            if offset + size > file.size:
                raise BadImageError(
                    f"{path} has {file.size} bytes, but the image ends at {offset + size}: it is truncated or has "
                    f"changed since it was listed"
                )
            return _pread(file.descriptor, offset, size)
        except (OSError, ValueError) as error:
            raise BadImageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error

    def read_member(self, path: str, place: str) -> bytes:
        """A member of a tar, after a look at its header: a tar that was replaced must not yield other bytes.

        Raises:
            BadImageError: the file cannot be read, or the member is no longer there.
        """
        name, offset, size = parse_place(place)
        if offset < BLOCK:
            raise BadImageError(f"{place!r} leaves no room for a tar header: plan the source again")
        data = self.read(path, offset - BLOCK, BLOCK + size)
        base = name.rpartition("/")[2]
        right_name = len(name) > _NAME_IN_HEADER or not name.isascii() or _header_base(data) == base.encode()
        # The size stands at byte 124 in octal digits.
        if not right_name or data[124:136].strip(b" \0").lstrip(b"0") != (b"%o" % size).lstrip(b"0"):
            raise BadImageError(
                f"{path} holds no {base} of {size} bytes at byte {offset}: it has changed since it was listed"
            )
        return data[BLOCK:]


def _open(path: str) -> _OpenFile:
    return _OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def _pread(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size:  # a signal came in between, or the file has become shorter
        if not (more := os.pread(descriptor, size - len(data), offset + len(data))):
            raise ValueError(f"it ends at byte {offset + len(data)}")
        data += more
    return data


def _header_base(header: bytes) -> bytes:
    return header[:100].partition(b"\0")[0].rpartition(b"/")[2]


def members(path: Path, inner: Member | None = None) -> Iterator[Member]:
    """Members of a tar, or of the tar that is a member of it, in order and with their offsets in ``path``.

    Only headers are read.

    Raises:
        DataError: the file cannot be read, is compressed, or is damaged: names the file and the byte.
    """
    base, where = (0, f"{path}") if inner is None else (inner.offset, f"{path}: {inner.name}")
    try:
        with path.open("rb") as outer:
            file: BinaryIO = outer
            if inner is not None:
                file = io.BufferedReader(_Window(outer.fileno(), inner.offset, inner.size), 4096)
            check_uncompressed(file, where)
            for member in walk(file):
                yield Member(member.extension, base + member.offset, member.size, plain_name(member.name))
    except TarError as error:
        raise DataError(
            f"{where}: damaged at byte {base + error.offset}: {error.reason}; copy or download it again"
        ) from error
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror or error}); check the file and its disk") from error


def plain_name(name: str) -> str:
    """The path that unpacking a member gives."""
    if name.startswith((".", "/")) or "//" in name or "/./" in name:
        return "/".join(part for part in name.split("/") if part not in ("", "."))
    return name


class _Window(io.RawIOBase):
    """A stretch of a file as a file of its own."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._start = start
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = max(0, min(len(buffer), self._size - self._position))
        data = os.pread(self._descriptor, size, self._start + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def check_uncompressed(file: BinaryIO, where: str) -> None:
    """See that the bytes of a file can be read in any order; the position is at the start before and afterwards.

    Raises:
        DataError: it is compressed.
    """
    head = file.read(BLOCK)
    file.seek(0)
    if head[257:262] == b"ustar":  # the first bytes are a name, which may begin like anything
        return
    for magic, (kind, command) in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(
                f"{where}: is compressed with {kind}, so that single images cannot be read; unpack it first: {command}"
            )


def check_not_named_compressed(name: str, where: str) -> None:
    """See that a file among tars is not called like a compressed one, which would be passed over.

    Raises:
        DataError: it is.
    """
    if name.lower().endswith(COMPRESSED_SUFFIXES):
        raise DataError(
            f"{where}: {name} is compressed, so that single images cannot be read; unpack it to a .tar first"
        )


def list_folder(folder: Path) -> list[str]:
    """Sorted names of the files in a folder that are not hidden.

    Raises:
        DataError: the folder cannot be listed, or a link leads out of it.
    """
    try:
        with os.scandir(folder) as entries:
            files = sorted((e for e in entries if not e.name.startswith(".") and e.is_file()), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); make it readable") from error
    inside = folder.resolve()
    for entry in files:
        if entry.is_symlink() and not (target := Path(entry.path).resolve()).is_relative_to(inside):
            raise DataError(f"{entry.path}: links to {target}, outside of {folder}; copy or hard-link the file instead")
    return [entry.name for entry in files]


def file_names(folder: Path) -> list[str]:
    """Sorted names of the files in a folder that are not hidden; none if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file())
    except OSError:
        return []


def open_tar(path: Path) -> tarfile.TarFile:
    """A tar to read from its start, which may be compressed with gzip, bzip2 or xz.

    Raises:
        UNREADABLE: it cannot be read, or is no tar.
    """
    with path.open("rb") as file:
        head = file.read(6)
    # To let the library try all kinds is no way: it takes a large file of zeros for LZMA, and unpacks it.
    if head.startswith(b"\x1f\x8b"):
        return tarfile.open(path, "r:gz")
    if head.startswith(b"BZh"):
        return tarfile.open(path, "r:bz2")
    return tarfile.open(path, "r:xz" if head == b"\xfd7zXZ\0" else "r:")


def first_members(path: Path, most: int = 64) -> list[str]:
    """Names of the first files in a tar, which may be compressed with gzip, bzip2 or xz; none if it is no tar.

    Of a folder, those in its first tar that has any; a look at a few tars is enough.
    """
    if path.is_dir():
        tars = [name for name in file_names(path) if name.lower().endswith((".tar", *COMPRESSED_SUFFIXES))]
        return next((names for tar in tars[:16] if (names := first_members(path / tar, most))), [])
    if not path.is_file():
        return []
    try:
        with open_tar(path) as tar:
            return [plain_name(info.name) for info in islice(tar, most) if info.isreg()]
    except UNREADABLE:
        return []

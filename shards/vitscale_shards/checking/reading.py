"""Read a file once, from its beginning to its end, and have its SHA-256 besides, although its reader jumps."""

from __future__ import annotations

import hashlib
import io
import os
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

READ_BYTES = 1 << 20


class DigestingReader(io.BufferedReader):
    """A seekable file whose bytes are also digested.

    What a jump passes over is read all the same, and what is read again is not digested again. Reading roughly forward
    therefore costs one sequential read of the file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._digesting = _DigestingFile(file)
        super().__init__(self._digesting, READ_BYTES)

    @property
    def num_digested(self) -> int:
        """Bytes read so far."""
        return self._digesting.num_digested

    def sha256(self) -> str:
        """Digest of the whole file in hexadecimal; reads what is left of it."""
        return self._digesting.finish()


class _DigestingFile(io.RawIOBase):
    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._sha256 = hashlib.sha256()
        self.num_digested = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        start = self._file.tell()
        if start > self.num_digested:
            self._digest_up_to(start)
        data = self._file.read(len(view))
        view[: len(data)] = data
        if data:
            self._digest(start, data)
        return len(data)

    def finish(self) -> str:
        self._digest_up_to(None)
        return self._sha256.hexdigest()

    def _digest_up_to(self, stop: int | None) -> None:
        """Digest what lies before ``stop``, or all; the file then stands there."""
        self._file.seek(self.num_digested)
        while stop is None or self.num_digested < stop:
            data = self._file.read(READ_BYTES if stop is None else min(READ_BYTES, stop - self.num_digested))
            if not data:
                return
            self._digest(self.num_digested, data)

    def _digest(self, start: int, data: bytes) -> None:
        self._sha256.update(memoryview(data)[max(0, self.num_digested - start) :])
        self.num_digested = max(self.num_digested, start + len(data))

"""Records of steps as JSON lines, which read as one uninterrupted run whatever was killed, resumed and repeated."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from threading import Lock
from typing import Any

from vitscale.durable import publish_text

logger = logging.getLogger(__name__)

# A file in the folder of a run whose checkpoints were removed on purpose: its records are all that it was made for.
CHECKPOINTS_REMOVED = "checkpoints-removed"


class StepRecords:
    """A JSON-lines file whose records carry ``step``. Records of steps that are repeated after a resume move to
    ``<name>.rolled_back.jsonl``, so that the file reads as one uninterrupted run."""

    def __init__(self, path: Path, *, restored_step: int) -> None:
        self._path = path
        self.records = self._roll_back(restored_step)
        self._file = path.open("ab", buffering=0)
        self._lock, self._unwritten, self._warned = Lock(), bytearray(), False

    def append(self, record: dict[str, Any]) -> None:
        """Write one record; it is on its way to the disk when this returns. Numbers that are not finite become null.

        On a full disk it is kept until there is room.
        """
        with self._lock:
            self._unwritten += _to_line(record).encode()
            try:
                self._write()
            except OSError as error:
                if not self._warned:
                    logger.warning("%s cannot be written yet: %s; its records are kept", self._path, error.strerror)
                self._warned = True

    def sync(self) -> None:
        """Wait until the records are on the disk. Any thread may call it.

        Raises:
            OSError: they are not.
        """
        with self._lock:
            self._write()
        os.fsync(self._file.fileno())

    def _write(self) -> None:
        while self._unwritten:
            del self._unwritten[: self._file.write(self._unwritten)]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _roll_back(self, restored_step: int) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        text = self._path.read_text(encoding="utf-8", errors="replace")
        records = [record for record in parse_records(text) if "step" in record]
        kept = [record for record in records if record["step"] <= restored_step]
        undone = [record for record in records if record["step"] > restored_step]
        if undone:
            with self._path.with_suffix(".rolled_back.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(map(_to_line, undone))
        # Unequal also if only the last line break is missing, to which the next record would be glued.
        if (clean := "".join(map(_to_line, kept))) != text:
            publish_text(self._path, clean)
        return kept


def _to_line(record: dict[str, Any]) -> str:
    # JSON has no word for infinity, and no reader but Python's takes the one that json.dumps would write.
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a JSON-lines file, without what a killed process left of a line; none if there is no file."""
    return parse_records(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else []


def parse_records(text: str) -> list[dict[str, Any]]:
    """The records of such a file's text."""
    return [record for line in text.splitlines() if isinstance(record := _parse(line), dict)]


def _parse(line: str) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None

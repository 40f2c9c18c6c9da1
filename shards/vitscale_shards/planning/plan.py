"""Which image goes into which shard, on disk: a file that every worker follows.

``plan.parquet`` of a split has one row group per shard, with the rows of that shard in order.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vitscale.errors import DataError
from vitscale_shards.images import Treatment
from vitscale_shards.place import Place
from vitscale_shards.rows import Row

PLAN_NAME = "plan.parquet"
PLAN_VERSION = 1
METADATA = b"vitscale"
COLUMNS = pa.schema(
    [("key", pa.string()), ("labels", pa.list_(pa.int32())), ("path", pa.string()), ("num_bytes", pa.int64())]
)


@dataclass(frozen=True)
class PlanHead:
    """What a plan says besides its rows."""

    split: str
    splits: tuple[str, ...]
    """All splits that were planned together."""

    source_name: str
    source: dict[str, Any]
    """How to open the source again; where it lies plays no part in the digest."""

    classes: tuple[str, ...] | None
    multi_label: bool
    settings: dict[str, Any]
    label_counts: tuple[int, ...] = ()
    """Images with each label, from 0 to the largest that occurs."""

    digest: str = ""
    """Identity: equal digests mean the same names, labels, places and treatment (not the same pixels)."""

    @property
    def treatment(self) -> Treatment:
        """How the images are to be checked and encoded."""
        return Treatment(**self.settings["treatment"])


class Plan:
    """A plan on disk."""

    def __init__(self, place: Place) -> None:
        """Open the plan of a split's folder.

        Raises:
            DataError: there is none, or it cannot be read.
        """
        self.place = place
        try:
            self._file = pq.ParquetFile(place.open(PLAN_NAME), page_checksum_verification=True)
            content = json.loads((self._file.metadata.metadata or {})[METADATA])
            version = content.pop("version")
            if version == PLAN_VERSION:
                self.head = _head(content)
        except FileNotFoundError:
            raise DataError(f"{place.url}: has no plan; make one with 'vitscale shards plan SOURCE OUT'") from None
        except (DataError, OSError, pa.ArrowException, AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(error) from error
        if version != PLAN_VERSION:
            raise DataError(
                f"{place.url}/{PLAN_NAME}: version {version}; this vitscale reads {PLAN_VERSION}: use the vitscale "
                f"that made it, or choose another OUT"
            )

    @property
    def num_shards(self) -> int:
        """Planned tars."""
        return int(self._file.metadata.num_row_groups)

    @property
    def num_samples(self) -> int:
        """Images in all shards."""
        return int(self._file.metadata.num_rows)

    def shard_name(self, shard: int) -> str:
        """File name of a tar."""
        return f"{self.head.split}-{shard:06d}.tar"

    def shard_size(self, shard: int) -> int:
        """Images in one shard."""
        return int(self._file.metadata.row_group(shard).num_rows)

    def rows(self, shard: int) -> list[Row]:
        """The images of one shard in order.

        Raises:
            DataError: the file is damaged there.
        """
        try:
            columns = self._file.read_row_group(shard).to_pydict()
            return [
                Row(key, tuple(labels), path, num_bytes)
                for key, labels, path, num_bytes in zip(*(columns[name] for name in COLUMNS.names), strict=True)
            ]
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> DataError:
        reason = " ".join(str(error).split())
        return DataError(
            f"{self.place.url}/{PLAN_NAME}: cannot be read ({reason}); remove it and give the command again that made "
            f"it"
        )


def _head(content: dict[str, Any]) -> PlanHead:
    for name in ("splits", "label_counts", "classes"):
        content[name] = None if content[name] is None else tuple(content[name])
    head = PlanHead(**content)
    _ = head.treatment  # raises if there is no such treatment
    return head

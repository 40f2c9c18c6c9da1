"""What is known of the finished shards of a set that is being written: one small file each, in ``.progress``."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from vitscale.data.manifest import INDEX_NAME, ShardInfo
from vitscale_shards.place import Place
from vitscale_shards.planning.plan import Plan
from vitscale_shards.writing.compose import Failure

PROGRESS = ".progress"
FINISHED_NAME = "finished.jsonl"
FORMER_INDEX_NAME = "former-index"
READERS = 16
FAILURES_NAME = "failures.jsonl"


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard. One all of whose images are bad has no samples and no file."""

    shard: ShardInfo
    failures: tuple[Failure, ...]


class Records:
    """The records of one set; keeps those that it has read.

    ``num_done`` rows are in the shards that they tell of, ``num_failures`` images were left out there.
    """

    def __init__(self, plan: Plan) -> None:
        self._place = plan.place
        self._digest = plan.head.digest
        self._known: dict[str, ShardRecord] = {}
        self._opened = False
        self.num_done = 0
        self.num_failures = 0

    def refresh(self) -> frozenset[str]:
        """Read the new records.

        Returns:
            Names of all files in ``.progress``.
        """
        names = self._place.names(PROGRESS)
        new = [name for name in names if name.endswith(".tar.json") and name.removesuffix(".json") not in self._known]
        if not self._opened and FINISHED_NAME in names:
            new.append(FINISHED_NAME)
        try:
            texts = self._read([f"{PROGRESS}/{name}" for name in new])
        except FileNotFoundError:  # another worker has just put the set together, and tidied up
            return frozenset()
        self._opened = True
        self._take([json.loads(line) for text in texts for line in text.splitlines()])
        return frozenset(names)

    def _read(self, names: list[str]) -> list[str]:
        """Small files; many side by side, since object storage takes its time for each."""
        if len(names) < 2:
            return [self._place.read_text(name) for name in names]
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(self._place.read_text, names))

    def get(self, shard_name: str) -> ShardRecord | None:
        """Record of a shard, or None."""
        return self._known.get(shard_name)

    def all(self) -> list[ShardRecord]:
        """Those known, in the order of the shards."""
        return [self._known[name] for name in sorted(self._known)]

    def failures(self) -> list[Failure]:
        """Images left out of the finished shards."""
        return [failure for record in self.all() for failure in record.failures]

    def add(self, record: ShardRecord) -> None:
        """Publish a record. The shard's files must be durable: the record must not outlive the names it vouches for."""
        self._place.publish_text(f"{PROGRESS}/{record.shard.name}.json", self._line(record))
        self._keep(record)

    def reopen(self, records: list[ShardRecord]) -> None:
        """Make a complete set one that is being written, of which these shards are finished.

        From here on, any worker goes on with the others.
        """
        lines = "".join(self._line(record) + "\n" for record in records)
        if self._place.size(INDEX_NAME) is not None:
            self._place.publish_text(f"{PROGRESS}/{FORMER_INDEX_NAME}", self._place.read_text(INDEX_NAME))
        self._place.publish_text(f"{PROGRESS}/{FINISHED_NAME}", lines)
        self._place.sync()
        self._place.remove(INDEX_NAME)

    def close_again(self) -> None:
        """Undo :meth:`reopen`: the former index, if there was one, is what counts."""
        former = f"{PROGRESS}/{FORMER_INDEX_NAME}"
        if self._place.size(INDEX_NAME) is None and self._place.size(former) is not None:
            self._place.publish_text(INDEX_NAME, self._place.read_text(former))
            self._place.sync()
            self._place.remove_folder(PROGRESS)

    def _line(self, record: ShardRecord) -> str:
        return json.dumps({"plan": self._digest, **asdict(record)})

    def _take(self, contents: list[dict[str, Any]]) -> None:
        """Keep the records whose files are still there."""
        infos = [ShardInfo(**content["shard"]) for content in contents]
        sizes = self._place.sizes({name for info in infos for name in (info.name, info.idx_name)})
        for info, content in zip(infos, contents, strict=True):
            whole = not info.num_samples or (sizes.get(info.name) == info.num_bytes and info.idx_name in sizes)
            if content["plan"] == self._digest and whole:
                self._keep(ShardRecord(info, tuple(Failure(**failure) for failure in content["failures"])))

    def _keep(self, record: ShardRecord) -> None:
        if record.shard.name in self._known:  # of a complete set, and again of its shard that was lost since
            return
        self._known[record.shard.name] = record
        self.num_done += record.shard.num_samples + len(record.failures)
        self.num_failures += len(record.failures)


def publish_failures(place: Place, failures: list[Failure]) -> None:
    """Write ``failures.jsonl``, or remove it if there are none."""
    if failures:
        place.publish_text(FAILURES_NAME, "".join(json.dumps(asdict(failure)) + "\n" for failure in failures))
    else:
        place.remove(FAILURES_NAME)


def read_failures(place: Place) -> list[Failure]:
    """The content of ``failures.jsonl``; empty if there is no such file."""
    if place.size(FAILURES_NAME) is None:
        return []
    return [Failure(**json.loads(line)) for line in place.read_text(FAILURES_NAME).splitlines()]

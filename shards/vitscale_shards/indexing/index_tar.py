"""Index one foreign tar: write its ``.idx`` and note what the set's index needs to know. The tar is only read."""

from __future__ import annotations

import errno
import json
import re
from dataclasses import asdict, dataclass
from typing import BinaryIO

from vitscale.data.manifest import Member, format_idx
from vitscale.data.stream import LABEL_EXTENSIONS
from vitscale.errors import DataError
from vitscale_shards.checking.faults import printable
from vitscale_shards.checking.keys import Hashes, hash_keys
from vitscale_shards.checking.reading import DigestingReader
from vitscale_shards.checking.samples import Part, SampleError, as_sample, group_samples, read_parts
from vitscale_shards.checking.survey import idx_name_of, read_idx_lines
from vitscale_shards.checking.whole_set import INDEXING
from vitscale_shards.place import Place
from vitscale_shards.sources.archive import check_uncompressed
from vitscale_shards.tar import TarError, key_of, walk

_LABELS = frozenset(LABEL_EXTENSIONS)
_WHITE = re.compile(r"\s")
_CURE = (
    'a sample needs one image and its label, KEY.cls with a whole number or KEY.json with {"labels": [...]}; '
    "'vitscale shards write' reads other tars, too, and writes them anew"
)


@dataclass(frozen=True)
class IndexedTar:
    """What is known of a tar whose ``.idx`` is written; kept as JSON until the whole set is indexed."""

    name: str
    num_bytes: int
    modified: float | None
    sha256: str | None
    idx_bytes: int
    num_samples: int
    multi_label: bool
    first_key: str
    max_label: int
    """The largest label, -1 if there is none."""

    max_label_key: str
    max_label_offset: int


@dataclass(frozen=True)
class TarIndexer:
    """Indexes the tars of ``source``; writes to ``target``."""

    source: Place
    target: Place
    checksums: bool

    def __call__(self, name: str) -> tuple[IndexedTar, Hashes] | DataError:
        """What is known of a tar now, and its keys; or what is wrong with it. Called in several processes."""
        try:
            num_bytes = self.source.size(name)
            if num_bytes is None:
                return DataError(f"{self.source.url}/{name}: no such file, or no answer; name only tars that are there")
            modified = self._modified(name)
            earlier = self._earlier(name, num_bytes, modified)
            if earlier is not None:
                lines = read_idx_lines(self.target, name) if earlier.num_samples else ()
                return earlier, hash_keys([key_of(members[0].name) for members in lines])
            return self._index(name, num_bytes, modified)
        except DataError as error:
            return error
        except TarError as error:
            return DataError(
                f"{self.source.url}/{name}: at byte {error.offset}: {error.reason}; the tar is damaged: get it again"
            )
        except OSError as error:
            return DataError(f"{self.source.url}/{name}: cannot be indexed ({error}); mend that and try again")

    def _index(self, name: str, num_bytes: int, modified: float | None) -> tuple[IndexedTar, Hashes]:
        where = f"{self.source.url}/{name}"
        found = _Samples(where)
        sha256 = None
        with self.source.open(name) as file:
            check_uncompressed(file, where)
            if self.checksums:
                reader = DigestingReader(file)
                found.read(reader)
                sha256 = reader.sha256()
            else:
                found.read(file)
        idx = format_idx(found.members)
        tar = IndexedTar(
            name=name,
            num_bytes=num_bytes,
            modified=modified,
            sha256=sha256,
            idx_bytes=len(idx.encode()),
            num_samples=len(found.members),
            multi_label=found.multi_label,
            first_key=next(iter(found.keys), ""),
            max_label=found.max_label,
            max_label_key=found.max_label_key,
            max_label_offset=found.max_label_offset,
        )
        if tar.num_samples:
            self._publish_idx(idx_name_of(name), idx)
        self.target.publish_text(f"{INDEXING}/{name}.json", json.dumps(asdict(tar)))
        return tar, hash_keys(list(found.keys))

    def _publish_idx(self, idx_name: str, idx: str) -> None:
        """Write an ``.idx``, in the place of another member index but of nothing else."""
        if self.target.size(idx_name) is not None:
            with self.target.open(idx_name) as file:
                if file.read(3) != b"v1.":
                    raise DataError(
                        f"{self.target.url}/{idx_name}: is there already and no member index of DALI's; move it away, "
                        f"or have the index written elsewhere with --out FOLDER"
                    )
        self.target.publish_text(idx_name, idx)

    def _earlier(self, name: str, num_bytes: int, modified: float | None) -> IndexedTar | None:
        """What an interrupted indexing found, if that still holds."""
        try:
            tar = IndexedTar(**json.loads(self.target.read_text(f"{INDEXING}/{name}.json")))
        except (FileNotFoundError, ValueError, TypeError):  # none, or of another version
            return None
        same = (tar.name, tar.num_bytes, tar.modified) == (name, num_bytes, modified)
        has_idx = not tar.num_samples or self.target.size(idx_name_of(name)) == tar.idx_bytes
        return tar if same and has_idx and (tar.sha256 is not None) == self.checksums else None

    def _modified(self, name: str) -> float | None:
        try:
            return self.source.modified(name)
        except OSError as error:
            if error.errno == errno.ENOSYS:  # over HTTP, nobody says
                return None
            raise


class _Samples:
    """The samples of one tar, seen one after the other."""

    def __init__(self, where: str) -> None:
        self._where = where
        self.keys: dict[str, None] = {}
        self.members: list[list[Member]] = []
        self.multi_label = False
        self.max_label, self.max_label_key, self.max_label_offset = -1, "", 0

    def read(self, file: BinaryIO) -> None:
        """Walk through a tar, and read its labels.

        Raises:
            DataError: training could not use one of its samples.
            TarError: it is damaged.
        """
        for key, parts in group_samples(read_parts(file, walk(file), _LABELS)):
            try:
                self._add(key, parts)
            except SampleError as error:
                raise DataError(
                    f"{self._where}: sample {printable(key)} at byte {error.offset}: {printable(error.reason)}; {_CURE}"
                ) from error

    def _add(self, key: str, parts: list[Part]) -> None:
        members = [part.member for part in parts]
        for member in members:
            if not member.extension or not member.name.isprintable() or _WHITE.search(member.name):
                raise SampleError(member.offset, f"{member.name!r} has a character that an .idx cannot hold")
        if key in self.keys:
            raise SampleError(members[0].offset, "the key stands for an earlier sample, or its members are torn apart")
        sample = as_sample(key, parts)
        labels = sample.labels()
        if self.members and sample.multi_label != self.multi_label:
            raise SampleError(sample.label.member.offset, f"the label is in {sample.label.member.name}, others are not")
        if labels and max(labels) > self.max_label:
            self.max_label, self.max_label_key = max(labels), key
            self.max_label_offset = sample.label.member.offset
        self.multi_label = sample.multi_label
        self.keys[key] = None
        self.members.append(members)

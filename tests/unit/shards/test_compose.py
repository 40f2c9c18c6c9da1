"""The bytes of one shard equal those of other tools, with or without a file."""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.shardset import image_bytes
from vitscale.data.manifest import Member
from vitscale_shards.images import Treatment
from vitscale_shards.rows import BadImageError, Row
from vitscale_shards.writing.compose import TarStream, compose, from_source, label_member

KEYS = st.text("abcXYZ019_-", min_size=1, max_size=90)
# Around the sizes where padding begins, and enough for several of tar's records of 10,240 bytes.
SIZES = st.sampled_from([0, 1, 511, 512, 513, 1024, 8191, 9728, 10_240]) | st.integers(0, 3000)
SAMPLES = st.dictionaries(KEYS, st.tuples(SIZES, st.sampled_from(["jpg", "png", "webp"])), max_size=12)


@dataclass
class Given:
    """A source of given bytes; what is no bytes is raised."""

    images: dict[str, bytes | Exception]
    name = "given"
    classes: tuple[str, ...] | None = None
    multi_label: bool = False
    ignored: Counter[str] = field(default_factory=Counter)

    def rows(self) -> Iterator[Row]:
        return iter(rows_of(self.images))

    def read(self, row: Row) -> bytes:
        image = self.images[row.path]
        if isinstance(image, Exception):
            raise image
        return image


def rows_of(images: dict[str, bytes | Exception]) -> list[Row]:
    return [Row(f"key-{path}", (i,), path) for i, path in enumerate(images)]


def streamed(samples: dict[str, dict[str, bytes]], file: io.BytesIO | None) -> TarStream:
    stream = TarStream(file)
    for key, parts in samples.items():
        stream.add(key, parts)
    stream.finish()
    return stream


def parts_of(sizes: dict[str, tuple[int, str]]) -> dict[str, dict[str, bytes]]:
    return {key: {extension: b"\x5a" * size, "cls": b"%d" % size} for key, (size, extension) in sizes.items()}


@given(SAMPLES)
def test_a_tar_is_the_one_that_webdataset_writes(sizes: dict[str, tuple[int, str]]) -> None:
    samples = parts_of(sizes)
    ours, theirs = io.BytesIO(), io.BytesIO()
    streamed(samples, ours)
    with webdataset.TarWriter(theirs, user="vitscale", group="vitscale", mode=0o444, mtime=0, encoder=False) as writer:
        for key, parts in samples.items():
            writer.write({"__key__": key, **parts})
    assert ours.getvalue() == theirs.getvalue()


@given(SAMPLES)
def test_members_are_where_tarfile_finds_them(sizes: dict[str, tuple[int, str]]) -> None:
    file = io.BytesIO()
    stream = streamed(parts_of(sizes), file)
    file.seek(0)
    with tarfile.open(fileobj=file) as tar:
        infos = tar.getmembers()
    found = [Member(info.name.partition(".")[2], info.offset_data, info.size, info.name) for info in infos]
    assert [member for members in stream.members for member in members] == found
    assert all(a.name.partition(".")[0] == b.name.partition(".")[0] for a, b in stream.members)


@given(SAMPLES)
def test_size_and_digest_are_those_of_the_file_and_need_none(sizes: dict[str, tuple[int, str]]) -> None:
    file = io.BytesIO()
    stream, computed = streamed(parts_of(sizes), file), streamed(parts_of(sizes), None)
    data = file.getvalue()
    assert stream.num_bytes == computed.num_bytes == len(data)
    assert stream.sha256.hexdigest() == computed.sha256.hexdigest() == hashlib.sha256(data).hexdigest()
    assert stream.members == computed.members


@pytest.mark.parametrize("labels", [(), (3,), (5, 1), (1, 5, 1 << 31)])
def test_many_labels_make_a_json_member(labels: tuple[int, ...]) -> None:
    extension, data = label_member(labels, multi_label=True)
    assert (extension, json.loads(data)) == ("json", {"labels": list(labels)})


@pytest.mark.parametrize(("label", "text"), [(0, b"0"), (21_842, b"21842")])
def test_one_label_makes_a_cls_member(label: int, text: bytes) -> None:
    assert label_member((label,), multi_label=False) == ("cls", text)


@dataclass
class Told:
    """What compose tells while it works."""

    failures: list[tuple[str, str]] = field(default_factory=list)
    rows: int = 0

    def failed(self, row: Row, reason: str) -> None:
        self.failures.append((row.path, reason))

    def advance(self) -> None:
        self.rows += 1


def composed(source: Given, rows: Sequence[Row], *, multi_label: bool = False) -> tuple[dict[str, bytes], Told]:
    file, told = io.BytesIO(), Told()
    image_of = from_source(source, Treatment())
    compose(file, rows, image_of, multi_label=multi_label, failed=told.failed, advance=told.advance)
    file.seek(0)
    with tarfile.open(fileobj=file) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}, told  # type: ignore[union-attr]


def test_rows_come_in_order_with_their_labels_and_source_bytes() -> None:
    images = {f"{i}.jpg": image_bytes(i, kind="jpg" if i % 2 else "png") for i in range(6)}
    members, told = composed(Given(dict(images)), rows_of(dict(images)))
    expected = [
        pair
        for i, (path, image) in enumerate(images.items())
        for pair in [(f"key-{path}.cls", b"%d" % i), (f"key-{path}.{'jpg' if i % 2 else 'png'}", image)]
    ]
    assert list(members.items()) == expected  # the extension says what the file is, not how it was called
    assert told == Told(rows=6)


def test_bad_images_are_left_out_and_told() -> None:
    good = image_bytes(1)
    images = {"a": good, "b": b"no image", "c": BadImageError("cannot be read: Input/output error"), "d": good}
    members, told = composed(Given(images), rows_of(images))
    assert list(members) == ["key-a.cls", "key-a.png", "key-d.cls", "key-d.png"]
    assert told.failures == [("b", "no known image header in 8 bytes"), ("c", "cannot be read: Input/output error")]
    assert told.rows == 4


def test_an_error_of_the_system_while_reading_is_a_bad_image_too() -> None:
    """It must not look like a full disk below the shards."""
    images: dict[str, bytes | Exception] = {"a": FileNotFoundError(2, "No such file or directory", "/photos/a")}
    _, told = composed(Given(images), rows_of(images))
    assert told.failures == [("a", "cannot be read: No such file or directory")]


@pytest.mark.parametrize(("planned", "fits"), [(-1, False), (0, True), (1, False), (None, True)])
def test_another_size_than_planned_is_a_failure(planned: int | None, fits: bool) -> None:
    image = image_bytes(0)
    size = 0 if planned is None else len(image) + planned  # 0: the source did not know it
    _, told = composed(Given({"a": image}), [Row("a", (0,), "a", size)])
    reason = f"has {len(image)} bytes, {size} when it was planned: the source changed since"
    assert told.failures == ([] if fits else [("a", reason)])


def test_many_labels_are_written_as_json() -> None:
    rows = [Row("a", (), "a"), Row("b", (2, 0), "b")]
    members, _ = composed(Given({"a": image_bytes(0), "b": image_bytes(1)}), rows, multi_label=True)
    assert {name: json.loads(data) for name, data in members.items() if name.endswith(".json")} == {
        "a.json": {"labels": []},
        "b.json": {"labels": [2, 0]},
    }
    assert all(a < b for a, b in pairwise(members))


def test_images_are_treated_on_their_way() -> None:
    source, file = Given({"a": image_bytes(0, hw=(40, 60))}), io.BytesIO()
    image_of = from_source(source, Treatment(resize_short=20))
    stream = compose(file, rows_of(source.images), image_of, multi_label=False, failed=Told().failed)
    ((_, image),) = stream.members
    assert image.extension == "jpg"
    assert file.getvalue()[image.offset :][:2] == b"\xff\xd8"


def test_who_is_told_of_a_failure_may_end_it() -> None:
    def give_up(row: Row, reason: str) -> None:
        raise KeyError(row.path)

    with pytest.raises(KeyError):
        compose(
            None, [Row("a", (0,), "a")], from_source(Given({"a": b""}), Treatment()), multi_label=False, failed=give_up
        )

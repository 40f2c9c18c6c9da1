"""Headers against webdataset's writer, the walk against the standard library's, and damage at every single byte."""

import gzip
import io
import struct
import tarfile
from collections.abc import Callable, Sequence
from itertools import islice

import pytest
import webdataset as wds
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vitscale.data.manifest import Member
from vitscale_shards import tar
from vitscale_shards.tar import BLOCK, RECORD, TarError, walk

KEYS = st.from_regex(r"[A-Za-z0-9_-]{1,90}", fullmatch=True)
EXTENSIONS = st.sampled_from(["jpg", "cls", "json", "tif"])
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def archive(members: Sequence[tuple[str, bytes | None]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar by the standard library; without bytes a member is a folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
                file.addfile(info)
            else:
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def walked(data: bytes) -> list[Member]:
    # More members than blocks: a walk that goes in circles is told from one that ends.
    members = list(islice(walk(io.BytesIO(data)), len(data) // BLOCK + 1))
    assert len(members) <= len(data) // BLOCK
    return members


def by_tarfile(data: bytes) -> list[Member]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8") as file:
        return [
            Member(info.name.rpartition("/")[2].partition(".")[2], info.offset_data, info.size, info.name)
            for info in file
            if info.isreg()
        ]


def resummed(header: bytes) -> bytes:
    """A header with the check sum that fits it."""
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


def with_field(header: bytes, start: int, content: bytes) -> bytes:
    return resummed(header[:start] + content + header[start + len(content) :])


# Writing.


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(KEYS, st.dictionaries(EXTENSIONS, st.binary(max_size=1200), min_size=1), max_size=8))
def test_archives_are_webdatasets_to_the_byte(samples: dict[str, dict[str, bytes]]) -> None:
    buffer = io.BytesIO()
    writer = wds.TarWriter(buffer, user="vitscale", group="vitscale", mode=0o444, mtime=0, encoder=False)
    ours = b""
    for key, parts in samples.items():
        writer.write({"__key__": key, **parts})
        for extension, data in sorted(parts.items()):
            ours += tar.header(f"{key}.{extension}", len(data)) + data + tar.padding(len(data))
    writer.close()
    assert ours + tar.end(len(ours)) == buffer.getvalue()


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=100), st.integers(0, 8**11 - 1))
def test_headers_of_any_size_are_the_standard_librarys(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = size, 0o444, "vitscale", "vitscale"
    assert tar.header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(("name", "size"), [("x" * 101, 1), ("é.jpg", 1), ("a.jpg", 8**11)])
def test_what_a_header_cannot_say_is_refused(name: str, size: int) -> None:
    with pytest.raises(ValueError, match=r"no USTAR header|ascii"):
        tar.header(name, size)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 3 * RECORD))
def test_padding_fills_blocks_and_records(size: int) -> None:
    assert (size + len(tar.padding(size))) % BLOCK == 0
    assert len(tar.padding(size)) < BLOCK
    size += -size % BLOCK
    assert (size + len(tar.end(size))) % RECORD == 0
    assert 2 * BLOCK <= len(tar.end(size)) < 2 * BLOCK + RECORD
    assert not any(tar.end(size) + tar.padding(size))


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=2000), st.binary(max_size=700))
def test_the_bytes_of_a_sample_are_counted(image: bytes, label: bytes) -> None:
    pieces = [tar.header("k.x", len(data)) + data + tar.padding(len(data)) for data in (image, label)]
    assert tar.sample_bytes(len(image), len(label)) == len(b"".join(pieces))


# Reading.

NAME_PART = st.text(
    st.characters(min_codepoint=33, exclude_characters="/", exclude_categories=["Cs"]), min_size=1, max_size=60
).filter(lambda part: part not in (".", ".."))
NAMES = st.lists(NAME_PART, min_size=1, max_size=6).map("/".join)
MEMBERS = st.lists(st.tuples(NAMES, st.one_of(st.none(), st.binary(max_size=1100))), max_size=6)


@settings(deadline=None, max_examples=60)
@given(MEMBERS, st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
@example([("a.jpg", b"1"), ("x" * 200 + ".jpg", b"2"), ("b.jpg", b"")], tarfile.GNU_FORMAT)
@example([("folder", None), ("folder/é.a.b", b"1")], tarfile.PAX_FORMAT)
def test_the_walk_finds_what_the_standard_library_finds(members: list[tuple[str, bytes | None]], format: int) -> None:
    data = archive(members, format)
    found = walked(data)
    assert found == by_tarfile(data)
    assert [data[m.offset : m.offset + m.size] for m in found] == [c for _, c in members if c is not None]


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_members_may_be_read_during_the_walk(format: int) -> None:
    contents = {f"{'deep/' * (i % 2 * 30)}{i}.bin": bytes([i]) * 700 for i in range(6)}
    data = archive(list(contents.items()), format)
    file, found = io.BytesIO(data), {}
    for member in walk(file):
        file.seek(member.offset)
        found[member.name] = file.read(member.size)
    assert found == contents


def test_old_and_large_kinds_of_headers_are_understood() -> None:
    plain = tar.header("a.jpg", 3)
    v7_file = with_field(plain, 156, b"\0")
    v7_folder = with_field(with_field(tar.header("folder/", 0), 156, b"\0"), 257, bytes(8))
    binary_size = with_field(plain, 124, b"\x80" + (3).to_bytes(11, "big"))
    blank_size = with_field(tar.header("empty", 0), 124, b" " * 12)
    spaced = with_field(plain, 124, b"          3\0")
    content = b"123" + bytes(509)
    body = v7_file + content + v7_folder + binary_size + content + blank_size + spaced + content
    data = body + tar.end(len(body))
    assert [(m.name, m.size) for m in walked(data)] == [("a.jpg", 3), ("a.jpg", 3), ("empty", 0), ("a.jpg", 3)]
    assert walked(data) == by_tarfile(data)
    data = spaced + content + blank_size + tar.end(3 * BLOCK)
    assert walked(data) == by_tarfile(data)


def test_a_name_ends_at_its_first_zero() -> None:
    data = with_field(tar.header("a.jpg", 0), 0, b"a\0.jpg") + tar.end(BLOCK)
    assert [member.name for member in walked(data)] == [member.name for member in by_tarfile(data)] == ["a"]


@pytest.mark.parametrize("kind", [b"0", b"\0"])
def test_a_name_that_is_not_utf8_is_told(kind: bytes) -> None:
    data = tar.header("a.jpg", 0) + with_field(with_field(tar.header("b.jpg", 0), 0, b"\xff"), 156, kind)
    with pytest.raises(TarError, match="is not UTF-8") as caught:
        walked(data + tar.end(len(data)))
    assert caught.value.offset == BLOCK


# Damage.

SMALL = [("a.jpg", b"x" * 700), ("empty.cls", b""), ("b.cls", b"7")]
ODD = [("a.jpg", b"x" * 700), ("folder", None), ("folder/" + "long" * 40 + ".jpg", b"y" * 600), ("b.cls", b"7")]
ARCHIVES = {
    "plain": archive(SMALL),
    "gnu": archive(ODD, tarfile.GNU_FORMAT),
    "pax": archive(ODD, tarfile.PAX_FORMAT),
    "odd from the start": archive(ODD[1:], tarfile.PAX_FORMAT),
}
each_archive = pytest.mark.parametrize("data", ARCHIVES.values(), ids=ARCHIVES)


def end_of_content(data: bytes) -> int:
    last = by_tarfile(data)[-1]
    return last.offset + last.size + -last.size % BLOCK


def thinned(places: range) -> list[int]:
    """Those at the borders of blocks, and every 23rd."""
    return [place for place in places if (place + 2) % BLOCK < 5 or place % 23 == 0]


def error_of(data: bytes) -> TarError | None:
    try:
        walked(data)
    except TarError as error:
        return error
    return None


@each_archive
def test_every_truncation_is_told(data: bytes) -> None:
    members = by_tarfile(data)
    needed = end_of_content(data) + 2 * BLOCK
    for length in thinned(range(needed)):
        error = error_of(data[:length])
        assert error is not None, length
        # What is cut begins there: a header, what belongs to it, a content, or the end mark.
        started = max((m.offset for m in members if m.offset <= length), default=0)
        assert min(started, length - BLOCK) <= error.offset <= length, (length, error)
    for length in thinned(range(needed, len(data) + 1)):
        assert walked(data[:length]) == members


@each_archive
def test_every_flipped_byte_of_a_header_is_told(data: bytes) -> None:
    """Or plays no part, as a space or a zero at the end of the check sum."""
    members = by_tarfile(data)
    starts = [place for place in range(0, end_of_content(data), BLOCK) if data[place + 257 : place + 262] == b"ustar"]
    assert len(starts) >= len(members)
    for start in starts:
        for place in range(start, start + BLOCK):
            for flip in (0x20, 0x81, data[place]):
                if not flip:
                    continue
                broken = bytearray(data)
                broken[place] ^= flip
                error = error_of(bytes(broken))
                if error is None:
                    assert 148 <= place - start < 156
                    assert walked(bytes(broken)) == members
                else:
                    assert start - 3 * BLOCK <= error.offset <= start


def test_a_flipped_byte_of_a_plain_header_is_told_where_it_is() -> None:
    data = ARCHIVES["plain"]
    for start in (0, 3 * BLOCK, 4 * BLOCK):
        for place in (0, 124, 135, 156, 257, 345, 511):
            broken = bytearray(data)
            broken[start + place] ^= 0x11
            assert isinstance(error := error_of(bytes(broken)), TarError)
            assert error.offset == start
            assert "no tar header" in error.reason or "bad checksum" in error.reason


@each_archive
def test_everything_behind_the_end_is_told(data: bytes) -> None:
    end = end_of_content(data)
    for place in thinned(range(end + 1, len(data))):
        broken = bytearray(data)
        broken[place] = 1
        error = error_of(bytes(broken))
        assert error is not None
        assert error.offset == (end if place < end + BLOCK else place)
    for more in (b"x", bytes(100) + b"x", data):
        error = error_of(data + more)
        assert error is not None
        assert error.offset == len(data) + next(i for i, byte in enumerate(more) if byte)


@pytest.mark.parametrize(
    ("data", "offset", "message"),
    [
        (b"", 0, "ends after 0 bytes without an end mark"),
        (b"not a tar", 0, "truncated"),
        (b"not a tar" * 1000, 0, "no tar header|damaged"),
        (gzip.compress(ARCHIVES["plain"], mtime=0).ljust(600, b"."), 0, "no tar header|damaged"),
        (ARCHIVES["plain"][: 7 * BLOCK - 1], 6 * BLOCK, "truncated"),
        (ARCHIVES["plain"][: 7 * BLOCK], 6 * BLOCK, "end mark has 512 of 1024 bytes"),
    ],
)
def test_what_is_no_whole_tar_is_told(data: bytes, offset: int, message: str) -> None:
    with pytest.raises(TarError, match=message) as caught:
        walked(data)
    assert caught.value.offset == offset
    assert str(caught.value).startswith(f"at byte {offset}: ")


@pytest.mark.parametrize("first", [[], [("folder", None)]], ids=["plain", "odd"])
@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"6", b"S", b"V"])
def test_members_that_are_no_files_are_refused(kind: bytes, first: list[tuple[str, None]]) -> None:
    before = archive([*first, ("a.jpg", b"1")])[: (len(first) + 2) * BLOCK]
    info = tarfile.TarInfo("b.jpg")
    info.type, info.linkname = kind, "/etc/passwd"
    data = before + info.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(TarError, match=r"b\.jpg is no regular file but of type") as caught:
        walked(data + tar.end(len(data)))
    assert caught.value.offset == len(before)


LIES: dict[str, tuple[Callable[[bytes], bytes], int, str]] = {
    "beyond the end": (
        lambda head: with_field(head, 124, b"%011o\0" % 100_000),
        3 * BLOCK,
        "truncated: 7680 of 100000",
    ),
    "into the next": (lambda head: with_field(head, 124, b"%011o\0" % 1300), 6 * BLOCK, "no tar header"),
    "too small": (lambda head: with_field(head, 124, b"%011o\0" % 100), 4 * BLOCK, "no tar header"),
    "huge": (lambda head: with_field(head, 124, b"\x80" + b"\xff" * 11), 3 * BLOCK, "truncated"),
    "negative": (lambda head: with_field(head, 124, b"-0000001000\0"), 2 * BLOCK, "no tar header"),
    "negative, binary": (
        lambda head: with_field(head, 124, struct.pack(">Iq", 2**32 - 1, -1024)),
        3 * BLOCK,
        "truncated",
    ),
    "signed": (lambda head: with_field(head, 124, b"+0000000001\0"), 2 * BLOCK, "no tar header"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_about_its_size_is_told(lie: str) -> None:
    lied, offset, message = LIES[lie]
    data = archive([("a.jpg", b"1"), ("b.jpg", b"x" * 700), ("c.jpg", b"y" * 700), ("d.jpg", b"")])
    assert len(data) == 20 * BLOCK
    data = data[: 2 * BLOCK] + lied(data[2 * BLOCK : 3 * BLOCK]) + data[3 * BLOCK : 18 * BLOCK]
    with pytest.raises(TarError, match=message) as caught:
        walked(data)
    assert caught.value.offset == offset


def pax(records: bytes) -> bytes:
    header = with_field(tar.header("pax", len(records)), 156, b"x")
    return header + records + tar.padding(len(records))


@pytest.mark.parametrize(
    "crafted",
    [
        pax(b"14 size=-1024\n"),
        pax(b"27 size=" + b"9" * 18 + b"\n"),
        pax(b"") * 2000,
        pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"),
        pax(b"19 GNU.sparse.map=x\n"),
        with_field(tar.header("long", 1 << 30), 156, b"L"),
        with_field(with_field(tar.header("long", 0), 156, b"L"), 124, struct.pack(">Iq", 2**32 - 1, -512)),
    ],
    ids=["negative", "huge", "nested", "sparse 1.0", "sparse 0.1", "long name", "negative long name"],
)
def test_crafted_headers_are_told(crafted: bytes) -> None:
    data = tar.header("a.jpg", 0) + crafted + tar.header("b.jpg", 3) + b"123" + bytes(509)
    with pytest.raises(TarError) as caught:
        walked(data + tar.end(len(data)))
    assert BLOCK <= caught.value.offset <= len(data)


def test_a_charset_that_is_none_hides_no_member() -> None:
    """Python 3.11.2 passes over it, later ones call it an error."""
    crafted = pax(b"30 hdrcharset=" + b"\xff" * 15 + b"\n")
    data = tar.header("a.jpg", 0) + crafted + tar.header("b.jpg", 3) + b"123" + bytes(509)
    found: list[Member] | TarError
    try:
        found = walked(data + tar.end(len(data)))
    except TarError as error:
        found = error
    if isinstance(found, TarError):
        assert BLOCK <= found.offset <= len(data)
    else:
        assert [member.name for member in found] == ["a.jpg", "b.jpg"]


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(list(ARCHIVES.values())),
    st.lists(st.tuples(st.integers(0, 4500), st.binary(min_size=1, max_size=12)), min_size=1, max_size=3),
    st.booleans(),
)
def test_damage_of_any_kind_ends_in_members_or_an_error(
    data: bytes, damage: list[tuple[int, bytes]], mend: bool
) -> None:
    broken = bytearray(data)
    for place, content in damage:
        broken[place : place + len(content)] = content
    if mend:  # check sums that fit, so that more of it is believed
        for place in range(0, len(broken) - BLOCK, BLOCK):
            if broken[place + 257 : place + 262] == b"ustar":
                broken[place : place + BLOCK] = resummed(bytes(broken[place : place + BLOCK]))
    error = error_of(bytes(broken))
    assert error is None or 0 <= error.offset <= len(broken)


@pytest.mark.parametrize(
    ("name", "extension", "key"),
    [
        ("a.jpg", "jpg", "a"),
        ("x.y/a.b.jpg", "b.jpg", "x.y/a"),
        ("./a.jpg", "jpg", "./a"),
        ("none", "", "none"),
        (".hidden", "hidden", ""),
    ],
)
def test_keys_and_extensions(name: str, extension: str, key: str) -> None:
    assert (tar.extension_of(name), tar.key_of(name)) == (extension, key)

"""Tars written by webdataset and by us are read again: every image, every label, whatever else lies between."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.data.manifest import Manifest, Member, ShardInfo, format_idx
from vitscale.errors import DataError
from vitscale_shards.rows import BadImageError, Row, image_key
from vitscale_shards.sources.sample_labels import UnusableLabelError, parse_labels
from vitscale_shards.sources.webdataset import WebDatasetTars, is_webdataset

Files = list[tuple[str, bytes]]


def write_tar(path: Path, files: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(first: int, count: int, label: Callable[[int], tuple[str, bytes]]) -> Files:
    files = []
    for number in range(first, first + count):
        extension, data = label(number)
        files += [(f"{number:06d}.jpg", image(number)), (f"{number:06d}.{extension}", data)]
    return files


def image(number: int) -> bytes:
    return f"image {number} ".encode() * (number % 7 * 40)


def number_label(number: int) -> tuple[str, bytes]:
    return "cls", str(number % 5).encode()


def write_index(folder: Path, classes: list[str] | None, *, idx: bool = True, multi_label: bool = False) -> Path:
    """``index.json`` and ``.idx`` of the tars in a folder, made with the standard library's reading of them."""
    shards = []
    for path in sorted(folder.glob("*.tar")):
        runs: dict[str, list[Member]] = {}
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, extension = info.name.partition(".")
                runs.setdefault(key, []).append(Member(extension, info.offset_data, info.size, info.name))
        shards.append(ShardInfo(path.name, len(runs), path.stat().st_size))
        if idx:
            path.with_suffix(".idx").write_text(format_idx(list(runs.values())))
    manifest = Manifest(str(folder), tuple(shards), None if classes is None else tuple(classes), multi_label)
    (folder / "index.json").write_text(json.dumps(manifest.to_json()))
    return folder


def three_tars(folder: Path, label: Callable[[int], tuple[str, bytes]] = number_label) -> Path:
    for shard in range(3):
        write_tar(folder / f"s-{shard:03d}.tar", samples(10 * shard, 10, label))
    return folder


def content(source: WebDatasetTars) -> dict[str, tuple[tuple[int, ...], bytes]]:
    rows = list(source.rows())
    found = {row.key: (row.labels, source.read(row)) for row in rows}
    assert len(found) == len(rows)
    assert [row.num_bytes for row in rows] == [len(data) for _, data in found.values()]
    assert rows == list(source.rows())
    return found


EXPECTED = {f"{n:06d}": ((n % 5,), image(n)) for n in range(30)}


def test_what_webdataset_writes_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with wds.ShardWriter(str(tmp_path / "set" / "train-%03d.tar"), maxcount=9, verbose=0) as sink:
        for number in range(30):
            sink.write({"__key__": f"{number:06d}", "jpg": image(number), "cls": number % 5, "txt": "a caption"})
    source = WebDatasetTars(str(tmp_path / "set"))
    assert content(source) == EXPECTED
    assert (source.name, source.classes, source.multi_label) == ("set", None, False)
    assert source.ignored == {".txt": 30}
    theirs = wds.WebDataset(str(tmp_path / "set" / "train-{000..003}.tar"), shardshuffle=False)
    assert [sample["__key__"] for sample in theirs] == [row.key for row in source.rows()]


@pytest.mark.parametrize(
    "pattern",
    ["", "/", "/*.tar", "/s-{000..002}.tar", "/s-00[0-2].tar", "/s-{000,00[12]}.tar", "/{s-000,s-001,s-002}.tar"],
)
def test_folders_and_patterns(tmp_path: Path, pattern: str) -> None:
    location = f"{three_tars(tmp_path / 'set')}{pattern}"
    assert is_webdataset(location)
    source = WebDatasetTars(location)
    assert content(source) == EXPECTED
    assert source.name == "set"


def test_a_single_tar_and_names_with_signs_of_patterns(tmp_path: Path) -> None:
    folder = three_tars(tmp_path / "a {0..3}[x]*")
    assert content(WebDatasetTars(str(folder))) == EXPECTED
    source = WebDatasetTars(str(folder / "s-001.tar"))
    assert list(content(source)) == [f"{n:06d}" for n in range(10, 20)]
    assert source.name == "s-001"


def test_a_pattern_keeps_its_order_and_names_each_tar_once(tmp_path: Path) -> None:
    folder = three_tars(tmp_path / "set")
    rows = list(WebDatasetTars(f"{folder}/s-{{002,000,00*}}.tar").rows())
    tars = list(dict.fromkeys(row.path.partition(":")[0] for row in rows))
    assert tars == ["s-002.tar", "s-000.tar", "s-001.tar"]
    assert len(rows) == 30


@pytest.mark.parametrize(
    ("label", "labels", "multi_label", "classes"),
    [
        (lambda n: ("cls", f" {n}\n".encode()), [(0,), (1,), (2,)], False, None),
        (lambda n: ("CLS", str(n).encode()), [(0,), (1,), (2,)], False, None),
        (lambda n: ("cls", [b"dog", b"cat", b"dog"][n]), [(1,), (0,), (1,)], False, ("cat", "dog")),
        (lambda n: ("json", json.dumps({"label": n, "caption": "x"}).encode()), [(0,), (1,), (2,)], False, None),
        (lambda n: ("json", json.dumps({"label": "dcb"[n]}).encode()), [(2,), (1,), (0,)], False, ("b", "c", "d")),
        (lambda n: ("json", json.dumps({"labels": [*range(n)]}).encode()), [(), (0,), (0, 1)], True, None),
        (lambda n: ("json", json.dumps({"labels": ["é", "a"][:n]}).encode()), [(), (1,), (1, 0)], True, ("a", "é")),
    ],
    ids=["number", "upper case", "name", "json number", "json name", "json numbers", "json names"],
)
def test_forms_of_labels(
    tmp_path: Path,
    label: Callable[[int], tuple[str, bytes]],
    labels: list[tuple[int, ...]],
    multi_label: bool,
    classes: tuple[str, ...] | None,
) -> None:
    source = WebDatasetTars(str(write_tar(tmp_path / "a.tar", samples(0, 3, label))))
    assert (source.classes, source.multi_label) == (classes, multi_label)
    assert [row.labels for row in source.rows()] == labels


def test_cls_counts_before_json(tmp_path: Path) -> None:
    files = [("1.json", b'{"label": 4}'), ("1.jpg", b"1"), ("1.cls", b"3")]
    source = WebDatasetTars(str(write_tar(tmp_path / "a.tar", files)))
    assert [row.labels for row in source.rows()] == [(3,)]
    assert source.ignored == {".json": 1}


def test_an_index_that_says_so_makes_json_count_before_cls(tmp_path: Path) -> None:
    files = [("1.json", b'{"labels": [4, 0]}'), ("1.jpg", b"1"), ("1.cls", b"3")]
    write_tar(tmp_path / "set" / "a.tar", files)
    assert [row.labels for row in WebDatasetTars(str(tmp_path / "set")).rows()] == [(3,)]
    source = WebDatasetTars(str(write_index(tmp_path / "set", None, multi_label=True)))
    assert source.multi_label
    assert [row.labels for row in source.rows()] == [(4, 0)]


def test_an_index_of_tars_elsewhere_tells_where_they_are(tmp_path: Path) -> None:
    folder = write_index(three_tars(tmp_path / "set"), None)
    index = json.loads((folder / "index.json").read_text())
    index["vitscale"]["base_url"] = "/mnt/tars"
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "index.json").write_text(json.dumps(index))
    assert is_webdataset(str(tmp_path / "index"))
    with pytest.raises(DataError, match="holds an index of tars that lie in /mnt/tars; name that place"):
        list(WebDatasetTars(str(tmp_path / "index")).rows())


@pytest.mark.parametrize("names", [["b", "a", "c"], ["c", "b", "x", "a"]])
def test_given_classes_order_the_labels(tmp_path: Path, names: list[str]) -> None:
    files = samples(0, 3, lambda n: ("cls", b"abc"[n : n + 1]))
    source = WebDatasetTars(str(write_tar(tmp_path / "a.tar", files)), names)
    assert source.classes == tuple(names)
    assert [row.labels for row in source.rows()] == [(names.index(name),) for name in "abc"]


@pytest.mark.parametrize("idx", [True, False])
def test_our_index_gives_classes_and_places(tmp_path: Path, idx: bool) -> None:
    folder = write_index(three_tars(tmp_path / "train"), list("abcde"), idx=idx)
    assert is_webdataset(str(folder))
    source = WebDatasetTars(str(folder))
    assert source.classes == tuple("abcde")
    assert content(source) == EXPECTED
    assert content(WebDatasetTars(f"{folder}/*.tar")) == EXPECTED
    translated = WebDatasetTars(str(folder), list("edcba"))
    assert content(translated) == {key: ((4 - label,), data) for key, ((label,), data) in EXPECTED.items()}
    with pytest.raises(DataError, match="sample '000001' is of class 'b', which is none of the 2 known classes"):
        list(WebDatasetTars(str(folder), ["a", "c"]).rows())


def test_the_idx_is_used_and_tar_headers_are_not_walked(tmp_path: Path) -> None:
    folder = write_index(three_tars(tmp_path / "train"), None)
    tar = folder / "s-001.tar"
    rows = list(WebDatasetTars(str(folder)).rows())
    offset = next(int(row.path.partition("@")[2].partition("+")[0]) for row in rows if row.key == "000013")
    data = bytearray(tar.read_bytes())
    data[offset - 512 : offset - 400] = bytes(112)
    tar.write_bytes(data)
    source = WebDatasetTars(str(folder))
    assert list(source.rows()) == rows
    for row in rows:
        if row.key == "000013":
            with pytest.raises(BadImageError, match=r"holds no 000013\.jpg"):
                source.read(row)
        else:
            assert source.read(row) == EXPECTED[row.key][1]


def test_a_stale_index_is_told(tmp_path: Path) -> None:
    folder = write_index(three_tars(tmp_path / "train"), None)
    whole = (folder / "s-001.tar").read_bytes()
    (folder / "s-001.tar").write_bytes(whole[:-512])
    with pytest.raises(
        DataError, match=rf"s-001\.tar: has {len(whole) - 512} bytes where index.json says {len(whole)}"
    ):
        list(WebDatasetTars(str(folder)).rows())
    (folder / "s-001.tar").unlink()
    with pytest.raises(DataError, match=r"s-001\.tar: cannot be read \(No such file or directory\)"):
        list(WebDatasetTars(str(folder)).rows())
    swapped = write_tar(folder / "s-001.tar", [(name, data) for name, data in reversed(samples(10, 10, number_label))])
    assert swapped.stat().st_size == len(whole)
    with pytest.raises(DataError, match=r"s-001\.tar: label 000010\.cls: .* it has changed since it was listed; write"):
        list(WebDatasetTars(str(folder)).rows())
    (folder / "s-001.tar").write_bytes(whole)
    write_tar(folder / "extra.tar", samples(90, 1, number_label))
    with pytest.raises(DataError, match=r"index.json does not list extra\.tar \(1 of 4 tars\)"):
        list(WebDatasetTars(str(folder)).rows())
    (folder / "extra.tar").unlink()
    lines = (folder / "s-002.idx").read_text().splitlines()
    (folder / "s-002.idx").write_text("\n".join(["v1.2 9", *lines[1:-1]]) + "\n")
    with pytest.raises(DataError, match=r"s-002\.idx lists 9 samples where index.json says 10"):
        list(WebDatasetTars(str(folder)).rows())


def test_sets_with_indexes_are_merged_by_the_names_of_their_classes(tmp_path: Path) -> None:
    write_tar(tmp_path / "a" / "t.tar", [("1.jpg", b"1"), ("1.cls", b"0"), ("2.jpg", b"2"), ("2.cls", b"1")])
    write_tar(tmp_path / "b" / "t.tar", [("1.jpg", b"3"), ("1.cls", b"1")])
    write_index(tmp_path / "a", ["cat", "dog"])
    write_index(tmp_path / "b", ["ant", "cat"])
    location = f"{tmp_path}/{{a,b}}/*.tar"
    with pytest.raises(DataError, match=r"a/t\.tar and .*b/t\.tar have different classes .* give the list of all"):
        list(WebDatasetTars(location).rows())
    source = WebDatasetTars(location, ["ant", "cat", "dog"], prefix_keys=True)
    assert content(source) == {"a__t__1": ((1,), b"1"), "a__t__2": ((2,), b"2"), "b__t__1": ((1,), b"3")}
    write_index(tmp_path / "b", ["cat", "dog"])
    same = WebDatasetTars(location)
    assert same.classes == ("cat", "dog")
    assert [row.labels for row in same.rows()] == [(0,), (1,), (1,)]


def test_numbering_that_starts_anew_can_be_prefixed(tmp_path: Path) -> None:
    for shard in range(2):
        write_tar(tmp_path / f"{shard:05d}.tar", samples(0, 2, number_label))
    keys = [row.key for row in WebDatasetTars(str(tmp_path)).rows()]
    assert keys == ["000000", "000001"] * 2
    keys = [row.key for row in WebDatasetTars(str(tmp_path), prefix_keys=True).rows()]
    assert keys == ["00000__000000", "00000__000001", "00001__000000", "00001__000001"]


def test_keys_become_ours(tmp_path: Path) -> None:
    names = ["plain-KEY_1", "./dot", "in/a folder/é", "k" * 200]
    files = [file for name in names for file in ((f"{name}.jpg", b"1"), (f"{name}.cls", b"1"))]
    keys = [row.key for row in WebDatasetTars(str(write_tar(tmp_path / "a.tar", files))).rows()]
    assert keys == ["plain-KEY_1", "dot", image_key("in/a folder/é.jpg"), image_key("k" * 200 + ".jpg")]


def test_what_is_no_whole_sample_is_counted(tmp_path: Path) -> None:
    files = [
        ("README", b"-"),
        (".hidden.jpg", b"-"),
        ("a.jpg", b"a"),
        ("a.cls", b"1"),
        ("a.txt", b"caption"),
        ("a.seg.png", b"no image of its own"),
        ("b.jpg", b"no label"),
        ("c.cls", b"2"),
        ("d.jpg", b"d"),
        ("d.json", b'{"caption": "from the web"}'),
        ("e.jpg", b"e"),
        ("e.cls", b"-1"),
        ("f.jpg", b"f"),
        ("f.json", b"{"),
        ("g.jpg", b"g"),
        ("g.cls", b"7" * (1 << 20) + b"7"),
        ("h.png", b"first"),
        ("h.jpg", b"second"),
        ("h.cls", b"4"),
    ]
    source = WebDatasetTars(str(write_tar(tmp_path / "a.tar", files)))
    for _ in range(2):  # and not twice when listed twice
        rows = list(source.rows())
        assert [(row.key, row.labels, source.read(row)) for row in rows] == [("a", (1,), b"a"), ("h", (4,), b"first")]
        assert source.ignored == {
            "no extension": 1,
            "hidden": 1,
            ".txt": 1,
            ".seg.png": 1,
            ".jpg": 1,
            "sample without label": 2,
            "sample without image": 1,
            "sample with negative label": 1,
            "sample with unreadable json member": 1,
            "sample with a label of more than 1048576 bytes": 1,
        }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"none of the first samples has an image and a label \(no member\); members KEY\.jpg"),
        ([("1.jpg", b""), ("1.txt", b"")], r"\(1 x \.txt, 1 x sample without label\); .* KEY\.json with 'label'"),
        (
            [("1.jpg", b""), ("1.cls", b"1"), ("2.jpg", b""), ("2.json", b'{"labels": [1]}')],
            "sample '2' has a list of numbers, but '1' has one number; all samples of a set must be",
        ),
        (
            [("1.jpg", b""), ("1.cls", b"cat"), ("2.jpg", b""), ("2.cls", b"1")],
            "sample '2' has one number, but '1' has one class name",
        ),
        ([("1.jpg", b""), ("1.cls", b"1"), ("1.jpg", b"")], r"1\.jpg comes twice, at bytes 512 and 2048"),
        ([("1.jpg", b""), ("1.cls", b"2147483648")], "'1' has label 2147483648; 0 to 2147483647 are allowed"),
    ],
    ids=["empty", "unlabelled", "mixed lists", "mixed names", "twice", "large"],
)
def test_sets_that_contradict_themselves_are_refused(tmp_path: Path, files: Files, message: str) -> None:
    source = WebDatasetTars(str(write_tar(tmp_path / "a.tar", files)))
    with pytest.raises(DataError, match=message):
        list(source.rows())


def test_a_set_without_labels_is_refused_before_all_of_it_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitscale_shards.sources.webdataset._TRIES", 5)
    write_tar(tmp_path / "0.tar", [(f"{n}.jpg", b"") for n in range(5)])
    (tmp_path / "1.tar").write_text("is not read")
    with pytest.raises(DataError, match=r"\(5 x sample without label\)"):
        list(WebDatasetTars(str(tmp_path)).rows())
    write_tar(tmp_path / "0.tar", [*((f"{n}.jpg", b"") for n in range(4)), ("5.jpg", b""), ("5.cls", b"1")])
    (tmp_path / "1.tar").unlink()
    assert [row.key for row in WebDatasetTars(str(tmp_path)).rows()] == ["5"]


def test_labels_must_be_among_the_classes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.jpg", b""), ("1.cls", b"2")])
    with pytest.raises(DataError, match="'1' has label 2; 0 to 1 are allowed: give the right list of classes"):
        list(WebDatasetTars(str(path), ["a", "b"]).rows())


def test_a_truncated_or_compressed_tar_is_told(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", samples(1, 3, number_label)).read_bytes()
    end = 512 * (len(whole.rstrip(b"\0")) // 512)  # the last member's header or content
    for size in range(0, end, 512):
        (tmp_path / "a.tar").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"a\.tar: damaged at byte \d+: .* copy or download it again"):
            list(WebDatasetTars(str(tmp_path)).rows())
    (tmp_path / "a.tar").write_bytes(gzip.compress(whole))
    with pytest.raises(DataError, match=r"a\.tar: is compressed with gzip, .* gunzip"):
        list(WebDatasetTars(str(tmp_path)).rows())
    (tmp_path / "a.tar").rename(tmp_path / "a.tgz")
    assert is_webdataset(str(tmp_path))
    for location in (tmp_path, tmp_path / "a.tgz"):
        with pytest.raises(DataError, match=r"a\.tgz is compressed"):
            list(WebDatasetTars(str(location)).rows())


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("none", "none: no such file; a folder of tars, a tar or a pattern of tars is needed"),
        ("none/{0..3}.tar", r"none/0\.tar: cannot be read \(No such file or directory\)"),
        ("*.tgz", "matches no file; a pattern of tars is needed"),
        ("{0.tar", r"Unbalanced braces: .*; write braces as in /data/\{000\.\.099\}\.tar"),
        ("{0..99999999}.tar", "stands for more than 1000000 tars"),
        ("{0..9999}{0..9999}.tar", "stands for more than 1000000 tars"),
        ("", "holds no tar; a folder of"),
        ("*.txt", r"x\.txt: is not named like a tar"),
    ],
)
def test_locations_without_tars_are_refused(tmp_path: Path, location: str, message: str) -> None:
    (tmp_path / "x.txt").touch()
    with pytest.raises(DataError, match=message):
        list(WebDatasetTars(f"{tmp_path}/{location}").rows())


@pytest.mark.parametrize("location", ["s3://bucket/{000..009}.tar", "https://host/a.tar", "pipe:cat a.tar"])
def test_locations_off_the_file_system_are_refused(location: str) -> None:
    with pytest.raises(DataError, match="is not on a file system; copy the tars to a folder"):
        WebDatasetTars(location)


def test_a_link_out_of_a_folder_is_refused_but_a_pattern_may_follow_it(tmp_path: Path) -> None:
    write_tar(tmp_path / "blob.tar", [("1.jpg", b"1"), ("1.cls", b"0")])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.tar").symlink_to("../blob.tar")
    with pytest.raises(DataError, match=r"a\.tar: links to .*blob\.tar, outside"):
        list(WebDatasetTars(str(tmp_path / "set")).rows())
    assert list(content(WebDatasetTars(f"{tmp_path}/set/*.tar"))) == ["1"]


def test_paths_that_are_none_of_the_source_are_bad_images(tmp_path: Path) -> None:
    (tmp_path / "secret.tar").write_bytes(three_tars(tmp_path / "set").joinpath("s-000.tar").read_bytes())
    source = WebDatasetTars(str(tmp_path / "set"))
    for path in ("", "../secret.tar:000003.jpg@5120+120", "s-000.tar", "s-000.tar:x", "s-000.tar:x@512+9999999"):
        with pytest.raises(BadImageError):
            source.read(Row("k", (), path))


def test_the_opener_tells_samples_from_others(tmp_path: Path) -> None:
    assert is_webdataset(str(write_tar(tmp_path / "a.tar", [("1.jpg", b""), ("1.txt", b""), ("1.cls", b"")])))
    assert is_webdataset("/nowhere/{000..999}.tar")
    assert is_webdataset("/nowhere/*.tar")
    assert not is_webdataset("/nowhere/*.parquet")
    assert not is_webdataset(str(write_tar(tmp_path / "flat.tar", [("1.jpg", b""), ("2.jpg", b"")])))
    assert not is_webdataset(str(write_tar(tmp_path / "outer.tar", [("n01440764.tar", b"")])))
    assert not is_webdataset(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert not is_webdataset(str(tmp_path / "empty"))
    (tmp_path / "empty" / "index.json").write_text('{"of": "something else"}')
    assert not is_webdataset(str(tmp_path / "empty"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 5) | st.floats(allow_nan=False) | st.sampled_from(["a", "b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["label", "labels"]), inner),
    max_leaves=6,
)


@given(content=JSON)
def test_json_labels_are_what_the_documentation_says_or_unusable(content: Any) -> None:
    expected: tuple[tuple[Any, ...], bool] | None = None
    if isinstance(content, dict) and "labels" in content:
        if isinstance(content["labels"], list):
            expected = tuple(content["labels"]), True
    elif isinstance(content, dict) and "label" in content:
        expected = (content["label"],), False
    if expected is not None:
        values = expected[0]
        whole = all(type(value) is int and value >= 0 for value in values)
        if not whole and not all(type(value) is str for value in values):
            expected = None
    if expected is None:
        with pytest.raises(UnusableLabelError):
            parse_labels("json", json.dumps(content).encode())
    else:
        assert parse_labels("json", json.dumps(content).encode()) == expected


@given(data=st.binary(max_size=20))
def test_no_bytes_make_a_label_fail_in_another_way(data: bytes) -> None:
    for extension in ("cls", "json"):
        try:
            labels = parse_labels(extension, data)
        except UnusableLabelError:
            continue
        assert all(isinstance(value, str) or value >= 0 for value in labels.values)


NAMES = st.sampled_from(["jpg", "png", "cls", "txt", "json"])


@given(st.lists(st.tuples(st.sampled_from(["k1", "k2", "d/k3"]), st.sets(NAMES, min_size=1)), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_samples_are_the_runs_that_webdataset_sees(
    tmp_path_factory: pytest.TempPathFactory, groups: list[tuple[str, set[str]]]
) -> None:
    groups = [group for place, group in enumerate(groups) if not place or groups[place - 1][0] != group[0]]
    bodies = {"json": b'{"label": 1}', "cls": b"2"}
    files = [
        (f"{key}.{name}", bodies.get(name, f"{place} {name}".encode()))
        for place, (key, names) in enumerate(groups)
        for name in sorted(names)
    ]
    path = write_tar(tmp_path_factory.mktemp("set") / "a.tar", files)
    expected = []
    for sample in wds.WebDataset(str(path), shardshuffle=False):
        image = sample.get("jpg", sample.get("png"))
        label = 2 if "cls" in sample else 1 if "json" in sample else None
        if image is not None and label is not None:
            expected.append((image_key(sample["__key__"] + ".jpg"), (label,), image))
    source = WebDatasetTars(str(path))
    if expected:
        assert [(row.key, row.labels, source.read(row)) for row in source.rows()] == expected
    else:
        with pytest.raises(DataError, match="none of the first samples has an image and a label"):
            list(source.rows())

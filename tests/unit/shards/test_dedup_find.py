"""Folders of real images with planted duplicates in, a report out; after any interruption the same report."""

import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitscale.durable import Lock
from vitscale.errors import DataError
from vitscale_shards.dedup.find import find_duplicates
from vitscale_shards.dedup.report import Report
from vitscale_shards.dedup.settings import DedupSettings
from vitscale_shards.dedup.sheet import CELL_PX, COLUMNS
from vitscale_shards.sources import SourceSpec

SIDES = ("left_out", "matches")
TEXT_FILES = ("duplicates.jsonl", "exclude.txt", "unreadable.jsonl", "summary.json")


def photo(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Something with structure everywhere, as photographs have: smooth noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (10, 10, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def copy(path: Path, to: Path) -> Path:
    to.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(path, to))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten different images, of which 1, 2 and 3 have copies, and four that are too plain to look alike."""
    folder = tmp_path_factory.mktemp("images")
    originals = [save(folder / "a" / f"{i}.png", photo(i)) for i in range(10)]
    copy(originals[1], folder / "b" / "bytes.png")
    save(folder / "a" / "pixels.bmp", photo(2))
    save(folder / "a" / "jpeg.jpg", photo(3), quality=75)
    save(folder / "b" / "small.png", photo(3).resize((80, 60)))
    save(folder / "b" / "white.png", Image.new("RGB", (50, 40), "white"))
    save(folder / "b" / "white.bmp.bmp", Image.new("RGB", (50, 40), "white"))
    save(folder / "b" / "red.png", Image.new("RGB", (50, 40), "red"))
    save(folder / "b" / "upright.png", Image.new("RGB", (40, 50), "white"))
    return folder


@pytest.fixture
def train(tmp_path: Path, images: Path) -> Path:
    """A copy of the images that a test may change."""
    return Path(shutil.copytree(images, tmp_path / "train"))


@pytest.fixture
def held_out(tmp_path: Path, train: Path) -> Path:
    """Images 1, 5 and 6 of the training set, as bytes, pixels and look; and one of its own."""
    folder = tmp_path / "test"
    copy(train / "a" / "1.png", folder / "x" / "one.png")
    save(folder / "x" / "five.bmp", photo(5))
    save(folder / "x" / "six.jpg", photo(6), quality=60)
    save(folder / "x" / "own.png", photo(77))
    return folder


def find(source: Path, *against: Path, out: Path, settings: DedupSettings | None = None, workers: int = 1) -> Report:
    specs = [SourceSpec((str(path),)) for path in against]
    return find_duplicates(SourceSpec((str(source),)), specs, out, settings or DedupSettings(), workers=workers)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def found(out: Path) -> set[tuple[str, str, str, str]]:
    return {
        (line["left_out"]["key"], line["matches"]["source"], line["matches"]["key"], line["kind"])
        for line in lines(out / "duplicates.jsonl")
    }


def texts(out: Path) -> dict[str, str]:
    return {name: (out / name).read_text() for name in TEXT_FILES}


WITHIN = {
    ("b__bytes", "train", "a__1", "bytes"),
    ("a__pixels", "train", "a__2", "pixels"),
    ("a__jpeg", "train", "a__3", "near"),
    ("b__small", "train", "a__3", "near"),
}
# The keys of the two white images differ in a hash of their paths.
HELD_OUT = {
    ("a__1", "test", "x__one", "bytes"),
    ("b__bytes", "test", "x__one", "bytes"),
    ("a__5", "test", "x__five", "pixels"),
    ("a__6", "test", "x__six", "near"),
}


def without_white(pairs: set[tuple[str, str, str, str]]) -> set[tuple[str, str, str, str]]:
    return {pair for pair in pairs if "white" not in pair[0]}


def test_copies_within_a_set(tmp_path: Path, train: Path) -> None:
    report = find(train, out=tmp_path / "out")
    pairs = found(tmp_path / "out")
    assert without_white(pairs) == WITHIN
    (white,) = pairs - without_white(pairs)
    assert "white" in white[2]
    assert white[3] == "pixels"
    excluded = (tmp_path / "out" / "exclude.txt").read_text().splitlines()
    assert excluded == sorted(pair[0] for pair in pairs)
    assert (report.excluded, report.source.matched, report.repeated) == (5, 0, 5)
    assert (report.source.images, report.source.plain, report.source.unreadable) == (18, 4, 0)


def test_held_out_images_come_first(tmp_path: Path, train: Path, held_out: Path) -> None:
    """Image 1 and its copy both go, since a test set has it; which of them is the first plays no part."""
    report = find(train, held_out, out=tmp_path / "out")
    rest = {pair for pair in WITHIN if pair[0] != "b__bytes"}
    assert without_white(found(tmp_path / "out")) == HELD_OUT | rest
    assert (report.source.matched, report.repeated, report.against[0].matched) == (4, 4, 3)


def test_only_held_out_images(tmp_path: Path, train: Path, held_out: Path) -> None:
    find(train, held_out, out=tmp_path / "out", settings=DedupSettings(within=False))
    assert found(tmp_path / "out") == HELD_OUT


@pytest.mark.parametrize(
    ("match", "kinds"), [("bytes", {"bytes"}), ("pixels", {"bytes", "pixels"}), ("near", {"bytes", "pixels", "near"})]
)
def test_the_widest_likeness_that_counts(
    tmp_path: Path, train: Path, held_out: Path, match: Any, kinds: set[str]
) -> None:
    find(train, held_out, out=tmp_path / "out", settings=DedupSettings(match=match, within=False))
    assert found(tmp_path / "out") == {pair for pair in HELD_OUT if pair[3] in kinds}


def test_a_line_says_what_a_user_needs(tmp_path: Path, train: Path, held_out: Path) -> None:
    find(train, held_out, out=tmp_path / "out")
    records = {line["left_out"]["key"]: line for line in lines(tmp_path / "out" / "duplicates.jsonl")}
    assert records["a__pixels"] == {
        "kind": "pixels",
        "distance": 0,
        "same_label": True,
        "left_out": {"source": "train", "key": "a__pixels", "path": "a/pixels.bmp"},
        "matches": {"source": "train", "key": "a__2", "path": "a/2.png"},
    }
    assert records["b__small"]["same_label"] is False
    assert records["a__5"]["same_label"] is None, "the classes of the two sets are not the same"
    distances = [line["distance"] for line in records.values()]
    assert distances == sorted(distances, reverse=True)


def test_unreadable_images_are_listed_and_tried_again(tmp_path: Path, train: Path) -> None:
    (train / "a" / "4.png").write_bytes((train / "a" / "4.png").read_bytes()[:200])
    (train / "a" / "text.jpg").write_text("no image")
    (train / "a" / "9link.png").symlink_to(train / "a" / "nowhere.png")
    report = find(train, out=tmp_path / "out")
    bad = {line["path"]: line["reason"] for line in lines(tmp_path / "out" / "unreadable.jsonl")}
    assert set(bad) == {"a/4.png", "a/9link.png", "a/text.jpg"}
    assert "none of JPEG" in bad["a/text.jpg"]
    assert "No such file" in bad["a/9link.png"]
    assert (report.source.images, report.source.unreadable, report.source.plain) == (20, 3, 4)

    copy(train / "a" / "0.png", train / "a" / "nowhere.png")
    (train / "a" / "nowhere.png").rename(train / "a" / "0.png")
    (train / "a" / "9link.png").unlink()
    (train / "a" / "9link.png").symlink_to(train / "a" / "0.png")
    assert find(train, out=tmp_path / "out").source.unreadable == 2
    assert ("a__9link", "train", "a__0", "bytes") in found(tmp_path / "out")


def test_bytes_alone_are_not_decoded(tmp_path: Path, train: Path) -> None:
    for name in ("c/1.jpg", "c/2.jpg"):
        (train / name).parent.mkdir(exist_ok=True)
        (train / name).write_text("no image")
    report = find(train, out=tmp_path / "out", settings=DedupSettings(match="bytes"))
    assert report.source.unreadable == 0
    assert ("c__2", "train", "c__1", "bytes") in found(tmp_path / "out")


def test_names_that_are_no_text(tmp_path: Path, train: Path) -> None:
    name = os.fsdecode(b"\xff\xe4.png")
    copy(train / "a" / "0.png", train / "a" / name)
    find(train, out=tmp_path / "out")
    paths = {line["left_out"]["path"] for line in lines(tmp_path / "out" / "duplicates.jsonl")}
    assert f"a/{name}" in paths


def test_sets_of_one_name_are_kept_apart(tmp_path: Path, train: Path, held_out: Path) -> None:
    other = tmp_path / "elsewhere" / "test"
    copy(train / "a" / "8.png", other / "x" / "eight.png")
    report = find(train, held_out, other, out=tmp_path / "out", settings=DedupSettings(within=False))
    assert [counts.name for counts in report.against] == ["test", "test-2"]
    assert found(tmp_path / "out") == HELD_OUT | {("a__8", "test-2", "x__eight", "bytes")}


def test_the_same_again_gives_the_same_bytes(tmp_path: Path, train: Path, held_out: Path) -> None:
    find(train, held_out, out=tmp_path / "one")
    first = texts(tmp_path / "one")
    find(train, held_out, out=tmp_path / "one")
    find(train, held_out, out=tmp_path / "two", workers=2)
    assert texts(tmp_path / "one") == first == texts(tmp_path / "two")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        *TEXT_FILES,
        "fingerprints",
        "sheet-000.jpg",
        ".lock",
    }


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitscale_shards.dedup.fingerprint_sets.ROWS_PER_CHUNK", 4)


def chunks(out: Path) -> dict[str, tuple[int, int]]:
    files = (out / "fingerprints" / "train").glob("*")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


@pytest.mark.usefixtures("small_chunks")
def test_another_radius_reads_no_image(tmp_path: Path, train: Path) -> None:
    find(train, out=tmp_path / "out")
    before = chunks(tmp_path / "out")
    assert len(before) == 5
    find(train, out=tmp_path / "out", settings=DedupSettings(radius=0))
    assert chunks(tmp_path / "out") == before


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("change", ["added", "removed", "another class", "another size", "fewer"])
def test_a_changed_source_is_noticed(tmp_path: Path, train: Path, change: str) -> None:
    find(train, out=tmp_path / "out")
    before = chunks(tmp_path / "out")
    if change == "added":
        copy(train / "a" / "0.png", train / "a" / "00.png")
    elif change == "removed":
        (train / "a" / "1.png").unlink()
    elif change == "another class":
        (train / "a").rename(train / "c")
    elif change == "another size":
        save(train / "a" / "0.png", photo(7))
    else:
        shutil.rmtree(train / "b")
    find(train, out=tmp_path / "out")
    find(train, out=tmp_path / "fresh")
    assert texts(tmp_path / "out") == texts(tmp_path / "fresh")
    after = chunks(tmp_path / "out")
    assert after.keys() == chunks(tmp_path / "fresh").keys()
    if change in ("another size", "fewer"):
        assert set(after.items()) & set(before.items()), "what has not changed is not computed again"


FRAGILE = """
import os, signal
from pathlib import Path
from vitscale_shards.rows import BadImageError
from vitscale_shards.sources.folder import ImageFolder

class Fragile(ImageFolder):
    def __init__(self, location):
        super().__init__(Path(location))

    def read(self, row):
        how = Path(__file__).with_name("how")
        if row.path == "a/8.png" and how.exists():
            if how.read_text() == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how.read_text() == "interrupt":
                raise KeyboardInterrupt
            if how.read_text() == "grown":
                return super().read(row) + b"more"
            raise BadImageError("the network is down")
        with Path(__file__).with_name("reads").open("a") as file:
            file.write(row.path + "\\n")
        return super().read(row)
"""


@pytest.fixture
def fragile(tmp_path: Path, train: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SourceSpec]:
    """A source that breaks at one image while there is a file ``how``."""
    (tmp_path / "fragile_source.py").write_text(FRAGILE)
    monkeypatch.chdir(tmp_path)
    yield SourceSpec((str(train),), source_class="fragile_source:Fragile")
    import sys

    sys.modules.pop("fragile_source", None)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_after_an_interruption_the_same_call_goes_on(
    tmp_path: Path, train: Path, fragile: SourceSpec, how: str
) -> None:
    find(train, out=tmp_path / "undisturbed")
    (tmp_path / "how").write_text(how)
    out = tmp_path / "out"
    error: type[BaseException] = DataError if how == "kill" else KeyboardInterrupt
    with pytest.raises(error, match="killed" if how == "kill" else None):
        find_duplicates(fragile, [], out, DedupSettings(), workers=2 if how == "kill" else 1)
    done = chunks(out)
    assert not (out / "summary.json").exists()
    (tmp_path / "how").unlink()
    find_duplicates(fragile, [], out, DedupSettings(), workers=1)
    assert texts(out) == texts(tmp_path / "undisturbed")
    assert {name: chunks(out)[name] for name in done if name.endswith(".parquet")} == {
        name: identity for name, identity in done.items() if name.endswith(".parquet")
    }
    assert len(chunks(out)) == 5
    if how == "interrupt":
        assert len(done) == 2, "the chunks before the interruption are kept"


def test_what_could_not_be_read_is_read_again(tmp_path: Path, fragile: SourceSpec) -> None:
    """Nothing in the listing tells that the image has come back."""
    (tmp_path / "how").write_text("unreadable")
    assert find_duplicates(fragile, [], tmp_path / "out", DedupSettings()).source.unreadable == 1
    (tmp_path / "how").unlink()
    (tmp_path / "reads").unlink()
    assert find_duplicates(fragile, [], tmp_path / "out", DedupSettings(radius=0)).source.unreadable == 0
    reads = (tmp_path / "reads").read_text().split()
    assert reads[0] == "a/8.png"
    shown = {line[side]["path"] for line in lines(tmp_path / "out" / "duplicates.jsonl") for side in SIDES}
    assert set(reads[1:]) == shown, "all others are known; those of the sheet are read to be shown"


def test_an_image_of_another_size_than_listed_is_not_compared(tmp_path: Path, train: Path, fragile: SourceSpec) -> None:
    (tmp_path / "how").write_text("grown")
    find_duplicates(fragile, [], tmp_path / "out", DedupSettings())
    (bad,) = lines(tmp_path / "out" / "unreadable.jsonl")
    size = (train / bad["path"]).stat().st_size
    assert bad["reason"] == f"has {size + 4} bytes, {size} when it was listed: the source has changed"


def test_a_half_written_report_has_no_summary(tmp_path: Path, train: Path) -> None:
    find(train, out=tmp_path / "out")
    (tmp_path / "out" / "exclude.txt").unlink()
    (tmp_path / "out" / "exclude.txt").mkdir()
    with pytest.raises(DataError, match=r"out: reading or writing failed .* goes on where it stopped"):
        find(train, out=tmp_path / "out")
    assert not (tmp_path / "out" / "summary.json").exists()


def test_damaged_fingerprints(tmp_path: Path, train: Path) -> None:
    find(train, out=tmp_path / "out")
    path = tmp_path / "out" / "fingerprints" / "train" / "chunk-000000.parquet"
    right = texts(tmp_path / "out")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    find(train, out=tmp_path / "out")
    assert texts(tmp_path / "out") == right, "a file without an end is made anew"
    path.write_bytes(b"PAR1" + b"\xff" * 600 + data[604:])
    with pytest.raises(DataError, match=r"chunk-000000.parquet: cannot be read .* remove it"):
        find(train, out=tmp_path / "out")


def test_the_sheet_shows_the_pairs(tmp_path: Path, train: Path) -> None:
    find(train, out=tmp_path / "out")
    records = lines(tmp_path / "out" / "duplicates.jsonl")
    sheet = Image.open(tmp_path / "out" / "sheet-000.jpg").convert("RGB")
    width, height = CELL_PX
    assert sheet.size == (COLUMNS * width, height)
    place = next(i for i, line in enumerate(records) if line["left_out"]["key"] == "a__pixels")
    left, right = (sheet.crop((place * width + 8 + x, 24, place * width + 8 + x + 128, 120)) for x in (0, 136))
    expected = np.asarray(photo(2).resize((128, 96)), dtype=int)
    for shown in (left, right):
        assert np.abs(np.asarray(shown, dtype=int) - expected).mean() < 6
    text = sheet.crop((place * width, 8 + 128, (place + 1) * width, height))
    assert np.asarray(text).min() < 100, "there is something written below"


def test_many_pairs_go_to_several_sheets_up_to_a_limit(
    tmp_path: Path, train: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitscale_shards.dedup.sheet.PAIRS_PER_SHEET", 2)
    monkeypatch.setattr("vitscale_shards.dedup.report.PAIRS_PER_SHEET", 2)
    out = tmp_path / "out"
    assert find(train, out=out).sheets == 3
    for name in ("sheet.MAX_SHEETS", "report.MAX_SHEETS"):
        monkeypatch.setattr(f"vitscale_shards.dedup.{name}", 2)
    (out / "sheet-002.jpg").unlink()
    report = find(train, out=out)
    assert (report.sheets, report.pairs_not_shown) == (2, 1)
    assert len(lines(out / "duplicates.jsonl")) == 5
    shutil.rmtree(train / "b")
    (train / "a" / "jpeg.jpg").unlink()
    assert find(train, out=out).sheets == 1
    assert [path.name for path in out.glob("sheet*")] == ["sheet-000.jpg"], "an old sheet is removed"


def test_no_duplicates_at_all(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "train" / "a" / f"{i}.png", photo(i))
    report = find(tmp_path / "train", out=tmp_path / "out")
    assert (report.excluded, report.pairs, report.sheets) == (0, {}, 0)
    assert (tmp_path / "out" / "exclude.txt").read_text() == ""


def test_the_summary_says_what_was_done(tmp_path: Path, train: Path, held_out: Path) -> None:
    find(train, held_out, out=tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["settings"] == {"match": "near", "radius": 4, "within": True}
    assert summary["source"] == {"name": "train", "images": 18, "unreadable": 0, "plain": 4, "matched": 4}
    assert summary["against"] == [{"name": "test", "images": 4, "unreadable": 0, "plain": 0, "matched": 3}]
    assert summary["excluded"] == 8
    assert sum(summary["pairs"].values()) == len(lines(tmp_path / "out" / "duplicates.jsonl"))
    assert summary["fingerprints"]["version"] == 1


def test_what_cannot_be_done_is_said(tmp_path: Path, train: Path) -> None:
    with pytest.raises(DataError, match=r"nothing to compare: name held-out sets"):
        find(train, out=tmp_path / "out", settings=DedupSettings(within=False))
    with pytest.raises(DataError, match=r"nowhere: no such file or folder"):
        find(train, tmp_path / "nowhere", out=tmp_path / "out")
    lock = Lock(tmp_path / "out" / ".lock")
    assert lock.take()
    with pytest.raises(DataError, match=r"out: another dedup is at work here"):
        find(train, out=tmp_path / "out")
    lock.release()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file: .*File exists"):
        find(train, out=tmp_path / "file")


def test_progress_counts_images(tmp_path: Path, train: Path, held_out: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    find_duplicates(
        SourceSpec((str(train),)),
        [SourceSpec((str(held_out),))],
        tmp_path / "out",
        DedupSettings(),
        advance=lambda *what: told.append(what),
    )
    assert told[:2] == [("train", 18, None), ("test", 4, None)]
    assert told[-1][0] == "comparing"
    assert told[-1][1] == told[-1][2]


def test_a_bomb_is_not_decoded(tmp_path: Path, train: Path) -> None:
    buffer = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(buffer, "PNG")
    (train / "a" / "bomb.png").write_bytes(buffer.getvalue())
    find(train, out=tmp_path / "out")
    (bad,) = lines(tmp_path / "out" / "unreadable.jsonl")
    assert bad["key"] == "a__bomb"
    assert "at most 80000000 pixels" in bad["reason"]

"""The command, as a user gives it."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import vitscale_shards.progress
from tests.helpers.s3 import S3Server
from tests.helpers.shardset import folder_of
from vitscale.data.manifest import read_manifest
from vitscale.data.shard_set import check_files
from vitscale.errors import DataError
from vitscale_shards.cli import app
from vitscale_shards.remote import open_place


def run(*words: str | Path) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for i in range(12):
        path = folder / f"class{i % 3}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 9), i).save(path)
    return folder


def test_digits_are_written_split_and_summed_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("write", "digits", out, "--split", "train=0.8,val=0.2", "--samples-per-shard", "500")
    manifests = [read_manifest(out / split) for split in ("train", "val")]
    assert sum(manifest.num_samples for manifest in manifests) == 1797
    for manifest in manifests:
        check_files(manifest)
        assert manifest.source == "digits"
        assert f"{manifest.split}: {manifest.num_samples:,} samples, {len(manifest.shards)} shard" in result.stdout
        assert f"10 classes -> {folder_of(manifest)}" in result.stdout


def test_the_same_command_again_says_so(images: Path, tmp_path: Path) -> None:
    run("write", images, tmp_path / "out")
    assert "complete already; nothing written" in run("write", images, tmp_path / "out").stdout


def test_what_was_left_aside_is_said(images: Path, tmp_path: Path) -> None:
    (images / "class0" / "notes.txt").touch()
    (images / "nothing").mkdir()
    (images / "class1" / "bad.png").touch()
    result = run("write", images, tmp_path / "out", "--max-failures", "1")
    assert "left aside: 1 .txt" in result.stderr
    assert "classes without an image, which keep their labels: 1 of 4, nothing" in result.stderr
    assert "1 bad image left out, see" in result.stdout


def test_progress_is_told_in_lines_without_a_terminal(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vitscale_shards.progress, "SECONDS_BETWEEN_LINES", 0.0)
    said = run("write", images, tmp_path / "out").stderr
    assert "listing: 12 images" in said
    assert "train: 6 of 12 images" in said
    assert "left" in said
    assert "train: 12 of 12 images" in said


def test_progress_is_a_bar_on_a_terminal(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "12/12" in run("write", images, tmp_path / "out").stderr


def test_a_plan_is_followed_by_workers_that_know_only_where_it_is(images: Path, tmp_path: Path) -> None:
    result = run("plan", images, tmp_path / "out", "--split", "train=1/2,val=1/2", "--samples-per-shard", "2")
    assert "train: " in result.stdout
    assert f"vitscale shards write {tmp_path / 'out'}" in result.stdout
    assert not list(tmp_path.rglob("*.tar"))
    assert "12" in result.stdout or "images" in result.stdout
    run("write", tmp_path / "out", "--workers", "2")
    run("write", images, tmp_path / "other", "--split", "train=1/2,val=1/2", "--samples-per-shard", "2")
    for split in ("train", "val"):
        for path in (tmp_path / "other" / split).iterdir():
            assert (tmp_path / "out" / split / path.name).read_bytes() == path.read_bytes()


def test_a_plan_is_made_again_only_if_it_is_the_same(images: Path, tmp_path: Path) -> None:
    run("plan", images, tmp_path / "out")
    run("plan", images, tmp_path / "out")
    with pytest.raises(DataError, match=r"other settings \(--seed 0 there, 1 now\)"):
        run("plan", images, tmp_path / "out", "--seed", "1")
    Image.new("L", (9, 9)).save(images / "class0" / "new.jpg")
    with pytest.raises(DataError, match=r"other images .*has changed since"):
        run("write", images, tmp_path / "out")
    assert not list(tmp_path.rglob("*.tar"))


def test_without_a_plan_there_is_nothing_to_follow(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no plan to follow; give SOURCE too"):
        run("write", tmp_path)
    with pytest.raises(DataError, match="SOURCE and OUT are needed"):
        run("plan", tmp_path)


def test_planning_that_was_interrupted_is_told(images: Path, tmp_path: Path) -> None:
    run("plan", images, tmp_path / "out", "--split", "train=1/2,val=1/2")
    (tmp_path / "out" / "val" / "plan.parquet").unlink()
    with pytest.raises(DataError, match="the plan of val is missing"):
        run("write", tmp_path / "out")


def test_damage_is_found_mended_and_no_longer_found(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("write", images, out, "--samples-per-shard", "4")
    assert "nothing wrong (level headers)" in run("verify", out).stdout
    with (out / "train" / "train-000001.tar").open("r+b") as file:
        file.seek(2700)
        file.write(b"!")
    (out / "train" / "train-000002.tar").unlink()
    found = run("verify", out / "train")
    assert found.exit_code == 1
    assert "train-000001.tar at byte 2700, sample" in found.stdout
    assert "train-000002.tar: missing" in found.stdout
    assert "2 faults (level headers)" in found.stdout
    assert f"vitscale shards repair {out / 'train'}" in found.stderr
    with pytest.raises(DataError, match="was complete, but is damaged"):
        run("write", out)
    mended = run("repair", out)
    assert mended.exit_code == 0
    assert "train-000002.tar: written again" in mended.stdout
    assert "train: mended" in mended.stdout
    assert run("verify", out, "--level", "pixels").exit_code == 0
    assert "nothing wrong" in run("repair", out).stdout


def test_bad_images_are_tried_again(images: Path, tmp_path: Path) -> None:
    good = (images / "class0" / "0.jpg").read_bytes()
    (images / "class0" / "0.jpg").write_bytes(bytes(len(good)))
    written = run("write", images, tmp_path / "out", "--max-failures", "1").stdout
    assert "11 samples" in written
    assert f"'vitscale shards retry {tmp_path / 'out' / 'train'}' tries only these again" in written
    assert "0 of 1 image that had been left out came in" in run("retry", tmp_path / "out").stdout
    (images / "class0" / "0.jpg").write_bytes(good)
    again = run("retry", tmp_path / "out").stdout
    assert "1 of 1 image" in again
    assert "12 samples" in again


def test_images_are_shrunk_on_the_way(tmp_path: Path) -> None:
    path = tmp_path / "images" / "c" / "large.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (400, 300), (1, 2, 3)).save(path)
    run("write", tmp_path / "images", tmp_path / "out", "--resize-short", "60", "--check", "decode")
    with tarfile.open(tmp_path / "out" / "train" / "train-000000.tar") as tar:
        member = tar.extractfile("c__large.jpg")
        assert member is not None
        assert Image.open(io.BytesIO(member.read())).size == (80, 60)


def test_parts_lists_and_sizes_are_understood(images: Path, tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("class0__0\nclass1/1.jpg\n")
    (tmp_path / "bad.txt").write_text("class2__2\n")
    lists = ["--split-list", f"val={tmp_path / 'val.txt'}", "--exclude", tmp_path / "bad.txt"]
    run("write", images, tmp_path / "out", *lists, "--bytes-per-shard", "4KB", "--order", "stratified")
    train, val = (read_manifest(tmp_path / "out" / split) for split in ("train", "val"))
    assert (train.num_samples, val.num_samples) == (9, 2)
    assert len(train.shards) > 1
    with pytest.raises(DataError, match="bytes per shard: '4 apples'; write a number of bytes"):
        run("plan", images, tmp_path / "other", "--bytes-per-shard", "4 apples")
    with pytest.raises(DataError, match="split list 'val': write NAME=FILE"):
        run("plan", images, tmp_path / "other", "--split-list", "val")


def test_nothing_is_written_when_one_split_cannot_be(images: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "val").mkdir(parents=True)
    (tmp_path / "out" / "val" / "other.txt").touch()
    with pytest.raises(DataError, match=r"holds 1 other files, such as other\.txt, and no plan"):
        run("write", images, tmp_path / "out", "--split", "train=1/2,val=1/2")
    assert not (tmp_path / "out" / "train").exists()


def test_shards_inside_of_the_source_are_refused(images: Path) -> None:
    with pytest.raises(DataError, match="lies inside of"):
        run("write", images, images / "shards")


def test_a_file_in_the_place_of_a_folder_is_told(images: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(DataError, match="Not a directory"):
        run("write", images, tmp_path / "out")


def test_what_a_set_holds_is_shown(images: Path, tmp_path: Path) -> None:
    run("write", images, tmp_path / "out")
    shown = run("stats", tmp_path / "out").stdout
    assert "12 samples in 1 shards" in shown
    assert "2 class2" in shown
    parsed = json.loads(run("stats", tmp_path / "out", "--json").stdout)
    assert parsed["num_samples"] == 12


def test_a_foreign_set_is_indexed(images: Path, tmp_path: Path) -> None:
    run("write", images, tmp_path / "out", "--samples-per-shard", "4")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for path in (tmp_path / "out" / "train").glob("*.tar"):
        (foreign / path.name).write_bytes(path.read_bytes())
    (tmp_path / "classes.txt").write_text("cat\ndog\ncow\n")
    said = run("index", foreign, "--classes", tmp_path / "classes.txt").stdout
    assert f"12 samples, 3 shards, 0.0 MB -> {foreign}" in said
    assert read_manifest(foreign).classes == ("cat", "dog", "cow")
    assert run("verify", foreign).exit_code == 0
    with pytest.raises(DataError, match="--overwrite"):
        run("index", foreign)


def test_copies_are_found_and_left_out(images: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out" / "class0" / "test.png"
    held_out.parent.mkdir(parents=True)
    Image.open(images / "class1" / "4.jpg").save(held_out)
    (images / "class2" / "copy.jpg").write_bytes((images / "class0" / "0.jpg").read_bytes())
    report = tmp_path / "report"
    said = run("dedup", images, report, "--against", tmp_path / "held_out", "--match", "pixels").stdout
    assert "2 of 13 images are to be left out (1 held out elsewhere, 1 there twice)" in said
    assert f"--exclude {report}/exclude.txt" in said
    run("write", images, tmp_path / "out", "--exclude", report / "exclude.txt")
    assert read_manifest(tmp_path / "out" / "train").num_samples == 11
    with pytest.raises(DataError, match="lies inside of"):
        run("dedup", images, images / "report")
    with pytest.raises(DataError, match="SOURCE and REPORT are needed"):
        run("dedup", images)


def test_an_empty_list_of_copies_leaves_nothing_out(images: Path, tmp_path: Path) -> None:
    report = tmp_path / "report"
    assert "0 of 12 images" in run("dedup", images, report, "--match", "bytes").stdout
    run("write", images, tmp_path / "out", "--exclude", report / "exclude.txt")
    assert read_manifest(tmp_path / "out" / "train").num_samples == 12


def test_sets_are_written_to_object_storage_checked_and_mended(images: Path, tmp_path: Path, s3: S3Server) -> None:
    out = f"{s3.bucket()}/sets"
    (images / "class0" / "bad.jpg").write_bytes(b"no image")
    options = ["--samples-per-shard", "4", "--max-failures", "1"]
    said = run("write", images, out, *options, "--workers", "2").stdout
    assert f"12 samples, 4 shards, 0.0 MB, 3 classes -> {out}/train" in said
    run("write", images, tmp_path / "out", *options)
    bucket = open_place(out).child("train")
    for path in (tmp_path / "out" / "train").iterdir():
        with bucket.open(path.name) as file:
            assert file.read() == path.read_bytes(), path.name
    assert not bucket.folders()

    bucket.remove("train-000001.tar")
    bucket.publish_text("foreign.txt", "x")
    assert run("verify", out).exit_code == 1
    assert run("repair", out).exit_code == 0
    assert run("verify", out).exit_code == 0
    assert "of 12 classes" not in run("stats", out).stdout
    Image.new("L", (9, 9), 77).save(images / "class0" / "bad.jpg")
    assert "0 of 1 image" in run("retry", out).stdout  # another size than when it was planned
    with bucket.open("train-000001.tar") as file:
        assert file.read() == (tmp_path / "out" / "train" / "train-000001.tar").read_bytes()


def test_sets_of_two_sources_are_written_each_from_its_own(images: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for path in images.rglob("*.jpg"):
        twin = other / path.relative_to(images)
        twin.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (11, 11), 99).save(twin)
    out = tmp_path / "out"
    run("plan", images, out)
    run("plan", other, out, "--split", "val=1")
    with pytest.raises(DataError, match="the sets have 2 sources; write them one by one, as OUT/train"):
        run("write", out, "--source", images)
    run("write", out)
    for split, source in (("train", images), ("val", other)):
        run("write", source, tmp_path / "alone", "--split", f"{split}=1")
        for name in ("train-000000.tar", "index.json") if split == "train" else ("val-000000.tar", "index.json"):
            assert (out / split / name).read_bytes() == (tmp_path / "alone" / split / name).read_bytes()


def test_a_source_that_has_moved_is_named(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("plan", images, out)
    images.rename(tmp_path / "moved")
    with pytest.raises(DataError, match="no such file or folder"):
        run("write", out / "train")
    run("write", out / "train", "--source", tmp_path / "moved")
    (out / "train" / "train-000000.tar").unlink()
    failed = CliRunner().invoke(app, ["repair", str(out)])
    assert isinstance(failed.exception, DataError)
    assert (out / "train" / "index.json").exists()
    assert run("repair", out, "--source", tmp_path / "moved").exit_code == 0
    assert "nothing was left out" in run("retry", out).stdout


def test_a_repair_that_fails_keeps_the_index(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("write", images, out, "--samples-per-shard", "4")
    (out / "train" / "train-000001.tar").unlink()
    for path in images.rglob("*.jpg"):
        path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        run("repair", out)
    found = run("verify", out)
    assert "train-000001.tar: missing" in found.stdout
    assert "1 fault (" in found.stdout


@pytest.mark.parametrize("command", ["verify", "repair", "retry", "stats"])
def test_what_is_no_set_is_told(tmp_path: Path, command: str) -> None:
    (tmp_path / "table.csv").write_text("x")
    for path in (tmp_path / "table.csv", tmp_path / "nothing", tmp_path):
        with pytest.raises(DataError, match="no shard set"):
            run(command, path)


def test_the_advice_fits_what_is_there(images: Path, tmp_path: Path) -> None:
    run("plan", images, tmp_path / "planned")
    assert "'vitscale shards write" in run("verify", tmp_path / "planned").stderr
    run("write", images, tmp_path / "out")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "a.tar").write_bytes((tmp_path / "out" / "train" / "train-000000.tar").read_bytes())
    assert "'vitscale shards index" in run("verify", foreign).stderr
    with pytest.raises(DataError, match="was written from a plan"):
        run("index", tmp_path / "out" / "train", "--overwrite")
    (tmp_path / "out" / "train" / ".progress").mkdir()
    (tmp_path / "out" / "train" / ".progress" / "x.alive").touch()
    assert run("verify", tmp_path / "out").exit_code == 1
    assert "12 samples" in run("write", tmp_path / "out").stdout
    assert run("verify", tmp_path / "out").exit_code == 0


def test_a_report_does_not_come_among_other_files(images: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").touch()
    with pytest.raises(
        DataError, match=r"holds 1 other files, such as photo\.jpg; give the report a folder of its own"
    ):
        run("dedup", images, tmp_path / "mine")


def test_splits_are_not_taken_for_classes(images: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    images.rename(tmp_path / "data" / "train")
    with pytest.raises(DataError, match=r"which are splits, not classes; shard .*/data/train"):
        run("plan", tmp_path / "data", tmp_path / "out")


def test_a_quality_of_nothing_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give --resize-short PX too"):
        run("plan", images, tmp_path / "out", "--quality", "50")


@pytest.mark.parametrize("words", [("--samples-per-shard", "0"), ("--max-failures", "-1")])
def test_wrong_options_are_refused(images: Path, tmp_path: Path, words: tuple[str, str]) -> None:
    assert run("write", images, tmp_path / "out", *words).exit_code == 2


def test_help_names_the_command() -> None:
    assert "write" in run("--help").stdout
    assert run().exit_code == 2

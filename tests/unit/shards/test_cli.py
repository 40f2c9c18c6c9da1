"""The command, as a user gives it."""

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import vitscale_shards.cli
from vitscale.data.manifest import check_files, read_manifest
from vitscale.errors import DataError
from vitscale_shards.cli import app


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
        assert f"10 classes -> {manifest.folder}" in result.stdout


def test_the_same_command_again_says_so(images: Path, tmp_path: Path) -> None:
    run("write", images, tmp_path / "out")
    assert "complete already; nothing written" in run("write", images, tmp_path / "out").stdout


def test_what_was_left_aside_is_said(images: Path, tmp_path: Path) -> None:
    (images / "class0" / "notes.txt").touch()
    (images / "nothing").mkdir()
    (images / "class1" / "bad.png").touch()
    result = run("write", images, tmp_path / "out", "--max-failures", "1")
    assert "1 files are no images and were left aside (1 .txt)" in result.stderr
    assert "1 classes have no image: nothing; they keep their labels" in result.stderr
    assert "1 bad images left out, see" in result.stdout


def test_progress_is_told_in_lines_without_a_terminal(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vitscale_shards.cli, "SECONDS_BETWEEN_LINES", 0.0)
    assert "train: 12 of 12 images" in run("write", images, tmp_path / "out").stderr


def test_progress_is_a_bar_on_a_terminal(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "12/12" in run("write", images, tmp_path / "out").stderr


def test_nothing_is_written_when_one_split_cannot_be(images: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "val").mkdir(parents=True)
    (tmp_path / "out" / "val" / "other.txt").touch()
    with pytest.raises(DataError, match="holds 1 other files"):
        run("write", images, tmp_path / "out", "--split", "train=1/2,val=1/2")
    assert not (tmp_path / "out" / "train").exists()


def test_shards_inside_of_the_source_are_refused(images: Path) -> None:
    with pytest.raises(DataError, match="lies inside of"):
        run("write", images, images / "shards")


def test_a_file_in_the_place_of_a_folder_is_told(images: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(DataError, match="cannot be written"):
        run("write", images, tmp_path / "out")


@pytest.mark.parametrize("words", [("--samples-per-shard", "0"), ("--max-failures", "-1")])
def test_wrong_options_are_refused(images: Path, tmp_path: Path, words: tuple[str, str]) -> None:
    assert run("write", images, tmp_path / "out", *words).exit_code == 2


def test_help_names_the_command() -> None:
    assert "write" in run("--help").stdout
    assert run().exit_code == 2

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.shardset import image_bytes, key_of, make_shardset, parts_of, spoil_image
from vitscale.config.schema import DataConfig, StorageConfig
from vitscale.data.manifest import Manifest
from vitscale.data.transforms import evaluation_crop
from vitscale.errors import DataError
from vitscale.evaluation.image_sources import ImageSources, PixelBatch, find_images

STORAGE = StorageConfig()
DATA = DataConfig(train="", image_size=8, workers=2)


def find(*words: object) -> ImageSources:
    return find_images([str(word) for word in words], STORAGE)


def files(sources: ImageSources) -> list[str]:
    return [path.name for part in sources.parts if isinstance(part, tuple) for path in part]


def names(batches: Iterable[PixelBatch]) -> list[str]:
    return [Path(name).name for batch in batches for name in batch.names]


def write(folder: Path, *numbers: int, kind: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number:03}.{kind}").write_bytes(image_bytes(number, kind=kind))
    return folder


def test_words_name_files_folders_patterns_and_shard_sets(tmp_path: Path) -> None:
    write(tmp_path / "cats", 3, 1)
    write(tmp_path / "cats" / "old", 2, kind="jpg")
    (tmp_path / "cats" / "notes.txt").write_text("no image")
    odd = tmp_path / "photo.dat"
    odd.write_bytes(image_bytes(9))
    make_shardset(tmp_path / "set", [3, 2])
    assert files(find(tmp_path / "cats")) == ["001.png", "003.png", "002.jpg"]
    assert files(find(odd)) == ["photo.dat"]  # a file that is named is taken whatever its name
    assert files(find(f"{tmp_path}/**/*.jpg")) == ["002.jpg"]
    assert files(find(f"{tmp_path}/cats/*")) == ["001.png", "003.png", "002.jpg"]
    assert files(find(f"{tmp_path}/cats/00[13].png")) == ["001.png", "003.png"]
    everything = find(odd, tmp_path / "set", tmp_path / "cats")
    assert everything.num_images == 1 + 5 + 3
    assert names(everything.batches(DATA, batch_size=2)) == [
        "photo.dat",
        *(key_of(number) for number in range(5)),
        "001.png",
        "003.png",
        "002.jpg",
    ]


def test_a_file_with_brackets_in_its_name_is_no_pattern(tmp_path: Path) -> None:
    path = tmp_path / "cat[1].png"
    path.write_bytes(image_bytes(1))
    assert files(find(path)) == ["cat[1].png"]


def test_a_part_of_a_part_of_a_shard_set(tmp_path: Path) -> None:
    make_shardset(tmp_path / "set", [6, 6])
    for part, count in (("[:50%]", 6), ("[:10][:50%]", 5), ("[2:][:8][50%:]", 4)):
        (found,) = find(f"{tmp_path}/set{part}").parts
        assert isinstance(found, Manifest)
        assert (found.part, found.num_samples) == (part, count)
    write(tmp_path / "cats0", 7)
    assert files(find(f"{tmp_path}/cats[0:9]")) == ["007.png"], "a pattern that looks like a part"


@pytest.mark.parametrize("word", ["missing.png", "no/such/*.png", "train[:500]", "train[:500][:3]", "*.txt"])
def test_a_word_that_names_nothing(tmp_path: Path, word: str) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="names no image") as error:
        find(tmp_path / word)
    assert word in str(error.value)


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no image"):
        find(tmp_path)
    with pytest.raises(DataError, match="no images are named"):
        find()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_pixels_are_the_central_crops_whatever_the_batches(tmp_path: Path, batch_size: int) -> None:
    folder = write(tmp_path / "images", *range(5))
    make_shardset(tmp_path / "set", [3, 2])
    found = list(find(folder, tmp_path / "set").batches(DATA, batch_size=batch_size))
    assert all(len(batch.names) == len(batch.images) <= batch_size for batch in found)
    pixels = torch.cat([batch.images for batch in found]).permute(0, 2, 3, 1).numpy()
    contents = [image_bytes(n) for n in range(5)] + [next(iter(parts_of(n).values())) for n in range(5)]
    for content, ours in zip(contents, pixels, strict=True):
        expected = np.zeros((8, 8, 3), np.uint8)
        evaluation_crop(content, DATA, expected)
        assert (ours == expected).all()


def test_unreadable_images_are_named_where_they_are(tmp_path: Path) -> None:
    folder = write(tmp_path / "images", 0, 1, 2)
    (folder / "001.png").write_bytes(b"no image")
    (folder / "gone.png").symlink_to(folder / "nowhere")
    manifest = make_shardset(tmp_path / "set", [4])
    spoil_image(manifest, 2)
    found = list(find(folder, tmp_path / "set").batches(DATA, batch_size=4))
    assert names(found) == ["000.png", "002.png", key_of(0), key_of(1), key_of(3)]
    (first, second), (third,) = (batch.unreadable for batch in found)
    assert (Path(first.name).name, Path(second.name).name, third.name) == ("001.png", "gone.png", key_of(2))
    assert "cannot decode" in first.reason
    assert "No such file" in second.reason
    assert "cannot decode" in third.reason


def test_a_batch_may_be_all_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (batch,) = find(tmp_path).batches(DATA, batch_size=3)
    assert (batch.names, len(batch.unreadable)) == ([], 1)
    assert batch.images.shape == (0, 3, 8, 8)


def test_some_images_are_spread_evenly_over_the_sources(tmp_path: Path) -> None:
    folder = write(tmp_path / "images", *range(4))
    make_shardset(tmp_path / "set", [5, 7])
    sources = find(folder, tmp_path / "set")
    assert names(sources.batches(DATA, batch_size=3, at_most=8)) == [
        "000.png",
        "002.png",
        *(key_of(number) for number in (0, 2, 4, 6, 8, 10)),
    ]
    assert len(names(sources.batches(DATA, batch_size=3, at_most=16))) == 16
    assert len(names(sources.batches(DATA, batch_size=3, at_most=100))) == 16
    assert names(sources.batches(DATA, batch_size=3, at_most=1)) == [key_of(0)]


def test_several_labels_are_no_matter(tmp_path: Path) -> None:
    labels = b'{"labels": [1, 2]}'
    make_shardset(tmp_path / "set", [2], parts=lambda n: {"png": image_bytes(n), "json": labels}, multi_label=True)
    assert len(names(find(tmp_path / "set").batches(DATA, batch_size=2))) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = write(tmp_path, 1) / "001.png"
    path.chmod(0)
    (batch,) = find(path).batches(DATA, batch_size=1)
    assert "Permission denied" in batch.unreadable[0].reason

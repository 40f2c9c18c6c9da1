"""Sources that do not keep to what rows are."""

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.plans import SPEC, Listed, named, plan, rows
from vitscale.errors import DataError
from vitscale_shards.place import LocalPlace
from vitscale_shards.planning.planner import make_plans
from vitscale_shards.planning.settings import PlanSettings
from vitscale_shards.rows import Row
from vitscale_shards.sources.folder import ImageFolder


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row("", (0,), "p"), "p has the key '', the labels [0] and 0 bytes; a key has 1 to 90 characters of A-Z"),
        (Row("a.b", (0,), "p"), "a key has 1 to 90 characters"),
        (Row("a/b", (0,), "p"), "a key has 1 to 90 characters"),
        (Row("a\n", (0,), "p"), "a key has 1 to 90 characters"),
        (Row("\u00e9", (0,), "p"), "a key has 1 to 90 characters"),
        (Row("x" * 91, (0,), "p"), "a key has 1 to 90 characters"),
        (Row(None, (0,), "p"), "a key has 1 to 90 characters"),  # type: ignore[arg-type]
        (Row("k", (), "p"), "one label per image is needed"),
        (Row("k", (0, 1), "p"), "one label per image is needed"),
        (Row("k", None, "p"), "one label per image is needed"),  # type: ignore[arg-type]
        (Row("k", (-1,), "p"), "the labels [-1] and 0 bytes; labels are numbers from 0 to 2"),
        (Row("k", (3,), "p"), "labels are numbers from 0 to 2"),
        (Row("k", (None,), "p"), "labels are numbers from 0 to 2"),  # type: ignore[arg-type]
        (Row("k", (0,), None), "a path is needed"),  # type: ignore[arg-type]
        (Row("k", (0,), "p", -1), "-1 bytes; a number of bytes is at least 0"),
        (Row("k", (0,), "p", None), "a number of bytes is at least 0"),  # type: ignore[arg-type]
        (Row("k", (1 << 40,), "p"), "is no row"),
        (Row("k", ("cat",), "p"), "is no row"),  # type: ignore[arg-type]
        (Row("k", 0, "p"), "is no row"),  # type: ignore[arg-type]
        (Row(7, (0,), "p"), "is no row"),  # type: ignore[arg-type]
        (Row("k", (0,), Path("p")), "is no row"),  # type: ignore[arg-type]
        (Row("k", (0,), "p", 1 << 70), "is no row"),
        (("k", (0,), "p"), "is no row"),
        (None, "is no row"),
        (Row("k", (0,), "c/\udcff.jpg"), r"'c/\udcff.jpg': a name that is not UTF-8; rename the file"),
    ],
)
def test_a_wrong_row_of_a_source_is_told(tmp_path: Path, row: Any, message: str) -> None:
    for listed in ([row], [*rows(50), row, *rows(50, start=60)]):
        with pytest.raises(DataError) as caught:
            plan(tmp_path, Listed(listed, name="mine"))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("labels", [(0, 3), (-1,), (1, None)])
def test_wrong_labels_among_several_are_told(tmp_path: Path, labels: Any) -> None:
    listed = [Row("a", (), "p"), Row("b", (0, 1, 2), "q"), Row("c", labels, "r"), Row("d", (), "s")]
    with pytest.raises(DataError, match=r"s: r has the key 'c', .*labels are numbers from 0 to 2: mend the source"):
        plan(tmp_path, Listed(listed, multi_label=True))


def test_labels_without_names_are_bounded(tmp_path: Path) -> None:
    """All up to the largest are counted."""
    with pytest.raises(DataError, match="labels are numbers from 0 to 16777215"):
        plan(tmp_path, Listed([Row("k", (1 << 24,), "p")], classes=None))


def test_names_that_are_not_utf8_are_told(tmp_path: Path) -> None:
    (tmp_path / "in" / "cat").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path / "in" / "cat") + b"/\xff.png")  # noqa: PTH104
    with pytest.raises(DataError, match=r"'cat/\\udcff.png': a name that is not UTF-8; rename the file"):
        make_plans(ImageFolder(tmp_path / "in"), SPEC, PlanSettings(), LocalPlace(tmp_path / "out"))


def test_a_split_without_images_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="split 'val' gets none of 3 images; give it a larger share or leave it out"):
        plan(tmp_path, rows(3), split="train=0.999999,val=0.000001")
    with pytest.raises(DataError, match="split 'train' gets none of 0 images"):
        plan(tmp_path, [])


def test_shards_by_bytes_need_sizes(tmp_path: Path) -> None:
    listed = [*rows(5), Row("unknown", (0,), "c/unknown.jpg"), *rows(5, start=5)]
    with pytest.raises(DataError, match=r"the size of c/unknown\.jpg is 0, or not known before it is read"):
        plan(tmp_path, listed, bytes_per_shard=1000)
    exclude = named(tmp_path / "lists", "bad", "unknown")
    assert plan(tmp_path / "out", listed, bytes_per_shard=1000, exclude=(exclude,))["train"].num_samples == 10

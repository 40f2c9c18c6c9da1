"""The picture of a confusion matrix, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitscale.errors import ConfigError, DataError
from vitscale.evaluation.confusion import check_confusion, write_confusion


@pytest.mark.parametrize("classes", [1, 10, 40, 120])
def test_any_number_of_classes_is_drawn_and_its_numbers_are_kept(tmp_path: Path, classes: int) -> None:
    table = np.random.default_rng(0).integers(0, 9, (classes, classes))
    table[0] = 0  # a class without images
    path = tmp_path / "a.png"
    write_confusion(path, table, ["plane"], title="model on set")
    with Image.open(path) as image:
        colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
    assert len(colours) > 50
    with np.load(path.with_suffix(".npz")) as found:
        np.testing.assert_array_equal(found["counts"], table)
        assert found["classes"].tolist() == ["plane", *map(str, range(1, classes))]


def test_what_cannot_be_drawn_is_told_before(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    check_confusion(path, 1000, multi_label=False)
    cases = [
        (path, 1001, False, "1001 classes make a table of 1,002,001 cells"),
        (path, 10, True, "for images with one label each"),
        (tmp_path / "a.pdf", 10, False, "a name that ends in .png is needed"),
        (tmp_path / "no" / "a.png", 10, False, "its folder does not exist"),
    ]
    for where, classes, several, message in cases:
        with pytest.raises(ConfigError, match=message):
            check_confusion(where, classes, multi_label=several)
    (tmp_path / "b.png").mkdir()
    with pytest.raises(DataError, match="cannot be written: Is a directory"):
        write_confusion(tmp_path / "b.png", np.eye(3, dtype=np.int64), None, title="")

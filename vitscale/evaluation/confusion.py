"""The confusion matrix as a picture, and the numbers behind it. K classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vitscale.durable import published
from vitscale.errors import ConfigError, DataError
from vitscale.evaluation.names import output_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_CLASSES = 1000
# Up to which a cell has room for its number, and a class for its name.
_NUMBERED, _NAMED = 20, 60
_NAME_LENGTH = 18


def check_confusion(path: Path, num_classes: int, *, multi_label: bool) -> None:
    """See before the evaluation that the picture can be made.

    Raises:
        ConfigError: it has no meaning, is too large, or cannot lie there.
    """
    if multi_label:
        raise ConfigError("--confusion is for images with one label each, and this set has several; leave it out")
    if num_classes > MAX_CLASSES:
        raise ConfigError(
            f"--confusion: {num_classes} classes make a table of {num_classes**2:,} cells; up to {MAX_CLASSES} classes "
            f"are drawn; leave it out"
        )
    if path.suffix != ".png":
        raise ConfigError(f"--confusion {path}: a name that ends in .png is needed; the numbers go beside it as .npz")
    if not path.parent.is_dir():
        raise ConfigError(f"--confusion {path}: its folder does not exist; make it, or choose another")


def write_confusion(path: Path, table: NDArray[np.int64], classes: Sequence[str] | None, *, title: str) -> None:
    """Draw a confusion matrix, and write its counts and class names as .npz beside the picture.

    Args:
        path: .png to write, or to replace.
        table: images [K, K] by true class (rows) and best class (columns).
        classes: names.
        title: over the picture.

    Raises:
        DataError: the files cannot be written.
    """
    names = output_names(classes, len(table), unnamed="{}")
    try:
        with published(path.with_suffix(".npz")) as file:
            np.savez_compressed(file, counts=table, classes=np.array(names))
        _draw(path, table, names, title)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}; choose another place") from error


def _draw(path: Path, table: NDArray[np.int64], names: list[str], title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    totals = table.sum(axis=1, keepdims=True)
    # A class without images has no shares; it stays empty.
    shares = np.divide(table, totals, out=np.full(table.shape, np.nan), where=totals > 0)
    side = min(14.0, 4.5 + 0.28 * min(len(names), 40))
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    picture = axes.imshow(100 * shares, cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(picture, ax=axes, label="share of the images of a true class [%]", shrink=0.85)
    top1 = np.trace(table) / max(1, table.sum())
    axes.set_title(f"{title}\ntop-1 {top1:.2%} of {table.sum():,} images", fontsize=10)
    axes.set_xlabel("best class")
    axes.set_ylabel("true class")
    if len(names) <= _NAMED:
        _name_classes(axes, names)
    if len(names) <= _NUMBERED:
        _number_cells(axes, shares)
    with published(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _name_classes(axes: Axes, names: list[str]) -> None:
    short = [name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 1]}…" for name in names]
    size = 9 if len(names) <= _NUMBERED else 6
    axes.set_xticks(range(len(names)), short, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), short, fontsize=size)


def _number_cells(axes: Axes, shares: NDArray[np.float64]) -> None:
    for row, column in np.argwhere(shares > 0.005):
        share = shares[row, column]
        # Readable on the dark and on the light end of the colours.
        axes.text(
            column,
            row,
            f"{100 * share:.0f}",
            ha="center",
            va="center",
            fontsize=8,
            color="black" if share > 0.6 else "white",
        )

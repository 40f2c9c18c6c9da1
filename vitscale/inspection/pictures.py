"""The pictures, drawn by matplotlib without a screen. Colours are those that colour-blind readers can tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vitscale.durable import published

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

    from vitscale.inspection.attention import AttentionDistance, Rollout
    from vitscale.inspection.embeddings import FilterComponents, PositionSimilarity

DPI = 150
COLUMNS = 7
"""Of the picture of the filters, as in the paper."""
MOST_PANELS = 16
"""Positions of a side that get a panel of their own; of a larger grid, evenly spread ones do."""
BLUE, ORANGE = "#0072B2", "#D55E00"
"""Of the palette of Okabe and Ito."""
GAP = 0.14
"""Between two panels, as a share of a panel."""
BRIGHTEST = 0.98
"""Share of the patches that are less bright than can be."""
HEADER, TILE, SIDE, LEAST = 0.95, 1.1, 1.5, 1.7
"""Inches: above the picture, of a filter, of an image, of a grid of grids."""
LETTERS = 14
"""Of a name, in an inch."""


def draw_filters(found: FilterComponents, model: str, path: Path) -> None:
    """A tile for each principal component, in its own range of values."""
    count = len(found.components)
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    sheet = _Sheet(0.2 + TILE * COLUMNS, HEADER + (TILE + 0.15) * rows)
    for number, component in enumerate(found.components):
        row, column = divmod(number, columns)
        axis = sheet.axes(0.15 + TILE * column, HEADER + (TILE + 0.15) * row + 0.05, TILE - 0.1, TILE - 0.1)
        low, high = component.min(), component.max()
        axis.imshow((component - low) / (high - low), interpolation="nearest")
        axis.axis("off")
        axis.set_title(f"{number + 1}: {_percent(found.explained[number])}", fontsize=8, pad=3)
    sheet.title(
        f"{model}: first {count} principal components of its filters",
        f"of {found.filters} filters of {found.of}\neach tile in its own range; numbers are shares of the filters' "
        f"variance, {_percent(found.explained.sum())} in all",
    )
    sheet.save(path)


def draw_positions(found: PositionSimilarity, model: str, path: Path) -> None:
    """A grid of grids: each panel is the similarity of one position to all positions."""
    grid = found.similarity.shape[:2]
    shown = [_spread(side) for side in grid]
    spans = [len(places) * (1 + GAP) - GAP for places in shown]
    # Cells are square, so a panel is as wide to its height as the grid, unless that leaves no room for words.
    shape = spans[1] * grid[1] / (spans[0] * grid[0])
    across, down = max(min(5.6, 5.6 * shape), LEAST), max(min(5.6, 5.6 / shape), LEAST)
    sheet = _Sheet(max(across + 1.6, 5.5), HEADER + down + 0.5)
    axis = sheet.axes(0.65, HEADER, across, down)
    for row, place_down in enumerate(shown[0]):
        for column, place_across in enumerate(shown[1]):
            left, top = column * (1 + GAP), row * (1 + GAP)
            image = axis.imshow(
                found.similarity[place_down, place_across],
                extent=(left, left + 1, top + 1, top),
                vmin=-1,
                vmax=1,
                cmap=_colours(),
                interpolation="nearest",
                aspect="auto",
            )
    axis.set_xlim(0, spans[1])
    axis.set_ylim(spans[0], 0)
    axis.set_xticks([0.5 + n * (1 + GAP) for n in range(len(shown[1]))], [str(place + 1) for place in shown[1]])
    axis.set_yticks([0.5 + n * (1 + GAP) for n in range(len(shown[0]))], [str(place + 1) for place in shown[0]])
    axis.tick_params(length=0, labelsize=8)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("patch column of the position", fontsize=9)
    axis.set_ylabel("patch row of the position", fontsize=9)
    bar = sheet.figure.colorbar(image, cax=sheet.axes(0.65 + across + 0.15, HEADER, 0.14, down))
    bar.set_label("cosine similarity", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    skipped = any(len(places) < side for places, side in zip(shown, grid, strict=True))
    where = "" if found.table == "input" else f", {found.table.replace('_', ' ')}"
    sheet.title(
        f"{model}: similarity of position embeddings{where}",
        f"{found.of}\neach panel: one position against all {grid[0]} x {grid[1]}"
        + (f"; {len(shown[0])} x {len(shown[1])} of them have a panel" if skipped else ""),
    )
    sheet.save(path)


def draw_distances(found: AttentionDistance, model: str, path: Path) -> None:
    """A dot for each head of each layer, and the mean of the heads."""
    layers, heads = found.distance_px.shape
    width = min(max(5.5, 0.32 * layers + 1.5), 14)
    rotated = not all(label.isdecimal() for label in found.layers)
    foot = 1.35 if rotated else 0.85
    sheet = _Sheet(width, HEADER + 2.8 + foot)
    axis = sheet.axes(0.65, HEADER, width - 0.85, 2.8)
    places = np.arange(layers)
    axis.scatter(
        np.repeat(places, heads), found.distance_px.flat, s=16, color=BLUE, alpha=0.65, lw=0, zorder=3, label="one head"
    )
    axis.plot(places, found.distance_px.mean(axis=1), color=ORANGE, lw=1.6, label="mean of the heads")
    if found.uniform_px is not None:
        uniform = f"uniform attention: {found.uniform_px:.3g} px"
        axis.axhline(found.uniform_px, color="0.45", lw=1, ls="--", label=uniform)
    axis.set_ylim(0, 1.08 * max(found.uniform_px or 0, found.distance_px.max()) or 1)
    every = -(-layers // 32)
    axis.set_xticks(places[::every], found.layers[::every], rotation=90 if rotated else 0)
    axis.set_xlim(-0.6, layers - 0.4)
    axis.tick_params(labelsize=8)
    axis.set_xlabel("layer", fontsize=9)
    axis.set_ylabel("mean attention distance (pixels)", fontsize=9)
    axis.grid(axis="y", color="0.9", lw=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    sheet.figure.legend(loc="lower center", ncols=3, fontsize=8, frameon=False)
    sheet.title(
        f"{model}: mean attention distance",
        f"{heads} heads in each of {layers} layers; mean over all patches of {found.images:,} images",
    )
    sheet.save(path)


def draw_rollout(found: Rollout, model: str, path: Path) -> None:
    """For each image: itself, itself as bright as the attention, and the attention as colours."""
    count, (height_px, width_px) = len(found.names), found.pixels.shape[1:3]
    blocks = 1 if count <= 3 else 2
    rows = -(-count // blocks)
    across = SIDE * min(1.0, width_px / height_px)
    down = across * height_px / width_px
    block = 3 * across + 0.35
    sheet = _Sheet(max(0.15 + blocks * block + 0.75, 5.5), HEADER + 0.1 + rows * (down + 0.3))
    relative = found.maps / found.maps.mean(axis=(1, 2), keepdims=True)
    # One patch among hundreds would leave all others in the dark.
    most = max(float(np.quantile(relative, BRIGHTEST)), 1.001)
    for number, name in enumerate(found.names):
        row, column = number % rows, number // rows
        axes = [
            sheet.axes(0.15 + column * block + place * (across + 0.08), HEADER + 0.1 + row * (down + 0.3), across, down)
            for place in range(3)
        ]
        light = enlarge(
            np.minimum(relative[number] / np.quantile(relative[number], BRIGHTEST), 1), (height_px, width_px)
        )
        axes[0].imshow(found.pixels[number])
        axes[1].imshow(found.pixels[number] / 255 * light[..., None])
        image = axes[2].imshow(relative[number], cmap=_colours(), vmin=0, vmax=most, interpolation="nearest")
        axes[0].set_title(_shortened(name, int(3 * across * LETTERS)), fontsize=8, loc="left", pad=3)
        for axis in axes:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_aspect("auto")
    place = sheet.axes(0.15 + blocks * block - 0.05, HEADER + 0.1, 0.13, min(rows * (down + 0.3) - 0.3, 3.5))
    bar = sheet.figure.colorbar(image, cax=place, extend="max" if relative.max() > most else "neither")
    bar.set_label("share of a patch, times uniform", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    sheet.title(
        f"{model}: attention rollout",
        f"how much of each patch reaches the {found.read_by} through all layers: image, image dimmed by it, numbers\n"
        f"brightest: the top {1 - BRIGHTEST:.0%} of the patches, of one image where it is dimmed, else of all images",
    )
    sheet.save(path)


def enlarge(values: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
    """Resize [h, w] to ``size``, bilinear: what lies between the centres of patches is mixed from them."""
    for axis, (old, new) in enumerate(zip(values.shape, size, strict=True)):
        centres = (np.arange(new) + 0.5) * old / new - 0.5
        below = np.clip(np.floor(centres).astype(int), 0, old - 1)
        share = np.clip(centres - below, 0, 1)
        above = np.minimum(below + 1, old - 1)
        weight = share if axis else share[:, None]
        values = values.take(below, axis) * (1 - weight) + values.take(above, axis) * weight
    return values


def _spread(side: int) -> list[int]:
    """Evenly spread places of a side, all of them if there are few."""
    count = min(side, MOST_PANELS)
    return [(2 * number + 1) * side // (2 * count) for number in range(count)]


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}"


def _shortened(name: str, most: int) -> str:
    """The last parts of a path, as many as there is room for."""
    if len(name) <= most:
        return name
    parts = name.split("/")
    while len(parts) > 1 and len("/".join(parts)) > most - 4:
        del parts[0]
    last = "/".join(parts)
    return f".../{last}" if len(last) <= most - 4 else f"...{last[3 - most :]}"


def _colours() -> Colormap:
    """Colours that rise in brightness; grey where there is no number."""
    from matplotlib import colormaps

    return colormaps["viridis"].with_extremes(bad="0.6")


class _Sheet:
    """A white sheet of so many inches on which places are told from its upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self._size = width, height
        self.figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes with these places and sizes in inches."""
        across, down = self._size
        return self.figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))

    def title(self, title: str, explanation: str) -> None:
        """One line in bold, and up to two below it, in letters that the sheet has room for."""
        left, down = 0.15 / self._size[0], self._size[1]
        head = self.figure.text(left, 1 - 0.12 / down, title, fontsize=11, weight="bold", va="top")
        rest = self.figure.text(left, 1 - 0.37 / down, explanation, fontsize=8, color="0.35", va="top", linespacing=1.3)
        for text, size in ((head, 11), (rest, 8)):
            text.set_fontsize(size * min(1, DPI * (self._size[0] - 0.3) / text.get_window_extent().width))

    def save(self, path: Path) -> None:
        """Write a PNG, all of it or nothing."""
        with published(path) as file:
            self.figure.savefig(file, format="png")

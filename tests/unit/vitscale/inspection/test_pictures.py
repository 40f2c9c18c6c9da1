from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitscale.inspection.attention import AttentionDistance, Rollout
from vitscale.inspection.embeddings import FilterComponents, PositionSimilarity
from vitscale.inspection.pictures import draw_distances, draw_filters, draw_positions, draw_rollout, enlarge

MODEL = "R50+ViT-So400m/14, step 1,000,000 (ema)"
RANDOM = np.random.default_rng(0)


def check(path: Path) -> Image.Image:
    """A readable picture with something in it, of which nothing is cut off at the edges."""
    image = Image.open(path).convert("RGB")
    pixels = np.asarray(image)
    edges = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    assert all((edge == 255).all() for edge in edges)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    return image


@pytest.mark.parametrize(("count", "side"), [(28, 4), (5, 7), (1, 2)])
def test_filters(tmp_path: Path, count: int, side: int) -> None:
    components = RANDOM.normal(size=(count, side, side, 3))
    found = FilterComponents(components, np.full(count, 0.9 / count), "the ResNet's root", 64)
    draw_filters(found, MODEL, tmp_path / "filters.png")
    check(tmp_path / "filters.png")


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (1, 9), (12, 2), (40, 24)])
def test_positions(tmp_path: Path, grid: tuple[int, int]) -> None:
    similarity = RANDOM.uniform(-1, 1, size=(*grid, *grid))
    similarity[0, 0] = np.nan
    found = PositionSimilarity(similarity, "block_12", "learned for rows and columns, and added")
    draw_positions(found, MODEL, tmp_path / "positions.png")
    check(tmp_path / "positions.png")


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (12, 12), (56, 16)])
def test_distances(tmp_path: Path, layers: int, heads: int) -> None:
    names = tuple(str(number + 1) for number in range(layers))
    distance = RANDOM.uniform(0, 117, size=(layers, heads))
    found = AttentionDistance(distance, distance, names, 116.2, 128)
    draw_distances(found, MODEL, tmp_path / "distance.png")
    check(tmp_path / "distance.png")


def test_distances_of_rows_and_columns(tmp_path: Path) -> None:
    names = tuple(f"{number} {span}" for number in range(1, 13) for span in ("rows", "columns"))
    found = AttentionDistance(np.zeros((24, 2)), np.zeros((24, 2)), names, None, 1)
    draw_distances(found, MODEL, tmp_path / "distance.png")
    check(tmp_path / "distance.png")


@pytest.mark.parametrize(("count", "hw"), [(1, (32, 32)), (4, (32, 64)), (5, (64, 32))])
def test_rollout(tmp_path: Path, count: int, hw: tuple[int, int]) -> None:
    names = tuple("/a/long/way/" + "to/the/folder/" * 4 + f"image-{n}.jpg" for n in range(count))
    pixels = RANDOM.integers(0, 256, (count, *hw, 3), np.uint8)
    found = Rollout(RANDOM.uniform(0, 0.1, size=(count, 4, 4)), names, pixels, "class token")
    draw_rollout(found, MODEL, tmp_path / "rollout.png")
    check(tmp_path / "rollout.png")


def test_rollout_of_even_attention(tmp_path: Path) -> None:
    pixels = RANDOM.integers(0, 256, (1, 8, 8, 3), np.uint8)
    found = Rollout(np.full((1, 2, 2), 0.25), ("image",), pixels, "mean over patches")
    draw_rollout(found, MODEL, tmp_path / "rollout.png")
    check(tmp_path / "rollout.png")


def test_a_picture_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    found = Rollout(np.full((1, 2, 2), 0.25), ("image",), np.zeros((1, 8, 8, 3), np.uint8), "class token")
    with pytest.raises(FileNotFoundError):
        draw_rollout(found, MODEL, tmp_path / "missing" / "rollout.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("old", "new"), [((2, 3), (10, 12)), ((1, 1), (5, 4)), ((7, 4), (7, 4)), ((14, 14), (224, 224))]
)
def test_enlarging_is_bilinear(old: tuple[int, int], new: tuple[int, int]) -> None:
    values = RANDOM.uniform(size=old)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(values)[None, None], size=new, mode="bilinear", align_corners=False
    )[0, 0].numpy()
    assert enlarge(values, new) == pytest.approx(expected)

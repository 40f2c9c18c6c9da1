"""Sheets of pairs to look at: two images side by side with text below, the least alike first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vitscale.data.decode import BadSampleError, decode_image
from vitscale.durable import published
from vitscale_shards.dedup.pairs import Pair, PairImage
from vitscale_shards.images import MAX_PIXELS
from vitscale_shards.rows import BadImageError

PAIRS_PER_SHEET = 100
MAX_SHEETS = 10
COLUMNS = 5
SIDE_PX = 128
GAP_PX = 8
LINE_PX = 13
FONT_PX = 10
_TEXT_PX = 2 * SIDE_PX + GAP_PX
CELL_PX = (_TEXT_PX + 2 * GAP_PX, SIDE_PX + 3 * LINE_PX + 2 * GAP_PX)
"""Width and height of what a pair takes on a sheet."""

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw_sheets(folder: Path, pairs: Iterable[Pair]) -> int:
    """Draw the first pairs to ``sheet-000.jpg`` and so on, and remove the sheets of an earlier report.

    Returns:
        The number of sheets.
    """
    rest = iter(pairs)
    number = 0
    while number < MAX_SHEETS and (shown := list(islice(rest, PAIRS_PER_SHEET))):
        with published(folder / _name(number)) as file:
            _draw(shown).save(file, "JPEG", quality=90)
        number += 1
    for old in range(number, MAX_SHEETS):
        (folder / _name(old)).unlink(missing_ok=True)
    return number


def _name(number: int) -> str:
    return f"sheet-{number:03d}.jpg"


def _draw(pairs: Sequence[Pair]) -> Image.Image:
    width, height = CELL_PX
    sheet = Image.new("RGB", (COLUMNS * width, -(-len(pairs) // COLUMNS) * height), "white")
    font = ImageFont.load_default(FONT_PX)
    for place, pair in enumerate(pairs):
        row, column = divmod(place, COLUMNS)
        _draw_pair(sheet, column * width + GAP_PX, row * height + GAP_PX, pair, font)
    return sheet


def _draw_pair(sheet: Image.Image, left: int, top: int, pair: Pair, font: _Font) -> None:
    lines = []
    for side, image in enumerate((pair.left_out, pair.matches)):
        sheet.paste(_thumbnail(image), (left + side * (SIDE_PX + GAP_PX), top))
        lines.append(f"{image.images.name} {image.row.key}")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate([*lines, _likeness(pair)]):
        draw.text((left, top + SIDE_PX + number * LINE_PX), _shortened(line, font), fill="black", font=font)


def _thumbnail(image: PairImage) -> Image.Image:
    """The whole image on a grey square, or the square alone if it cannot be read any more."""
    square = Image.new("RGB", (SIDE_PX, SIDE_PX), "lightgrey")
    try:
        full = decode_image(image.images.source.read(image.row), max_pixels=MAX_PIXELS)
    except (BadImageError, BadSampleError):
        return square
    scale = SIDE_PX / max(full.size)
    width, height = (max(1, round(side * scale)) for side in full.size)
    square.paste(
        full.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0),
        ((SIDE_PX - width) // 2, (SIDE_PX - height) // 2),
    )
    return square


def _likeness(pair: Pair) -> str:
    text = f"near, distance {pair.distance}" if pair.kind == "near" else f"same {pair.kind}"
    if pair.same_label is None:
        return text
    return f"{text}, {'same' if pair.same_label else 'other'} label"


def _shortened(text: str, font: _Font) -> str:
    """The text, or as much of its ends as there is room for."""
    short, keep = text, len(text)
    while font.getlength(short) > _TEXT_PX:
        keep -= 2
        short = f"{text[: keep // 2]}...{text[len(text) - keep // 2 :]}"
    return short

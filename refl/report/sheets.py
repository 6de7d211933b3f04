"""Contact sheets: captioned grids of images."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

CAPTION_SIZE = 14  # pixels
MAX_IMAGES = 16  # shown of a validation
# TensorBoard shows a sheet 350 pixels wide: of two columns, captions of this size can be read there.
SHEET_COLUMNS, SHEET_CAPTION_SIZE = 2, 18


def grid(
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[Sequence[str]],
    cell: int = 256,
    header: str = "",
    caption_size: int = CAPTION_SIZE,
) -> Image.Image:
    """Arrange images, scaled to fit `cell` pixels and captioned below, one row for each sequence."""
    font = ImageFont.load_default(caption_size)
    per_line = max(8, int(cell / (caption_size * 0.52)))
    lines = [
        [[line for part in text.split("\n") for line in textwrap.wrap(part, per_line)] for text in row]
        for row in captions
    ]
    line_height = int(caption_size * 1.3)
    heights = [cell + line_height * max(len(text) for text in row) + 12 for row in lines]
    top = line_height * len(header.splitlines()) + 12 if header else 0
    gap = 8
    width = max(len(row) for row in rows) * (cell + gap) + gap
    sheet = Image.new("RGB", (width, top + sum(heights) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((gap, 6), header, fill="black", font=font)
    for row, row_lines, height in zip(rows, lines, heights, strict=True):
        for column, (image, text) in enumerate(zip(row, row_lines, strict=True)):
            left = gap + column * (cell + gap)
            scale = cell / max(image.size)
            resample = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
            shown = image.resize((round(image.width * scale), round(image.height * scale)), resample)
            sheet.paste(shown, (left, top + gap))
            draw.multiline_text((left, top + gap + cell + 2), "\n".join(text), fill="black", font=font)
        top += height
    return sheet


def sheet(images: Sequence[Image.Image], captions: Sequence[str], header: str) -> Image.Image:
    """Arrange one sequence of images in a `grid` that can be read in TensorBoard."""
    rows = [slice(start, start + SHEET_COLUMNS) for start in range(0, len(images), SHEET_COLUMNS)]
    return grid(
        [images[row] for row in rows],
        [captions[row] for row in rows],
        header=header,
        caption_size=SHEET_CAPTION_SIZE,
    )


def pairs(
    images: dict[str, Sequence[Image.Image]],
    captions: dict[str, Sequence[str]],
    per_row: int,
    header: str = "",
) -> Image.Image:
    """Arrange sequences of equal length by side, such as before and after, in a `grid`: partners above each
    other."""
    rows, texts = [], []
    for start in range(0, len(next(iter(images.values()))), per_row):
        for side, sequence in images.items():
            rows.append(sequence[start : start + per_row])
            texts.append(captions[side][start : start + per_row])
    return grid(rows, texts, header=header)

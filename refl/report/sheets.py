"""Contact sheets: captioned grids of images."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

CAPTION_SIZE = 14  # pixels
MAX_IMAGES = 32  # shown of a validation


def grid(
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[Sequence[str]],
    cell: int = 256,
    header: str = "",
) -> Image.Image:
    """Arrange images, scaled to fit `cell` pixels and captioned below, one row for each sequence."""
    font = ImageFont.load_default(CAPTION_SIZE)
    per_line = max(8, int(cell / (CAPTION_SIZE * 0.52)))
    lines = [
        [[line for part in text.split("\n") for line in textwrap.wrap(part, per_line)] for text in row]
        for row in captions
    ]
    line_height = int(CAPTION_SIZE * 1.3)
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


def sheet(
    images: Sequence[Image.Image], captions: Sequence[str], header: str, per_row: int = 4
) -> Image.Image:
    """Arrange one sequence of images in a `grid`, `per_row` in each row."""
    rows = [slice(start, start + per_row) for start in range(0, len(images), per_row)]
    return grid([images[row] for row in rows], [captions[row] for row in rows], header=header)


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

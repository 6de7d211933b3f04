"""Captioned images in a folder: what the model's own training loss is taken on."""

from pathlib import Path

from refl.system.errors import UserError
from refl.system.prompts import json_lines

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_captioned(folder: str | Path) -> list[tuple[Path, str]]:
    """Images of `folder` with their captions, in order.

    Captions are in metadata.jsonl (a line {"file_name": ..., "text": ...} for each image, as the datasets
    library has it), or in a .txt file beside each image. Raises `UserError` with the place of the mistake.
    """
    folder = Path(folder)
    metadata = folder / "metadata.jsonl"
    if not folder.is_dir():
        raise UserError(f"--pretrain_data {folder}: there is no such folder.")
    if metadata.exists():
        pairs = _read_metadata(metadata)
    else:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        pairs = [(file, _read_caption(file.with_suffix(".txt"))) for file in files]
    if not pairs:
        raise UserError(f"--pretrain_data {folder}: no image in it ({', '.join(SUFFIXES)}).")
    for file, _ in pairs:
        if not file.is_file():
            raise UserError(f"{metadata}: there is no image {file}.")
    return pairs


def _read_metadata(metadata: Path) -> list[tuple[Path, str]]:
    try:
        content = metadata.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{metadata} cannot be read ({error}).") from error
    pairs = []
    for place, entry in json_lines(metadata, content):
        try:
            pairs.append((metadata.parent / entry["file_name"], " ".join(entry["text"].split())))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f'{place}: expected {{"file_name": "1.png", "text": "a caption"}}.') from error
    return pairs


def _read_caption(file: Path) -> str:
    try:
        return " ".join(file.read_text(encoding="utf-8").split())
    except FileNotFoundError as error:
        raise UserError(
            f"--pretrain_data: no caption. Put it into {file}, or all of them into metadata.jsonl."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}).") from error


def read_square(file: Path, side: int) -> Tensor:
    """An image as (3, side, side) in [-1, 1]: turned as its camera says, short side to `side`, its middle
    cut out. Raises `UserError` for a file that is no image."""
    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: not an image that can be read.") from error
    square = np.asarray(ImageOps.fit(upright, (side, side), Image.Resampling.BICUBIC))
    return torch.from_numpy(square.copy()).permute(2, 0, 1).float() / 127.5 - 1

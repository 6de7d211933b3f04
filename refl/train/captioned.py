"""Captioned images for the pretraining loss, read from a folder."""

from pathlib import Path

from refl.system.errors import UserError
from refl.system.prompts import json_lines

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_captioned(folder: str | Path) -> list[tuple[Path, str]]:
    """List the images of `folder` with their captions, in order.

    Captions are in metadata.jsonl (one line {"file_name": ..., "text": ...} per image, the format of the
    datasets library), or in a .txt file beside each image. Raises `UserError` with the place of a mistake.
    """
    folder = Path(folder)
    metadata = folder / "metadata.jsonl"
    if not folder.is_dir():
        raise UserError(f"--pretrain_data {folder}: no such folder.")
    if metadata.exists():
        pairs = _read_metadata(metadata)
    else:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        pairs = [(file, _read_caption(file.with_suffix(".txt"))) for file in files]
    if not pairs:
        raise UserError(f"--pretrain_data {folder}: no image in this folder ({', '.join(SUFFIXES)}).")
    for file, _ in pairs:
        if not file.is_file():
            raise UserError(f"{metadata}: no such image: {file}.")
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
            f"--pretrain_data: missing caption. Write it to {file}, or all captions to metadata.jsonl."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}).") from error


def read_square(file: Path, side: int) -> Tensor:
    """Read an image as (3, side, side) in [-1, 1]: rotated by its EXIF orientation, resized so that the short
    side is `side`, cropped to the centre. Raises `UserError` for an unreadable file."""
    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: not a readable image.") from error
    square = np.asarray(ImageOps.fit(upright, (side, side), Image.Resampling.BICUBIC))
    return torch.from_numpy(square.copy()).permute(2, 0, 1).float() / 127.5 - 1

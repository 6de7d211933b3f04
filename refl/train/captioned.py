"""Captioned images for the pretraining loss, read from a folder."""

from pathlib import Path

from refl.system.errors import UserError
from refl.system.images import read_image
from refl.system.prompts import check_prompt, json_lines
from refl.system.reading import check_file, check_types, exists, is_folder, read_text

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = {"file_name": str, "text": str}
EXPECTED = 'Expected: {"file_name": "1.png", "text": "a caption"}.'


def read_captioned(folder: str | Path) -> list[tuple[Path, str]]:
    """List the images of `folder` with their captions, in order.

    Captions are in metadata.jsonl (one line {"file_name": ..., "text": ...} per image, the format of the
    datasets library), or in a .txt file beside each image. Raises `UserError` with the place of a mistake.
    """
    folder = Path(folder)
    metadata = folder / "metadata.jsonl"
    if not is_folder(folder):
        raise UserError(f"--pretrain_data {folder}: no such folder.")
    if exists(metadata):
        pairs = _read_metadata(metadata)
    else:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        pairs = [(file, _read_caption(file.with_suffix(".txt"))) for file in files]
    if not pairs:
        raise UserError(f"--pretrain_data {folder}: no image in this folder ({', '.join(SUFFIXES)}).")
    for file, _ in pairs:
        if not exists(file):
            raise UserError(f"{metadata}: no such image: {file}.")
        check_file(file)
    return pairs


def _read_metadata(metadata: Path) -> list[tuple[Path, str]]:
    pairs = []
    for place, entry in json_lines(metadata):
        entry = check_types(entry, METADATA, place, EXPECTED)
        if missing := METADATA.keys() - entry.keys():
            raise UserError(f"{place}: no {min(missing)}. {EXPECTED}")
        caption = check_prompt(" ".join(entry["text"].split()), place)
        pairs.append((metadata.parent / entry["file_name"], caption))
    return pairs


def _read_caption(file: Path) -> str:
    if not exists(file):
        raise UserError(
            f"--pretrain_data: missing caption. Write it to {file}, or all captions to metadata.jsonl."
        )
    return check_prompt(" ".join(read_text(file).split()), str(file))


def read_square(file: Path, side: int) -> Tensor:
    """Read an image as (3, side, side) in [-1, 1]: rotated by its EXIF orientation, resized so that the short
    side is `side`, cropped to the centre. Raises `UserError` for an unreadable file."""
    upright = ImageOps.exif_transpose(read_image(file)).convert("RGB")
    square = np.asarray(ImageOps.fit(upright, (side, side), Image.Resampling.BICUBIC))
    return torch.from_numpy(square.copy()).permute(2, 0, 1).float() / 127.5 - 1

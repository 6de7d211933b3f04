"""Convert between tensors and PIL images; save PNG files atomically."""

import io
from os import PathLike
from pathlib import Path

from refl.system.errors import UserError
from refl.system.files import write_whole

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_pil(image: Tensor) -> Image.Image:
    """An image (3, H, W) in [0, 1], values beyond cut off, as 8-bit RGB."""
    return Image.fromarray(
        (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    )


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def read_image(path: str | PathLike) -> Image.Image:
    """Read an image file; raises `UserError` for one that is missing, damaged or something else."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "not an image that can be read"
        raise UserError(f"{path}: {reason}.") from error


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG whole, or not at all."""
    content = io.BytesIO()
    image.save(content, format="PNG")
    write_whole(path, content.getvalue())


def saturated_share(images: Tensor) -> Tensor:
    """Share of each image's colour values, (B,), that lie outside [0, 1]; images (B, 3, H, W)."""
    return ((images < 0) | (images > 1)).float().mean((1, 2, 3))

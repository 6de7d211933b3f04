"""Convert between tensors and PIL images; save PNG files atomically."""

import io
from pathlib import Path

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


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG whole, or not at all."""
    content = io.BytesIO()
    image.save(content, format="PNG")
    write_whole(path, content.getvalue())


def saturated_share(images: Tensor) -> Tensor:
    """Share of each image's colour values, (B,), that lie outside [0, 1]; images (B, 3, H, W)."""
    return ((images < 0) | (images > 1)).float().mean((1, 2, 3))

"""Resize images for a vision tower and normalise them as CLIP does: tensors, and PIL images.

Both resize with antialiasing: without it most of the gradient's energy lies at frequencies that the small
image cannot represent. They differ by Pillow's rounding to 8 bits after each pass: 0.3 levels of 255 in the
mean, 0.7 on thin lines, at most 8 (tests/test_imagereward.py).
"""

from os import PathLike

from refl.system.images import read_image, to_tensor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(images: Tensor, size: int, pads: bool = False, crops_down: bool = False) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> (B, 3, size, size), normalised, float32 at least.

    The short side becomes `size` and the centre is cropped. Half of an odd margin is rounded to the even
    number as in torchvision, or with `crops_down` downwards as in transformers. With `pads` the long side
    becomes `size` and the rest is black.
    """
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    height, width = _resized(*images.shape[-2:], size, pads)
    if (height, width) != images.shape[-2:]:
        images = F.interpolate(
            images, size=(height, width), mode="bicubic", antialias=True, align_corners=False
        )
    if pads:
        left, top = (size - width) // 2, (size - height) // 2
        images = F.pad(images, (left, size - width - left, top, size - height - top))
    else:
        top, left = _margins(height, width, size, crops_down)
        images = images[..., top : top + size, left : left + size]
    return _normalise(images)


def preprocess_pil(
    image: Image.Image | str | PathLike,
    size: int,
    pads: bool = False,
    crops_down: bool = False,
    rgb_first: bool = False,
) -> Tensor:
    """A PIL image or an image file as (1, 3, size, size), as `preprocess` but in 8 bits where it is cropped.

    The image is resized and cropped in its own mode, then converted to RGB, or with `rgb_first` or `pads` the
    other way round; alpha is dropped. Raises `UserError` for a file that cannot be read.
    """
    image = image if isinstance(image, Image.Image) else read_image(image)
    if pads:  # as published: converted to a tensor, then resized
        return preprocess(to_tensor(image.convert("RGB"))[None], size, pads=True)
    image = image.convert("RGB") if rgb_first else image
    height, width = _resized(image.height, image.width, size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    top, left = _margins(height, width, size, crops_down)
    rgb = np.asarray(image.crop((left, top, left + size, top + size)).convert("RGB"), dtype=np.float32)
    return _normalise(torch.from_numpy(rgb / np.float32(255)).permute(2, 0, 1)[None])


def _resized(height: int, width: int, size: int, pads: bool = False) -> tuple[int, int]:
    if pads:
        scale = size / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))
    short = min(height, width)
    return size * height // short, size * width // short


def _margins(height: int, width: int, size: int, crops_down: bool) -> tuple[int, int]:
    """Rows above and columns left of the crop."""
    if crops_down:
        return (height - size) // 2, (width - size) // 2
    return round((height - size) / 2), round((width - size) / 2)


def _normalise(images: Tensor) -> Tensor:
    # Plain numbers, because a tensor made of them would be copied to the GPU, which waits for that.
    channels = zip(images.unbind(1), PIXEL_MEAN, PIXEL_STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)

"""Convert between tensors and PIL images; save PNG files atomically, on another thread if need be."""

import io
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from pathlib import Path

from refl.system.errors import UserError
from refl.system.files import write_whole, writing
from refl.system.ownership import OutputFolder
from refl.system.reading import check_file

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MAX_RATIO = 100  # of width and height: resized to a height of 224, a longer image would need gigabytes
MAX_PENDING = 64  # images waiting to be written, 50 MB at 512x512


def to_pil(image: Tensor) -> Image.Image:
    """Convert an image (3, H, W) in [0, 1] to 8-bit RGB; other values are clamped."""
    return Image.fromarray(
        (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    )


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to a tensor (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def read_image(path: str | PathLike) -> Image.Image:
    """Read an image file; raises `UserError` for one that is missing, damaged, too large or another kind."""
    check_file(path)
    try:
        with Image.open(path) as image:
            if max(image.size) > MAX_RATIO * min(image.size):
                raise UserError(f"{path} cannot be read: {image.width}x{image.height} pixels are too narrow.")
            image.load()
            return image
    except UserError:
        raise
    except Exception as error:  # decoders raise many kinds, also NotImplementedError and struct.error
        is_large = isinstance(error, Image.DecompressionBombError | MemoryError)
        reason = f"too large ({error})" if is_large else "not an image that can be read"
        raise UserError(f"{path} cannot be read: {reason}.") from error


def image_size(path: str | PathLike) -> tuple[int, int] | None:
    """Width and height of an image file, by its header; None if it is not an image."""
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def to_png(image: Image.Image) -> bytes:
    """Convert an image to a PNG file."""
    content = io.BytesIO()
    image.save(content, format="PNG")
    return content.getvalue()


def saturated_share(images: Tensor) -> Tensor:
    """Share of each image's colour values, (B,), that lie outside [0, 1]; images (B, 3, H, W)."""
    return ((images < 0) | (images > 1)).float().mean((1, 2, 3))


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG file atomically."""
    write_whole(path, to_png(image))


class ImageWriter:
    """Write PNG files to a folder on a worker thread, so that the GPU generates the next batch meanwhile.

    A context manager; leaving it waits until all files are written. Every file is whole or absent. If one
    cannot be written, `write` or the exit raises `UserError`, with `advice` at the end of its message.
    """

    def __init__(self, output: OutputFolder, advice: str = ""):
        self.output, self.advice = output, advice
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="images")
        self._pending: deque[Future] = deque()

    def write(self, image: Image.Image, name: str) -> None:
        """Queue an image; wait while `MAX_PENDING` others are queued."""
        while self._pending and (self._pending[0].done() or len(self._pending) >= MAX_PENDING):
            self._finish_oldest()
        self._pending.append(self._pool.submit(lambda: self.output.write(name, to_png(image))))

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._pool.shutdown()  # writes what is queued, also after an error
        while self._pending and kind is None:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        with writing(self.output.path, self.advice):
            self._pending.popleft().result()

"""Score and rank PIL images, files and tensors by a reward that is a model."""

from collections.abc import Iterable, Sequence
from os import PathLike

from refl.system.errors import UserError

import torch
from PIL import Image
from torch import Tensor, nn

ImageInput = Image.Image | str | PathLike | Tensor  # a tensor: (3, H, W) in [0, 1]


class Scorer(nn.Module):
    """A reward that is a model; its subclass defines the methods that raise `NotImplementedError` here."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        raise NotImplementedError

    def preprocess(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> what `score_pixels` takes."""
        raise NotImplementedError

    def preprocess_pil(self, image: Image.Image | str | PathLike) -> Tensor:
        """A PIL image or an image file -> what `score_pixels` takes, a batch of one."""
        raise NotImplementedError

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores, (B,) float32, of preprocessed images."""
        raise NotImplementedError

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores, (B,) float32, of images (B, 3, H, W) in [0, 1], any size, one prompt for each."""
        return self.score_pixels(self.preprocess(images), prompts)

    @torch.no_grad()
    def score(
        self, prompt: str, images: ImageInput | Iterable[ImageInput], batch_size: int = 8
    ) -> float | list[float]:
        """The score of one image, or of each of several: PIL images, paths, or tensors (3, H, W) in [0, 1].

        PIL images and files are preprocessed as published; tensors as in training. Raises `UserError` for
        anything else and for files that cannot be read.
        """
        if not isinstance(images, Iterable) or isinstance(images, str) or getattr(images, "ndim", 4) == 3:
            return self.score(prompt, [images])[0]
        images, scores = list(images), []
        for start in range(0, len(images), batch_size):
            pixels = torch.cat([self._pixels(image) for image in images[start : start + batch_size]])
            scores += self.score_pixels(pixels, [prompt] * len(pixels)).tolist()
        return scores

    def rank(self, prompt: str, images: Iterable[ImageInput]) -> tuple[list[int], list[float]]:
        """Rank and score of each image; rank 1 is the best, and of equal scores the first image wins."""
        scores = self.score(prompt, images)
        scores = scores if isinstance(scores, list) else [scores]
        ranks = [0] * len(scores)
        for place, index in enumerate(sorted(range(len(scores)), key=lambda i: -scores[i]), 1):
            ranks[index] = place
        return ranks, scores

    def _pixels(self, image: ImageInput) -> Tensor:
        if isinstance(image, Image.Image | str | PathLike):
            return self.preprocess_pil(image).to(self.device)
        if not torch.is_tensor(image):
            raise UserError(f"an image is a PIL image, a path or a tensor; this is a {type(image).__name__}.")
        if image.ndim != 3 or len(image) != 3 or not image.is_floating_point():
            raise UserError(
                "an image as a tensor is (3, H, W), floating, in [0, 1]; this one is "
                f"{tuple(image.shape)}, {image.dtype}."
            )
        if not (image.min() >= -1e-3 and image.max() <= 1 + 1e-3):  # resizing may overshoot a little
            raise UserError(
                "an image as a tensor is in [0, 1]; this one goes from "
                f"{image.min():.6g} to {image.max():.6g}."
            )
        return self.preprocess(image[None].to(self.device))


def check_prompts(num_images: int, prompts: Sequence[str]) -> None:
    """Raise `UserError` unless there is a list of as many prompts as images."""
    if isinstance(prompts, str) or [type(prompt) for prompt in prompts] != [str] * num_images:
        raise UserError(f"{num_images} images need as many prompts, in a list; got {prompts!r:.80}.")

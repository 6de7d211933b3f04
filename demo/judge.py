"""The oracle of the demo world: reads shape, colour and background from pixels, by rules instead of learning.

Attributes that cannot be read are None and count as wrong: mixed colours, shapes between two others, patchy
backgrounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import world
from PIL import Image
from torch import Tensor

MAX_DISTANCE = 75  # of a pixel from its palette colour, RGB in 0 to 255; palette colours are further apart
MIN_PURE_BACKGROUND = 0.85  # share of the image's edge that must have the background's colour
MIN_PURE_OBJECT = 0.6  # share of the object that must have its colour; the outline may be soft
MIN_OVERLAP = 0.85  # intersection over union with the best shape; a perfect circle and a square reach 0.84
MIN_LEAD = 0.02  # of the best overlap over the second best
MARGIN = 5  # pixels at the edge that no object reaches

_UNIT = {  # each shape's area and its centre of mass below its centre, at radius 1
    shape: (cover.sum() / 400, (cover * (np.arange(world.SIZE) + 0.5 - 32)[:, None]).sum() / cover.sum() / 20)
    for shape in world.SHAPES
    for cover in world.cover(shape, np.array([[32, 32, 20]]))
}


@dataclass(frozen=True)
class Verdict:
    """Attributes of an image; None for one that cannot be read."""

    shape: str | None
    colour: str | None
    background: str | None


def judge(image: np.ndarray) -> Verdict:
    """Read a square image (H, W, 3) uint8 of any size."""
    if image.shape[:2] != (world.SIZE, world.SIZE):
        image = np.asarray(Image.fromarray(image).resize((world.SIZE, world.SIZE), Image.Resampling.BOX))
    pixels = image.astype(np.float32)
    edge = np.ones((world.SIZE, world.SIZE), bool)
    edge[MARGIN:-MARGIN, MARGIN:-MARGIN] = False
    background = _nearest(pixels[edge], world.BACKGROUND_PALETTE, MIN_PURE_BACKGROUND)
    if background is None:
        return Verdict(None, None, None)
    far = np.linalg.norm(pixels - world.BACKGROUND_PALETTE[background], axis=-1)
    colour = _nearest(pixels[far > MAX_DISTANCE], world.PALETTE, MIN_PURE_OBJECT)
    if colour is None:
        return Verdict(None, None, tuple(world.BACKGROUNDS)[background])
    inside = np.linalg.norm(pixels - world.PALETTE[colour], axis=-1) < far
    return Verdict(_shape(inside), tuple(world.COLOURS)[colour], tuple(world.BACKGROUNDS)[background])


def grade(images: Sequence[np.ndarray | Image.Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """Compare images with their prompts: (N,) bool for each of colour, shape, background, all_right."""
    verdicts = [judge(np.asarray(image)) for image in images]
    wanted = [world.parse(prompt) for prompt in prompts]
    right = {
        attribute: np.array(
            [getattr(v, attribute) == getattr(w, attribute) for v, w in zip(verdicts, wanted, strict=True)],
            bool,
        )
        for attribute in world.ATTRIBUTES
    }
    return right | {"all_right": np.logical_and.reduce(list(right.values()))}


def share(attribute: str, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Grade images (B, 3, H, W) in [0, 1] as a reward without gradient: (B,), 1 if right, else 0."""
    images = (images.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return torch.from_numpy(grade(images, prompts)[attribute]).float()


# judge:all_right, ... in --held_out_reward
all_right, colour, shape, background = (
    partial(share, attribute) for attribute in ("all_right", "colour", "shape", "background")
)


def _nearest(pixels: np.ndarray, palette: np.ndarray, min_pure: float) -> int | None:
    """Return the index of the palette colour nearest to the median of pixels (N, 3).

    None if less than a share `min_pure` of the pixels has that colour.
    """
    if not len(pixels):
        return None
    distance = np.linalg.norm(np.median(pixels, axis=0) - palette, axis=-1)
    index = int(distance.argmin())
    pure = np.linalg.norm(pixels - palette[index], axis=-1) < MAX_DISTANCE
    return index if distance[index] < MAX_DISTANCE and pure.mean() >= min_pure else None


def _shape(inside: np.ndarray) -> str | None:
    """Return the shape that, at the mask's place and size, overlaps it best; None if that is unclear."""
    area = inside.sum()
    if not area:
        return None
    centre_y, centre_x = (places.mean() + 0.5 for places in np.nonzero(inside))
    overlaps = {}
    for shape, (unit_area, unit_offset) in _UNIT.items():
        radius = np.sqrt(area / unit_area)
        cover = world.cover(shape, np.array([[centre_x, centre_y - unit_offset * radius, radius]]))[0]
        overlaps[shape] = np.minimum(cover, inside).sum() / np.maximum(cover, inside).sum()
    best, second = sorted(overlaps, key=overlaps.get, reverse=True)[:2]
    smallest, largest = 0.75 * world.RADIUS[0], 1.25 * world.RADIUS[1]
    plausible = smallest < np.sqrt(area / _UNIT[best][0]) < largest
    clear = overlaps[best] >= MIN_OVERLAP and overlaps[best] - overlaps[second] >= MIN_LEAD
    return best if plausible and clear else None

"""The oracle of the demo world: reads shape, colour, background and cleanness from pixels, by rules.

Nothing is learned. Attributes that cannot be read are None and count as wrong: mixed colours, shapes between
two others. The object is the largest connected region that differs from the background; an image is clean if
almost no pixel deviates from a drawing of that object, in its colour, on its background.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
import world
from PIL import Image
from scipy import ndimage
from torch import Tensor

MAX_DISTANCE = 75  # of a pixel from its palette colour, RGB in 0 to 255; palette colours are further apart
MIN_PURE_BACKGROUND = 0.6  # share of the image's edge that must have the background's colour
MIN_PURE_OBJECT = 0.6  # share of the object that must have its colour; the outline may be soft
MIN_OVERLAP = 0.85  # intersection over union with the best shape; a perfect circle and a square reach 0.84
MIN_LEAD = 0.02  # of the best overlap over the second best
MAX_STRAY = 0.01  # share of the image that may deviate from the drawing
SOFT_OUTLINE = 3  # pixels on each side of the outline that may have any colour
MAX_BACKGROUND_DEVIATION = 60  # of a pixel from its background's colour; a faint stain is further away
MARGIN = 5  # pixels at the edge that no object reaches

_EDGE = np.ones((world.SIZE, world.SIZE), bool)
_EDGE[MARGIN:-MARGIN, MARGIN:-MARGIN] = False
_UNIT = {  # each shape's area and its centre of mass below its centre, at radius 1
    shape: (cover.sum() / 400, (cover * (np.arange(world.SIZE) + 0.5 - 32)[:, None]).sum() / cover.sum() / 20)
    for shape in world.SHAPES
    for cover in world.cover(shape, np.array([[32, 32, 20]]))
}


@dataclass(frozen=True)
class Verdict:
    """Attributes of an image; None for one that cannot be read."""

    colour: str | None = None
    shape: str | None = None
    background: str | None = None
    clean: bool = False
    geometry: tuple[float, float, float] | None = None  # centre x, centre y, radius, in pixels


def judge(image: np.ndarray) -> Verdict:
    """Read a square image (H, W, 3) uint8 of any size."""
    if image.shape[:2] != (world.SIZE, world.SIZE):
        image = np.asarray(Image.fromarray(image).resize((world.SIZE, world.SIZE), Image.Resampling.BOX))
    return _judge(image.astype(np.uint8).tobytes())


@lru_cache(maxsize=1000)  # several attributes of the same images are asked for, one after the other
def _judge(content: bytes) -> Verdict:
    """Read the bytes of an image (SIZE, SIZE, 3) uint8."""
    pixels = np.frombuffer(content, np.uint8).reshape(world.SIZE, world.SIZE, 3).astype(np.float32)
    background = _nearest(pixels[_EDGE], world.BACKGROUND_PALETTE, MIN_PURE_BACKGROUND)
    if background is None:
        return Verdict()
    ground = tuple(world.BACKGROUNDS)[background]
    deviation = np.linalg.norm(pixels - world.BACKGROUND_PALETTE[background], axis=-1)
    main = _largest_region(deviation > MAX_DISTANCE)
    colour = _nearest(pixels[main], world.PALETTE, MIN_PURE_OBJECT)
    if colour is None:
        return Verdict(background=ground)
    from_colour = np.linalg.norm(pixels - world.PALETTE[colour], axis=-1)
    region = _largest_region(from_colour < deviation)
    shape, geometry = _fit(region)
    if shape is None:  # still clean or not, by its own outline
        distance = ndimage.distance_transform_edt(~region) - ndimage.distance_transform_edt(region)
    else:
        distance = world.distance(shape, geometry[None])[0]
    stray = (distance > SOFT_OUTLINE) & (deviation > MAX_BACKGROUND_DEVIATION)
    stray |= (distance < -SOFT_OUTLINE) & (from_colour > MAX_DISTANCE)
    clean = bool(stray.mean() <= MAX_STRAY)
    return Verdict(tuple(world.COLOURS)[colour], shape, ground, clean, tuple(map(float, geometry)))


def grade(images: Sequence[np.ndarray | Image.Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """Compare images with their prompts: (N,) bool for each of colour, shape, background, clean, all_right.

    No prompt mentions spatter: every image should be clean.
    """
    verdicts = [judge(np.asarray(image)) for image in images]
    wanted = [world.parse(prompt) for prompt in prompts]
    right = {
        attribute: np.array(
            [getattr(v, attribute) == getattr(w, attribute) for v, w in zip(verdicts, wanted, strict=True)],
            bool,
        )
        for attribute in world.ATTRIBUTES
    }
    right["clean"] = np.array([verdict.clean for verdict in verdicts], bool)
    return right | {"all_right": np.logical_and.reduce(list(right.values()))}


def rate(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Annotate an image (64, 64, 3) uint8: a rating for every spec (6, 4, 4), 0 to 5, and its fits (15,).

    Fits, in [0, 1], say how near the image comes to each colour, shape and background, and how clean it is.
    The rating is half a point for each of the four attributes that is right, half its fit, and one point if
    all are right.
    """
    verdict, pixels = judge(image), image.astype(np.float32)
    ground = np.median(pixels[_EDGE], axis=0)
    deviation = np.linalg.norm(pixels - ground, axis=-1)
    main = _largest_region(deviation > MAX_DISTANCE)
    colour = np.median(pixels[main], axis=0) if main.any() else ground
    region = _largest_region(np.linalg.norm(pixels - colour, axis=-1) < deviation)
    overlaps, _ = _overlaps(region)
    stray = (ndimage.distance_transform_edt(~region) > SOFT_OUTLINE) & (deviation > MAX_BACKGROUND_DEVIATION)
    fits = (
        1 - np.linalg.norm(world.PALETTE - colour, axis=-1) / (2 * MAX_DISTANCE),
        2 * np.array(list(overlaps.values())) - 1,
        1 - np.linalg.norm(world.BACKGROUND_PALETTE - ground, axis=-1) / (2 * MAX_DISTANCE),
        np.array([1 - stray.mean() / (10 * MAX_STRAY)]),
    )
    fits = [fit.clip(0, 1) for fit in fits]
    right, rating = verdict.clean, (verdict.clean + fits[-1].item()) / 2
    for fit, (attribute, values) in zip(np.ix_(*fits[:3]), world.ATTRIBUTES.items(), strict=True):
        is_right = np.array([value == getattr(verdict, attribute) for value in values]).reshape(fit.shape)
        rating = rating + (is_right + fit) / 2
        right = right & is_right
    return rating + right, np.concatenate(fits)


def share(attribute: str, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Grade images (B, 3, H, W) in [0, 1] as a reward without gradient: (B,), 1 if right, else 0."""
    images = (images.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return torch.from_numpy(grade(images, prompts)[attribute]).float()


# judge:all_right, ... in --held_out_reward
all_right, colour, shape, background, clean = (
    partial(share, attribute) for attribute in ("all_right", "colour", "shape", "background", "clean")
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


def _largest_region(mask: np.ndarray) -> np.ndarray:
    """Return the largest connected region of a mask (H, W)."""
    regions, count = ndimage.label(mask)
    if not count:
        return mask
    return regions == 1 + np.bincount(regions.flat)[1:].argmax()


def _overlaps(inside: np.ndarray) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return each shape's intersection over union with a mask, at the mask's place and size, and geometry."""
    area = max(inside.sum(), 1)
    centre_y, centre_x = ndimage.center_of_mass(inside) if inside.any() else (0, 0)
    overlaps, geometries = {}, {}
    for shape, (unit_area, unit_offset) in _UNIT.items():
        radius = np.sqrt(area / unit_area)
        geometries[shape] = np.array([centre_x + 0.5, centre_y + 0.5 - unit_offset * radius, radius])
        cover = world.cover(shape, geometries[shape][None])[0]
        overlaps[shape] = np.minimum(cover, inside).sum() / np.maximum(cover, inside).sum()
    return overlaps, geometries


def _fit(inside: np.ndarray) -> tuple[str | None, np.ndarray]:
    """Return the shape that overlaps a mask best, None if that is unclear, and its geometry (3,)."""
    overlaps, geometries = _overlaps(inside)
    best, second = sorted(overlaps, key=overlaps.get, reverse=True)[:2]
    smallest, largest = 0.75 * world.RADIUS[0], 1.25 * world.RADIUS[1]
    plausible = smallest < geometries[best][2] < largest
    clear = overlaps[best] >= MIN_OVERLAP and overlaps[best] - overlaps[second] >= MIN_LEAD
    return best if plausible and clear else None, geometries[best]

"""The demo world: images of one coloured shape on a plain background, and their captions.

A `Spec` names the attributes of an image; there are 6 colours x 4 shapes x 4 backgrounds = 96. Arrays of
specs are (N, 3) integers, indices into `COLOURS`, `SHAPES` and `BACKGROUNDS`. An image may be spoilt by paint
spatter, which no caption mentions.
"""

import re
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from itertools import product

import numpy as np

SIZE = 64  # pixels a side
COLOURS = {
    "red": (220, 30, 30),
    "green": (20, 160, 60),
    "blue": (20, 90, 240),
    "yellow": (255, 225, 30),
    "purple": (150, 30, 170),
    "pink": (255, 130, 200),
}
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128), "brown": (115, 70, 35)}
ATTRIBUTES = {"colour": tuple(COLOURS), "shape": SHAPES, "background": tuple(BACKGROUNDS)}
PALETTE = np.array(list(COLOURS.values()), np.float32)  # (6, 3), 0 to 255
BACKGROUND_PALETTE = np.array(list(BACKGROUNDS.values()), np.float32)  # (4, 3)

MAX_SHIFT = 4  # pixels from the middle, each way
RADIUS = (16, 20)
NUM_SPOTS = (2, 3)  # of spatter in a spoilt image
SPOT_RADIUS = (5, 9)
SPOT_DISTANCE = (27, 36)  # from the middle of the image; the object reaches 24, a corner is at 45
TEMPLATES = (
    "a {colour} {shape} on a {background} background",
    "{background} background with a {colour} {shape}",
    "a picture of a {colour} {shape} on a {background} background",
    "a {colour} {shape} in front of a {background} background",
    "one {colour} {shape} on {background}",
    "a {background} picture with a {colour} {shape}",
    "a {shape} in {colour} on a {background} background",
    "on {background} a {shape} that is {colour}",
)


@dataclass(frozen=True)
class Spec:
    """Attributes of an image, as words."""

    colour: str
    shape: str
    background: str

    @property
    def indices(self) -> tuple[int, int, int]:
        """Indices into the values of each attribute."""
        return tuple(
            values.index(word) for values, word in zip(ATTRIBUTES.values(), astuple(self), strict=True)
        )

    @property
    def held_out(self) -> bool:
        """True for 24 of the 96: one for each colour and shape, and one for each colour and background."""
        colour, shape, background = self.indices
        return (colour + shape) % len(BACKGROUNDS) == background

    def caption(self, template: int) -> str:
        """Fill in one of `TEMPLATES`."""
        return TEMPLATES[template].format(**vars(self))

    def changed(self, attribute: str) -> list["Spec"]:
        """Return the specs that differ from this one only in `attribute`."""
        others = (word for word in ATTRIBUTES[attribute] if word != getattr(self, attribute))
        return [replace(self, **{attribute: word}) for word in others]


SPECS = tuple(Spec(*words) for words in product(*ATTRIBUTES.values()))  # in the order of `spec_number`


def spec_number(specs: np.ndarray) -> np.ndarray:
    """Convert specs (..., 3) to indices into `SPECS` (...)."""
    return np.ravel_multi_index(tuple(np.moveaxis(specs, -1, 0)), [len(v) for v in ATTRIBUTES.values()])


def every_caption() -> list[str]:
    """Return the captions of all specs in all templates, 96 x 8, templates fastest."""
    return [spec.caption(template) for spec in SPECS for template in range(len(TEMPLATES))]


def prompts(held_out: bool) -> Iterator[str]:
    """Yield the captions, in all templates, of the specs that are held out, or of the others."""
    for template, spec in product(range(len(TEMPLATES)), SPECS):
        if spec.held_out == held_out:
            yield spec.caption(template)


def parse(prompt: str) -> Spec:
    """Return the spec of a caption; raises `ValueError` for other text."""
    words = set(re.findall(r"\w+", prompt.lower()))
    matches = [[value for value in values if value in words] for values in ATTRIBUTES.values()]
    if any(len(values) != 1 for values in matches):
        raise ValueError(f"not a caption of the demo world: {prompt!r}")
    return Spec(*(values[0] for values in matches))


def random_specs(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw random specs (count, 3)."""
    return np.stack([rng.integers(len(values), size=count) for values in ATTRIBUTES.values()], axis=-1)


def random_geometry(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw random geometries (count, 3) float32: centre x, centre y, radius, in pixels."""
    centre = SIZE / 2 + rng.uniform(-MAX_SHIFT, MAX_SHIFT, (count, 2))
    return np.concatenate([centre, rng.uniform(*RADIUS, (count, 1))], axis=-1).astype(np.float32)


def random_spatter(rng: np.random.Generator, count: int, share: float) -> np.ndarray:
    """Draw random spots (count, 3, 3) float32: centre x, centre y, radius; all radii are 0 in clean images.

    About `share` of the images are spoilt.
    """
    shape = (count, NUM_SPOTS[1])
    angle, distance = rng.uniform(0, 2 * np.pi, shape), rng.uniform(*SPOT_DISTANCE, shape)
    num_spots = rng.integers(NUM_SPOTS[0], NUM_SPOTS[1] + 1, (count, 1)) * (rng.random((count, 1)) < share)
    radius = rng.uniform(*SPOT_RADIUS, shape) * (np.arange(NUM_SPOTS[1]) < num_spots)
    centre = SIZE / 2 + distance * np.stack([np.cos(angle), np.sin(angle)])
    return np.stack([*centre, radius], axis=-1).astype(np.float32)


def draw(specs: np.ndarray, geometry: np.ndarray, spatter: np.ndarray | None = None) -> np.ndarray:
    """Render antialiased images (N, SIZE, SIZE, 3) uint8 of specs (N, 3) with geometry (N, 3).

    `spatter` (N, spots, 3) adds spots in the object's own colour.
    """
    covered = np.empty((len(specs), SIZE, SIZE), np.float32)
    for index, shape in enumerate(SHAPES):
        chosen = specs[:, 1] == index
        covered[chosen] = cover(shape, geometry[chosen])
    for spots in () if spatter is None else spatter.swapaxes(0, 1):
        covered = np.maximum(covered, cover("circle", spots) * (spots[:, 2] > 0)[:, None, None])
    colour, background = PALETTE[specs[:, 0]], BACKGROUND_PALETTE[specs[:, 2]]
    covered, colour, background = covered[..., None], colour[:, None, None], background[:, None, None]
    return (background + covered * (colour - background)).round().astype(np.uint8)


def cover(shape: str, geometry: np.ndarray) -> np.ndarray:
    """Return the share of each pixel that a shape of geometry (N, 3) covers, (N, SIZE, SIZE) in [0, 1]."""
    return np.clip(0.5 - distance(shape, geometry), 0, 1)


def distance(shape: str, geometry: np.ndarray) -> np.ndarray:
    """Return each pixel's distance to the outline of a shape of geometry (N, 3), negative inside.

    (N, SIZE, SIZE), in pixels; near corners a lower bound.
    """
    pixel = np.arange(SIZE, dtype=np.float32) + 0.5
    x = pixel[None, None, :] - geometry[:, 0, None, None]
    y = pixel[None, :, None] - geometry[:, 1, None, None]
    radius = geometry[:, 2, None, None]
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.85 * radius
    if shape == "triangle":  # tip up, base two radii wide
        return np.maximum(y - 0.8 * radius, (1.8 * abs(x) - (y + radius)) / np.hypot(1.8, 1))
    arm = 0.34 * radius  # a cross of two bars
    across = np.maximum(abs(x) - radius, abs(y) - arm)
    upright = np.maximum(abs(x) - arm, abs(y) - radius)
    return np.minimum(across, upright)

"""The contract of a reward, and the specification by which it is loaded, checked and counted."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

Reward = Callable[[Tensor, list[str]], Tensor]
"""(images, prompts) -> scores: images (B, 3, H, W) float32 in [0, 1], any size, and B prompts; scores (B,),
higher is better, differentiable in the images.

Two methods are optional: `features(images)` -> (B, width) of length 1, which measure diversity, and
`score(prompt, images, batch_size)` -> scores of PIL images, for a reward that preprocesses them in its own
way.
"""


@dataclass(frozen=True)
class RewardSpec:
    """How to load a reward, which files it needs, and what is known about it before it is loaded."""

    load: Callable[[Path, torch.device, torch.dtype], Reward]
    """(--reward_path, device, precision of the frozen models) -> the reward, frozen. Raises `UserError`."""
    files: Callable[[Path], dict[Path, str]] = lambda folder: {}
    """(--reward_path) -> each file that must exist, and where on the Hugging Face Hub it is published."""
    load_empty: Callable[[Path, torch.dtype], nn.Module] | None = None
    """As `load`, with all weights on the meta device, for counting memory. None: it is not counted."""
    default_target: float | None = 2.0
    """--reward_target if none is given; None maximises the plain reward."""
    scale: str = ""
    """The scores to expect, for people: "about 0.15 to 0.35"."""
    unit: float = 1.0
    """A difference that is as large as ImageReward's 1, roughly; --tie_margin is counted in it."""

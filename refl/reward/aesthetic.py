"""LAION's aesthetic predictors (Schuhmann 2022): a head on the image embedding of CLIP ViT-L/14, trained on
people's ratings from 1 to 10. They do not read the prompt.

Version 1 has one linear layer, version 2 five without activations between them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from refl.reward import clip
from refl.reward.clip_tower import ClipReward, Tower
from refl.reward.contract import RewardSpec
from refl.system.errors import UserError
from refl.system.weights import read_weights

import torch
from torch import Tensor, nn

SOURCES = {
    "sa_0_4_vit_l_14_linear.pth": "https://github.com/LAION-AI/aesthetic-predictor",
    "sac+logos+ava1-l14-linearMSE.pth": "https://github.com/christophschuhmann/improved-aesthetic-predictor",
}
V1, V2 = SOURCES
WIDTHS = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}  # version 2's layers; between them are inactive dropouts


class Aesthetic(ClipReward):
    """The rating of an image, whatever the prompt; the head is float32."""

    def __init__(self, tower: Tower, head: nn.Module):
        super().__init__(tower)
        self.head = head

    def score_embeddings(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores, (B,) float32, of image embeddings (B, width)."""
        with torch.autocast(images.device.type, enabled=False):
            return self.head(images).squeeze(-1)


def linear_head(width: int) -> nn.Module:
    """The head of version 1, without weights."""
    return nn.Linear(width, 1)


def deep_head(width: int) -> nn.Module:
    """The head of version 2, without weights, under its published keys, such as `layers.0.weight`."""
    layers = nn.Sequential(*(nn.Identity() for _ in range(max(WIDTHS) + 1)))
    for index, out in WIDTHS.items():
        layers[index] = nn.Linear(width, out)
        width = out
    head = nn.Sequential()
    head.add_module("layers", layers)
    return head


def load(
    folder: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    name: str = V2,
    new_head: Callable[[int], nn.Module] = deep_head,
) -> Aesthetic:
    """A predictor from the files of `required_files`, frozen. Raises `UserError`."""
    tower = clip.load_tower(folder, device, dtype)
    path = Path(folder) / name
    weights = read_weights(path)
    with torch.device("meta"):
        head = new_head(tower.clip.projection_dim)
    expected = {key: value.shape for key, value in head.state_dict().items()}
    if {key: value.shape for key, value in weights.items()} != expected:
        raise UserError(
            f"{path} is not the head of this aesthetic predictor for CLIP ViT-L/14. Copy it again from "
            f"{SOURCES[name]}."
        )
    if torch.device(device).type != "meta":
        head.load_state_dict({key: value.clone() for key, value in weights.items()}, assign=True)
    return Aesthetic(tower, head.float().to(device)).requires_grad_(False).eval()


def required_files(folder: Path, name: str = V2) -> dict[Path, str]:
    """Each file that `load` needs, and where it is published."""
    return {folder / name: SOURCES[name]} | clip.required_files(folder)


def _spec(name: str, new_head: Callable[[int], nn.Module], scale: str) -> RewardSpec:
    return RewardSpec(
        partial(load, name=name, new_head=new_head),
        partial(required_files, name=name),
        lambda folder, dtype: load(folder, "meta", dtype, name, new_head),
        default_target=10.0,
        scale=scale,
    )


SPEC_V1 = _spec(V1, linear_head, "trained on ratings from 1 to 10; photographs have about 5")
SPEC_V2 = _spec(V2, deep_head, "trained on ratings from 1 to 10; photographs have about 5")

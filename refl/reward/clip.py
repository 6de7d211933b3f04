"""CLIP similarity (Radford et al. 2021, arXiv 2103.00020; Hessel et al. 2021, arXiv 2104.08718) by OpenAI's
ViT-L/14: the cosine of image and prompt."""

from pathlib import Path

from refl.reward import clip_tower
from refl.reward.clip_tower import Cosine, Files, Style, Tower
from refl.reward.contract import RewardSpec

import torch

FOLDER = "clip-vit-large-patch14"
SOURCE = f"openai/{FOLDER}"
STYLE = Style(clean=clip_tower.clean)


def load_tower(folder: Path, device: str | torch.device, dtype: torch.dtype) -> Tower:
    """The ViT-L/14 in `folder`, frozen; the same one for every reward that builds on it."""
    own = Path(folder) / FOLDER
    files = Files(clip_tower.weights_file(own), own / "config.json", own, SOURCE)
    return clip_tower.load_tower(files, STYLE, device, dtype)


def load(folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Cosine:
    """The similarity by the files of `required_files`, frozen. Raises `UserError`."""
    return Cosine(load_tower(folder, device, dtype))


def required_files(folder: Path) -> dict[Path, str]:
    """Each file that `load` needs, and where it is published."""
    own = folder / FOLDER
    return clip_tower.model_files(own, SOURCE) | clip_tower.tokenizer_files(own, SOURCE)


SPEC = RewardSpec(
    load,
    required_files,
    lambda folder, dtype: load(folder, "meta", dtype),
    default_target=0.4,
    unit=0.03,
    scale="about 0.15 to 0.35",
)

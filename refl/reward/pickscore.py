"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): a CLIP ViT-H/14 trained on people's choices of images.

The score is exp(logit_scale) times the cosine of image and prompt, as in the published model card.
"""

from pathlib import Path

from refl.reward import clip_tower
from refl.reward.clip_tower import Cosine, Files, Style
from refl.reward.contract import RewardSpec

import torch

WEIGHTS = "PickScore_v1"
SOURCE = f"yuvalkirstain/{WEIGHTS}"
TOKENIZER = "CLIP-ViT-H-14-laion2B-s32B-b79K"  # whose processor the model card names
STYLE = Style(crops_down=True, rgb_first=True)  # as transformers' CLIPProcessor


def load(folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Cosine:
    """PickScore from the files of `required_files`, frozen. Raises `UserError`."""
    weights = Path(folder) / WEIGHTS
    files = Files(
        clip_tower.weights_file(weights), weights / "config.json", Path(folder) / TOKENIZER,
        SOURCE,
    )  # fmt: skip
    return Cosine(clip_tower.load_tower(files, STYLE, device, dtype), is_scaled=True)


def required_files(folder: Path) -> dict[Path, str]:
    """Each file that `load` needs, and where it is published."""
    model = clip_tower.model_files(folder / WEIGHTS, SOURCE)
    return model | clip_tower.tokenizer_files(folder / TOKENIZER, f"laion/{TOKENIZER}")


SPEC = RewardSpec(
    load,
    required_files,
    lambda folder, dtype: load(folder, "meta", dtype),
    default_target=25.0,
    scale="about 19 to 24 for the images of Stable Diffusion",
)

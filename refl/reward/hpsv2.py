"""Human Preference Score v2 and v2.1 (Wu et al. 2023, arXiv 2306.09341): a CLIP ViT-H/14 trained on people's
rankings of images.

The score is the cosine of image and prompt. The long side of an image becomes 224 and the rest is black, and
prompts are cleaned as open_clip does. The published files are open_clip's; `name_of` and `value_of` find each
of transformers' weights in them.
"""

import re
from functools import partial
from pathlib import Path

from refl.reward import clip_tower
from refl.reward.clip_tower import Cosine, Files, Style
from refl.reward.contract import RewardSpec

import torch
from torch import Tensor

SOURCE = "xswu/HPSv2"
CONFIG = "CLIP-ViT-H-14-laion2B-s32B-b79K"  # the architecture and the tokenizer

# transformers' names -> open_clip's; one after the other.
OPEN_CLIP = (
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.self_attn\.[qkv]_proj\.", ".attn.in_proj_"),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^visual_projection\.weight$", "visual.proj"),
)


def name_of(key: str) -> str:
    """open_clip's key for transformers'."""
    for pattern, name in OPEN_CLIP:
        key = re.sub(pattern, name, key)
    return key


def value_of(key: str, value: Tensor) -> Tensor:
    """The part of open_clip's tensor that is transformers' `key`: its query, key and value are one there, and
    its projections are transposed."""
    if (match := re.search(r"\.([qkv])_proj\.", key)) and value.ndim and len(value) % 3 == 0:
        return value.chunk(3)["qkv".index(match[1])]
    return value.T.contiguous() if key.endswith("_projection.weight") and value.ndim == 2 else value


STYLE = Style(pads=True, clean=clip_tower.clean)


def load(
    folder: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    name: str = "HPS_v2_compressed.pt",
) -> Cosine:
    """HPSv2 from the files of `required_files`, frozen. Raises `UserError`."""
    shared = Path(folder) / CONFIG
    files = Files(Path(folder) / name, shared / "config.json", shared, SOURCE, name_of, value_of)
    return Cosine(clip_tower.load_tower(files, STYLE, device, dtype))


def required_files(folder: Path, name: str = "HPS_v2_compressed.pt") -> dict[Path, str]:
    """Each file that `load` needs, and where it is published."""
    shared = folder / CONFIG
    return {folder / name: SOURCE, shared / "config.json": f"laion/{CONFIG}"} | clip_tower.tokenizer_files(
        shared, f"laion/{CONFIG}"
    )


def _spec(name: str, scale: str) -> RewardSpec:
    return RewardSpec(
        partial(load, name=name),
        partial(required_files, name=name),
        lambda folder, dtype: load(folder, "meta", dtype, name),
        default_target=0.4,
        unit=0.03,
        scale=scale,
    )


SPEC = _spec("HPS_v2_compressed.pt", "about 0.24 to 0.30 for the images of Stable Diffusion")
SPEC_2_1 = _spec("HPS_v2.1_compressed.pt", "about 0.20 to 0.35 for the images of Stable Diffusion")

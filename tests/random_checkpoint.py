"""A `checkpoint/` in the user's layout with random weights: SD-1.4's and ImageReward's architectures, or tiny
ones.

python tests/random_checkpoint.py FOLDER --size full
"""

import argparse
import json
import re
import string
from pathlib import Path

from refl.reward import aesthetic, hpsv2, imagereward, pickscore

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
)

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "full": {
        "unet": {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "norm_num_groups": 32},
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
        "attention_heads": 8,
        "sample_size": 64,
        "clip": {"width": 768, "layers": 12, "heads": 12, "tokens": 77, "vocabulary": 49408},
        "vision": {"width": 1024, "layers": 24, "heads": 16, "image": 224, "patch": 16},
        "bert": {"width": 768, "layers": 12, "heads": 12, "vocabulary": 30522},
        "head": (1024, 128, 64, 16, 1),
        "clip_h": {
            "vision": {"width": 1280, "layers": 32, "heads": 16, "image": 224, "patch": 14},
            "text": {"width": 1024, "layers": 24, "heads": 16, "tokens": 77, "vocabulary": 49408},
            "width": 1024,
            "activation": "gelu",
        },
        "clip_l": {
            "vision": {"width": 1024, "layers": 24, "heads": 16, "image": 224, "patch": 14},
            "text": {"width": 768, "layers": 12, "heads": 12, "tokens": 77, "vocabulary": 49408},
            "width": 768,
            "activation": "quick_gelu",
        },
    },
    "tiny": {
        "unet": {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
        "vae": {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
        "attention_heads": 2,
        "sample_size": 8,
        "clip": {"width": 16, "layers": 1, "heads": 2, "tokens": 77, "vocabulary": 600},
        "vision": {"width": 32, "layers": 2, "heads": 4, "image": 32, "patch": 8},
        "bert": {"width": 24, "layers": 2, "heads": 3, "vocabulary": 100},
        "head": (16, 8, 8, 4, 1),
        "clip_h": {
            "vision": {"width": 40, "layers": 2, "heads": 2, "image": 32, "patch": 8},
            "text": {"width": 32, "layers": 2, "heads": 4, "tokens": 77, "vocabulary": 600},
            "width": 24,
            "activation": "gelu",
        },
        "clip_l": {
            "vision": {"width": 32, "layers": 2, "heads": 4, "image": 32, "patch": 8},
            "text": {"width": 24, "layers": 2, "heads": 3, "tokens": 77, "vocabulary": 600},
            "width": 20,
            "activation": "quick_gelu",
        },
    },
}
DOWN = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3


def write_checkpoint(folder: str | Path, size: str, seed: int = 0) -> Path:
    """Write the whole of `checkpoint/` for `size`, weights in float16 where the published ones may be;
    returns it."""
    folder, spec = Path(folder), SIZES[size]
    torch.manual_seed(seed)
    model = folder / "stable-diffusion-v1-4"
    make_unet(spec).half().save_pretrained(model / "unet")
    make_vae(spec).half().save_pretrained(model / "vae")
    write_clip(model, **spec["clip"])
    (model / "scheduler").mkdir()
    write_json(
        model / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "PNDMScheduler",
            "_diffusers_version": "0.2.2",
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "num_train_timesteps": 1000,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
        },
    )
    write_json(
        model / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.2.2",
            "feature_extractor": [None, None],
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "PNDMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    write_reward(folder, spec)
    return folder


def make_unet(spec: dict) -> UNet2DConditionModel:
    """A UNet with random weights, of one of `SIZES`."""
    return UNet2DConditionModel(
        sample_size=spec["sample_size"],
        cross_attention_dim=spec["clip"]["width"],
        attention_head_dim=spec["attention_heads"],  # the number of heads, by an old misnomer
        down_block_types=DOWN,
        up_block_types=UP,
        **spec["unet"],
    )


def make_vae(spec: dict) -> AutoencoderKL:
    """A VAE with random weights, of one of `SIZES`."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=spec["sample_size"] * 8,
        **spec["vae"],
    )


def write_clip(model: Path, width: int, layers: int, heads: int, tokens: int, vocabulary: int) -> None:
    """Text encoder and tokenizer."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokens,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    CLIPTextModel(config).half().save_pretrained(model / "text_encoder")
    write_clip_tokenizer(model / "tokenizer", tokens, vocabulary)


def write_clip_tokenizer(folder: Path, tokens: int, vocabulary: int) -> None:
    """A byte-level tokenizer of `vocabulary` words, of which those beyond single bytes never occur."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's map from bytes to characters
    characters = [chr(byte) for byte in visible] + [chr(256 + index) for index in range(256 - len(visible))]
    words = characters + [character + "</w>" for character in characters]
    words += [f"unused{index}" for index in range(vocabulary - 2 - len(words))]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", {word: index for index, word in enumerate(words)})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": tokens,
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
        },
    )


def write_reward(folder: Path, spec: dict) -> None:
    """ImageReward.pt, med_config.json (with the extra keys for sizes other than the published) and the
    tokenizer."""
    bert, vision = spec["bert"], spec["vision"]
    letters = [chr(97 + index) for index in range(26)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    words += [*string.digits, *string.punctuation][: bert["vocabulary"] - len(words)]
    if bert["vocabulary"] > 10_000:  # words, and letters of other scripts, so that prompts look as they do
        cyrillic, kana = (map(chr, range(*block)) for block in ((0x430, 0x460), (0x3041, 0x30FF)))
        prompts = (ROOT / "data" / "train_prompts.txt").read_text().lower()
        words += [*cyrillic, *kana, *sorted(set(re.findall(r"[a-z]{2,}", prompts)))]
    words += [f"[unused{index}]" for index in range(bert["vocabulary"] - len(words))]
    (folder / "bert-base-uncased").mkdir()
    (folder / "bert-base-uncased" / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer_config = {"do_lower_case": True, "model_max_length": 512, "tokenizer_class": "BertTokenizer"}
    write_json(folder / "bert-base-uncased" / "tokenizer_config.json", tokenizer_config)
    model = make_reward(spec, imagereward.load_tokenizer(folder / "bert-base-uncased"))
    with torch.no_grad():  # every one random, at a scale that makes scores of images and prompts differ
        for name, weight in model.named_parameters():
            is_norm = "norm" in name.lower() and weight.ndim == 1
            fan_in = 1 if "embeddings." in name and "patch" not in name else weight[0].numel()
            weight.normal_(
                mean=is_norm and name.endswith("weight"), std=0.1 if weight.ndim == 1 else fan_in**-0.5
            )
    torch.save(imagereward.published_state_dict(model), folder / "ImageReward.pt")
    med_config = {
        "hidden_act": "gelu",
        "hidden_size": bert["width"],
        "intermediate_size": 4 * bert["width"],
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_attention_heads": bert["heads"],
        "num_hidden_layers": bert["layers"],
        "pad_token_id": 0,
        "vocab_size": bert["vocabulary"] + 2,
        "encoder_width": 768,
        "add_cross_attention": True,
    }
    if vision["heads"] != 16:
        med_config["vision_num_attention_heads"] = vision["heads"]
    write_json(folder / "med_config.json", med_config)


def make_reward(spec: dict, tokenizer: BertTokenizer) -> imagereward.ImageReward:
    """An ImageReward as transformers initialises it, of one of `SIZES`."""
    bert, vision = spec["bert"], spec["vision"]
    return imagereward.ImageReward(
        BlipVisionConfig(
            hidden_size=vision["width"],
            intermediate_size=4 * vision["width"],
            num_hidden_layers=vision["layers"],
            num_attention_heads=vision["heads"],
            image_size=vision["image"],
            patch_size=vision["patch"],
            layer_norm_eps=1e-6,
            initializer_range=0.02,
        ),
        BlipTextConfig(
            vocab_size=bert["vocabulary"] + 2,
            hidden_size=bert["width"],
            encoder_hidden_size=vision["width"],
            intermediate_size=4 * bert["width"],
            num_hidden_layers=bert["layers"],
            num_attention_heads=bert["heads"],
            bos_token_id=None,
            sep_token_id=None,
        ),
        tokenizer,
        spec["head"],
    )


def write_clip_rewards(folder: Path, spec: dict) -> None:
    """The files of the rewards on CLIP, in their published formats and places."""
    write_clip_folder(folder / "PickScore_v1", spec["clip_h"], open_clip_weights(spec["clip_h"]))
    write_clip_folder(folder / "clip-vit-large-patch14", spec["clip_l"], open_clip_weights(spec["clip_l"]))
    shared = folder / pickscore.TOKENIZER
    clip_config(spec["clip_h"]).save_pretrained(shared)
    for place in (shared, folder / "clip-vit-large-patch14"):
        write_clip_tokenizer(place, spec["clip_h"]["text"]["tokens"], spec["clip_h"]["text"]["vocabulary"])
    torch.save({"epoch": 1, "state_dict": open_clip_weights(spec["clip_h"])}, folder / "HPS_v2_compressed.pt")
    torch.save({"state_dict": open_clip_weights(spec["clip_h"])}, folder / "HPS_v2.1_compressed.pt")
    write_aesthetic_heads(folder, spec["clip_l"]["width"])


def write_aesthetic_heads(folder: Path, width: int) -> None:
    """The heads of both versions, random, with ratings near 5."""
    for name, new_head in ((aesthetic.V1, aesthetic.linear_head), (aesthetic.V2, aesthetic.deep_head)):
        weights = {
            key: torch.randn(value.shape) * (value[0].numel() ** -0.5 if value.ndim > 1 else 0.1)
            for key, value in new_head(width).state_dict().items()
        }
        weights[list(weights)[-1]] += 5
        torch.save(weights, folder / name)


def clip_config(spec: dict) -> CLIPConfig:
    """Configuration of one of the CLIPs of `SIZES`."""
    text, vision = spec["text"], spec["vision"]
    return CLIPConfig(
        text_config={
            "vocab_size": text["vocabulary"],
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["tokens"],
            "hidden_act": spec["activation"],
            "bos_token_id": text["vocabulary"] - 2,
            "eos_token_id": text["vocabulary"] - 1,
        },
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["heads"],
            "image_size": vision["image"],
            "patch_size": vision["patch"],
            "hidden_act": spec["activation"],
        },
        projection_dim=spec["width"],
    )


def write_clip_folder(folder: Path, spec: dict, weights: dict[str, Tensor]) -> None:
    """A model's folder as transformers saves it, with weights under open_clip's names."""
    clip_config(spec).save_pretrained(folder)
    with torch.device("meta"):
        keys = CLIPModel(clip_config(spec)).state_dict()
    values = {key: hpsv2.value_of(key, weights[hpsv2.name_of(key)]).contiguous() for key in keys}
    save_file(values, folder / "model.safetensors", {"format": "pt"})


def open_clip_weights(spec: dict) -> dict[str, Tensor]:
    """Random weights of a CLIP under open_clip's names, at a scale that makes scores differ."""
    text, vision, width = spec["text"], spec["vision"], spec["width"]
    shapes = {
        "positional_embedding": (text["tokens"], text["width"]),
        "text_projection": (text["width"], width),
        "visual.class_embedding": (vision["width"],),
        "visual.positional_embedding": ((vision["image"] // vision["patch"]) ** 2 + 1, vision["width"]),
        "visual.proj": (vision["width"], width),
        "visual.conv1.weight": (vision["width"], 3, vision["patch"], vision["patch"]),
        "token_embedding.weight": (text["vocabulary"], text["width"]),
    }
    norms = {"ln_final": text["width"], "visual.ln_pre": vision["width"], "visual.ln_post": vision["width"]}
    for tower, sizes in (("", text), ("visual.", vision)):
        for layer in range(sizes["layers"]):
            block, own = f"{tower}transformer.resblocks.{layer}", sizes["width"]
            for name, (out, into) in {
                "attn.in_proj_": (3 * own, own),
                "attn.out_proj.": (own, own),
                "mlp.c_fc.": (4 * own, own),
                "mlp.c_proj.": (own, 4 * own),
            }.items():
                shapes |= {f"{block}.{name}weight": (out, into), f"{block}.{name}bias": (out,)}
            norms |= {f"{block}.ln_1": own, f"{block}.ln_2": own}
    weights = {}
    for name, shape in shapes.items():
        is_embedding = "embedding" in name
        fan_in = shape[0] if "proj" in name and "." not in name.removeprefix("visual.") else shape[-1]
        fan_in = 3 * shape[-1] ** 2 if "conv1" in name else fan_in
        std = 0.1 if name.endswith("bias") else 1.0 if is_embedding else fan_in**-0.5
        weights[name] = torch.randn(shape) * std
    for name, size in norms.items():
        weights |= {f"{name}.weight": 1 + 0.1 * torch.randn(size), f"{name}.bias": 0.1 * torch.randn(size)}
    weights["logit_scale"] = torch.tensor(4.6)
    return weights


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    arguments = parser.parse_args()
    write_checkpoint(arguments.folder, arguments.size)

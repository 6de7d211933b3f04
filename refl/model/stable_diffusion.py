"""Stable Diffusion's parts: loaded and frozen, LoRA put in, taken out and saved, DDPM's arithmetic, images
drawn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from refl.system.errors import UserError

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging


@dataclass
class StableDiffusion:
    """The frozen parts; `unet` may carry a LoRA."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel | None  # None once the prompts are encoded
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler_config: dict


def load_stable_diffusion(
    folder: str | Path, dtype: torch.dtype, device: str | torch.device
) -> StableDiffusion:
    """Parts of a model in diffusers' layout, frozen, in `dtype`; the VAE in float32 where `dtype` is float16.

    SD's VAE overflows in float16 (its activations pass 65,504), and one such image is all NaN.
    """
    transformers_logging.disable_progress_bar()
    vae_dtype = torch.float32 if dtype == torch.float16 else dtype
    try:
        parts = StableDiffusion(
            tokenizer=CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
            text_encoder=_load_part(CLIPTextModel, folder, "text_encoder", dtype=dtype),
            vae=_load_part(AutoencoderKL, folder, "vae", torch_dtype=vae_dtype),
            unet=_load_part(UNet2DConditionModel, folder, "unet", torch_dtype=dtype),
            scheduler_config=DDPMScheduler.load_config(folder, subfolder="scheduler"),
        )
    except UserError:
        raise
    except Exception as error:  # of three libraries; tokenizers raises Exception itself
        raise not_loadable(folder, error) from error
    if (
        len(parts.tokenizer) != parts.text_encoder.config.vocab_size
    ):  # an empty folder makes an empty tokenizer
        raise UserError(
            f"{folder}/tokenizer does not fit the text encoder: {len(parts.tokenizer)} tokens instead of "
            f"{parts.text_encoder.config.vocab_size}. Copy the folder again from its source."
        )
    for part in (parts.text_encoder, parts.vae, parts.unet):
        part.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
    return parts


def _load_part(cls: type, folder: str | Path, part: str, **dtype: torch.dtype) -> torch.nn.Module:
    """A model of diffusers or transformers, which both fill weights that a file lacks with random numbers."""
    model, info = cls.from_pretrained(folder, subfolder=part, output_loading_info=True, **dtype)
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{Path(folder) / part} is of another model: {len(missing)} weights are missing, such as "
            f"{missing[0]}."
        )
    return model


def not_loadable(folder: str | Path, error: Exception) -> UserError:
    """What a library says of a model's folder, in a line."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(f"{folder} is not a Stable Diffusion model that can be loaded: {reason}")


def vae_factor(vae: AutoencoderKL) -> int:
    """Image pixels per latent pixel, 8 for Stable Diffusion."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode_prompts(parts: StableDiffusion, prompts: Sequence[str], batch_size: int = 32) -> Iterator[Tensor]:
    """Each prompt's embedding, (tokens, width); a prompt longer than the tokenizer takes is cut."""
    for start in range(0, len(prompts), batch_size):
        tokens = parts.tokenizer(
            list(prompts[start : start + batch_size]),
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        yield from parts.text_encoder(tokens.input_ids.to(parts.text_encoder.device)).last_hidden_state


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W), float32 at least, about [0, 1] but not clamped, of latents (B, C, h, w) at the
    UNet's scale."""
    with torch.autocast(latents.device.type, enabled=False):
        images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
    return images.to(torch.promote_types(images.dtype, torch.float32)) / 2 + 0.5


@torch.no_grad()
def encode(vae: AutoencoderKL, image: Tensor) -> Tensor:
    """Latents (C, h, w), float32, at the UNet's scale, of an image (3, H, W) in [-1, 1]: the mean of what
    the encoder allows for."""
    moments = vae.encode(image[None].to(vae.device, vae.dtype)).latent_dist
    return moments.mode()[0].float() * vae.config.scaling_factor


# ------------------------------------------------------------------------------------------------------- DDPM

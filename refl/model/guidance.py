"""Classifier-free guidance (Ho & Salimans 2022)."""

from refl.model.conditioning import Conditioning, cat_embeds
from refl.model.families import Family
from refl.model.lean import lora_off

import torch
from torch import Tensor


def predict(
    model: Family,
    latents: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    guidance_scale: float = 1.0,
    lora_in_uncond: bool = True,
) -> Tensor:
    """The network's output for latents (B, C, h, w) at timesteps (B,), guided unless `guidance_scale` is 1.

    Eq. 6 with guidance_scale = 1 + w. Without `lora_in_uncond` the base model predicts for the empty prompt,
    and that prediction has no gradient but in `latents`.
    """
    if guidance_scale == 1:
        return model.denoise(latents, timesteps, conditioning.prompt)
    if lora_in_uncond:
        embeds = cat_embeds([conditioning.empty, conditioning.prompt])
        empty, prompt = model.denoise(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), embeds).chunk(2)
    else:
        with torch.set_grad_enabled(torch.is_grad_enabled() and latents.requires_grad), lora_off(model.unet):
            empty = model.denoise(latents, timesteps, conditioning.empty)
        prompt = model.denoise(latents, timesteps, conditioning.prompt)
    return empty + guidance_scale * (prompt - empty)

"""Stable Diffusion 1.x: text encoder, UNet and VAE, loaded from diffusers' layout and frozen."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from refl.model.conditioning import Embeds
from refl.model.folder import read_config
from refl.model.lora import ATTENTION_LAYERS
from refl.system.errors import UserError

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

CLIP_TOKENS = 77  # of a prompt


@dataclass
class StableDiffusion:
    """The frozen parts and what training does with them; `unet` may carry a LoRA."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    tokenizer: CLIPTokenizer | None = None
    text_encoder: CLIPTextModel | None = None  # None once the prompts are encoded
    scheduler_config: dict = field(default_factory=dict)
    tiny_decoder: AutoencoderTiny | None = None  # for the gradient alone, as is `decode_side`
    decode_side: int | None = None  # latent pixels a side of what is decoded; None: all

    lora_targets: ClassVar = ATTENTION_LAYERS

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], batch_size: int = 32) -> Iterator[Embeds]:
        """Yield each prompt's encoder_hidden_states (tokens, width); long prompts are truncated."""
        for start in range(0, len(prompts), batch_size):
            tokens = self.tokenizer(
                list(prompts[start : start + batch_size]),
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            )
            hidden = self.text_encoder(tokens.input_ids.to(self.text_encoder.device)).last_hidden_state
            yield from ({"encoder_hidden_states": own} for own in hidden)

    def denoise(self, latents: Tensor, timesteps: Tensor, embeds: Embeds) -> Tensor:
        """The UNet's output at timesteps (B,), (B, C, h, w) in the dtype of `latents`; computed in that of
        `embeds`."""
        sample = latents.to(embeds["encoder_hidden_states"].dtype)
        return self.unet(sample, timesteps, **embeds).sample.to(latents.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) of latents (B, C, h, w); see `decode`."""
        return decode(self.vae, latents)

    @property
    def gradient_decoder(self) -> AutoencoderKL | AutoencoderTiny:
        """What decodes where d loss / d x0 is taken."""
        return self.tiny_decoder or self.vae

    def decode_for_gradient(self, latents: Tensor) -> Tensor:
        """As `decode`, or cheaper: smaller images, made smaller as latents, or by the tiny decoder."""
        if self.decode_side:
            size = self.decode_side, self.decode_side
            latents = F.interpolate(latents, size=size, mode="bicubic", antialias=True)
        return decode(self.gradient_decoder, latents)

    def encode(self, image: Tensor) -> Tensor:
        """Latents (C, h, w) of an image (3, H, W) in [-1, 1]; see `encode`."""
        return encode(self.vae, image)

    def empty_embeds(self, batch_size: int, dtype: torch.dtype) -> Embeds:
        """Embeddings of the right shape without content, for counting memory."""
        tokens, width = CLIP_TOKENS, self.unet.config.cross_attention_dim
        return {"encoder_hidden_states": torch.empty(batch_size, tokens, width, dtype=dtype)}

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of square images with `resolution` pixels a side."""
        side = resolution // vae_factor(self.vae)
        return self.unet.config.in_channels, side, side


def load_stable_diffusion(
    folder: str | Path, dtype: torch.dtype, device: str | torch.device
) -> StableDiffusion:
    """Load a model in diffusers' layout, frozen, in `dtype`; its VAE in float32 where `dtype` is float16.

    The VAE overflows in float16 (activations above 65,504), and such an image is all NaN. Raises `UserError`.
    """
    transformers_logging.disable_progress_bar()
    vae_dtype = torch.float32 if dtype == torch.float16 else dtype
    try:
        parts = StableDiffusion(
            tokenizer=CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
            text_encoder=_load_part(CLIPTextModel, folder, "text_encoder", dtype=dtype),
            vae=_load_part(AutoencoderKL, folder, "vae", torch_dtype=vae_dtype),
            unet=_load_part(UNet2DConditionModel, folder, "unet", torch_dtype=dtype),
            scheduler_config=read_config(folder, "scheduler"),
        )
        for part in (parts.text_encoder, parts.vae, parts.unet):
            part.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
        _check_tokenizer(folder, parts)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of three libraries; tokenizers raises Exception itself
        raise not_loadable(folder, error) from error
    return parts


def load_empty_stable_diffusion(folder: str | Path) -> StableDiffusion:
    """UNet, and VAE without its encoder, on the meta device. Raises `UserError`."""
    try:
        with torch.device("meta"):
            config = UNet2DConditionModel.load_config(folder, subfolder="unet")
            unet = UNet2DConditionModel.from_config(config)
            vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae"))
    except Exception as error:  # configurations of another model raise many kinds
        raise not_loadable(folder, error) from error
    vae.encoder = None
    for model in (unet, vae):
        model.requires_grad_(False)
    return StableDiffusion(vae, unet)


def _check_tokenizer(folder: str | Path, parts: StableDiffusion) -> None:
    """Raise an error, `UserError` or a library's, unless tokenizer and text encoder encode a prompt."""
    tokenizer, config = parts.tokenizer, parts.text_encoder.config
    advice = "Copy the folder again from its source."
    # transformers makes an empty tokenizer of an empty folder.
    if len(tokenizer) != config.vocab_size or max(tokenizer.get_vocab().values()) >= config.vocab_size:
        raise UserError(
            f"{folder}/tokenizer does not fit the text encoder: {len(tokenizer)} tokens instead of "
            f"{config.vocab_size}. {advice}"
        )
    if not 2 < tokenizer.model_max_length <= config.max_position_embeddings:
        raise UserError(
            f"{folder}/tokenizer does not fit the text encoder: model_max_length is "
            f"{tokenizer.model_max_length}, for {config.max_position_embeddings} positions. {advice}"
        )
    if not all(embeds["encoder_hidden_states"].isfinite().all() for embeds in parts.encode_prompts(["a"])):
        raise UserError(f"{folder}/text_encoder gives numbers that are not finite. {advice}")


def _load_part(cls: type, folder: str | Path, part: str, **dtype: torch.dtype) -> torch.nn.Module:
    """Load one model; refuse missing weights, which the libraries would fill with random numbers."""
    model, info = cls.from_pretrained(folder, subfolder=part, output_loading_info=True, **dtype)
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{Path(folder) / part} is of another model: {len(missing)} weights are missing, such as "
            f"{missing[0]}."
        )
    return model


def not_loadable(folder: str | Path, error: Exception) -> UserError:
    """A library's error about a model's folder as one line."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(f"{folder} is not a Stable Diffusion model that can be loaded: {reason}")


def vae_factor(vae: AutoencoderKL) -> int:
    """Image pixels per latent pixel, 8 for Stable Diffusion."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def decode(vae: AutoencoderKL | AutoencoderTiny, latents: Tensor) -> Tensor:
    """Decode latents (B, C, h, w) at the UNet's scale to images (B, 3, H, W), float32 or wider.

    Values lie around [0, 1] and are not clamped.
    """
    with torch.autocast(latents.device.type, enabled=False):
        images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
    return images.to(torch.promote_types(images.dtype, torch.float32)) / 2 + 0.5


@torch.no_grad()
def encode(vae: AutoencoderKL, image: Tensor) -> Tensor:
    """Encode an image (3, H, W) in [-1, 1] to latents (C, h, w), float32, at the UNet's scale:
    the posterior's mean."""
    moments = vae.encode(image[None].to(vae.device, vae.dtype)).latent_dist
    return moments.mode()[0].float() * vae.config.scaling_factor

"""Stable Diffusion's parts: loaded and frozen, LoRA put in, taken out and saved, DDPM's arithmetic, pictures
drawn."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from refl.errors import UserError
from refl.lean import lora_off, make_lean

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # attention, self and cross
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name by which diffusers finds it in a folder
KOHYA_FILE = "kohya_lora.safetensors"
METADATA_KEY = "refl"  # our entry of the file's metadata, JSON

SAMPLERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
}


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

    SD's VAE overflows in float16 (its activations pass 65,504), and one such picture is all NaN.
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
    """Picture pixels per latent pixel, 8 for Stable Diffusion."""
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
    """Pictures (B, 3, H, W), float32 at least, about [0, 1] but not clamped, of latents (B, C, h, w) at the
    UNet's scale."""
    with torch.autocast(latents.device.type, enabled=False):
        pictures = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
    return pictures.to(torch.promote_types(pictures.dtype, torch.float32)) / 2 + 0.5


@torch.no_grad()
def encode(vae: AutoencoderKL, picture: Tensor) -> Tensor:
    """Latents (C, h, w), float32, at the UNet's scale, of a picture (3, H, W) in [-1, 1]: the mean of what
    the encoder allows for."""
    moments = vae.encode(picture[None].to(vae.device, vae.dtype)).latent_dist
    return moments.mode()[0].float() * vae.config.scaling_factor


# ------------------------------------------------------------------------------------------------------- DDPM


class Ddpm:
    """DDPM (Ho et al. 2020) on `num_inference_steps` of the training timesteps: plain numbers, ready for each
    step.

    The timesteps and the noise schedule are those of diffusers' scheduler; only the arithmetic of a step is
    here, so that the noise is given by the caller and nothing waits for the device. Never clips x0: latents
    are not in [-1, 1].
    """

    def __init__(self, scheduler_config: dict, num_inference_steps: int, device: str | torch.device = "cpu"):
        if scheduler_config.get("prediction_type", "epsilon") != "epsilon":
            raise UserError(
                f"the model predicts {scheduler_config['prediction_type']}; only epsilon is supported."
            )
        scheduler = DDPMScheduler.from_config(
            scheduler_config, clip_sample=False, variance_type="fixed_small"
        )
        scheduler.set_timesteps(num_inference_steps)
        self.add_noise = scheduler.add_noise  # (x0, noise, training timesteps (B,)) -> x_t, eq. 4
        self.num_train_timesteps = scheduler.config.num_train_timesteps
        self.timesteps = scheduler.timesteps.to(device)  # e.g. 976, 951, ..., 26, 1
        self.alphas_cumprod = [*scheduler.alphas_cumprod.double()[scheduler.timesteps].tolist(), 1.0]

    def x0_slope(self, index: int) -> float:
        """|d x0 / d eps| of `predict_x0`."""
        return (1 / self.alphas_cumprod[index] - 1) ** 0.5

    def predict_x0(self, latents: Tensor, eps: Tensor, index: int) -> Tensor:
        """x0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t), eq. 15; `index` counts denoising steps from 0."""
        abar = self.alphas_cumprod[index]
        return (latents - (1 - abar) ** 0.5 * eps) / abar**0.5

    def step(self, latents: Tensor, eps: Tensor, index: int, noise: Tensor) -> Tensor:
        """x_{t-1} ~ q(x_{t-1} | x_t, x0), eq. 7, with the given standard normal noise; the last step adds
        none."""
        abar, abar_next = self.alphas_cumprod[index : index + 2]
        alpha = abar / abar_next
        x0_weight = abar_next**0.5 * (1 - alpha) / (1 - abar)
        latents_weight = alpha**0.5 * (1 - abar_next) / (1 - abar)
        std = ((1 - abar_next) / (1 - abar) * (1 - alpha)) ** 0.5
        return x0_weight * self.predict_x0(latents, eps, index) + latents_weight * latents + std * noise


# ------------------------------------------------------------------------------------------------------- LoRA


def add_lora(unet: UNet2DConditionModel, rank: int, alpha: float, seed: int) -> list[torch.nn.Parameter]:
    """Put a LoRA (Hu et al. 2021) into the attention layers, initially zero; returns its matrices, float32,
    trainable."""
    torch.manual_seed(seed)
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(LORA_TARGETS))
    )
    cast_training_params(unet, torch.float32)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def pack_lora(unet: UNet2DConditionModel, metadata: dict) -> bytes:
    """The LoRA as a safetensors file in diffusers' format; the same LoRA is the same bytes.

    `metadata` goes into the file beside what diffusers needs to restore rank and alpha.
    """
    adapter = {f"unet.{key}": value for key, value in unet.peft_config["default"].to_dict().items()}
    about = {
        LORA_ADAPTER_METADATA_KEY: json.dumps(adapter, sort_keys=True, default=sorted),
        METADATA_KEY: json.dumps(metadata, sort_keys=True),
    }
    return _pack(_lora_weights(unet), about)


def to_kohya(content: bytes) -> bytes:
    """What `pack_lora` made, in kohya's format, which A1111 and ComfyUI read as well."""
    length = int.from_bytes(content[:8], "little")
    about = json.loads(content[8 : 8 + length])["__metadata__"]
    adapter = json.loads(about[LORA_ADAPTER_METADATA_KEY])
    rank, alpha = adapter["unet.r"], float(adapter["unet.lora_alpha"])
    names = {".lora.down.": ".lora_A.", ".lora.up.": ".lora_B."}  # what the converter takes
    weights = load(content)
    for theirs, peft in names.items():
        weights = {key.replace(theirs, peft): value for key, value in weights.items()}
    weights = convert_state_dict_to_kohya(weights)
    for key in weights:
        if key.endswith(".alpha"):  # the converter writes the rank
            weights[key] = torch.tensor(alpha)
    about = {
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "ss_base_model_version": "sd_v1",
        "ss_network_alpha": str(alpha),
        "ss_network_dim": str(rank),
        "ss_network_module": "networks.lora",
        METADATA_KEY: about[METADATA_KEY],
    }
    return _pack(weights, about)


def _pack(weights: dict[str, Tensor], about: dict[str, str]) -> bytes:
    tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    content = save(tensors, metadata={"format": "pt"} | about)
    # safetensors writes the metadata in random order.
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


@torch.no_grad()
def unpack_lora(unet: UNet2DConditionModel, content: bytes) -> None:
    """Put the values of `pack_lora` into the LoRA that `unet` already carries; raises `UserError` if they do
    not fit."""
    saved, weights = load(content), _lora_weights(unet)
    if {key: value.shape for key, value in saved.items()} != {key: w.shape for key, w in weights.items()}:
        raise UserError("the checkpoint's LoRA was made for another model; take another --output_dir.")
    for key, value in weights.items():
        value.copy_(saved[key])


def _lora_weights(unet: UNet2DConditionModel) -> dict[str, Tensor]:  # the matrices themselves, not copies
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    return {f"unet.{key}": value for key, value in weights.items()}


def lora_file(path: str | Path) -> Path:
    """The LoRA's file, given itself or its folder; raises `UserError` when there is none."""
    path = Path(path)
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no LoRA at {file}. Train one (bash train_refl_lora.sh), or name another.")
    return file


def read_metadata(path: str | Path) -> dict:
    """What `pack_lora` wrote about a LoRA; {} for one from elsewhere."""
    file = lora_file(path)
    try:
        with safe_open(file, framework="pt") as tensors:
            metadata = json.loads((tensors.metadata() or {}).get(METADATA_KEY, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is damaged or is not a safetensors file ({error}).") from error
    return metadata if isinstance(metadata, dict) else {}


def load_lora(
    pipeline: StableDiffusionPipeline, path: str | Path, scale: float, in_uncond: bool = True
) -> None:
    """Put a LoRA in diffusers' (or kohya's) format into the pipeline at `scale`, in the place of another; not
    `in_uncond`: guidance takes the prediction for the empty prompt from the model without it."""
    file = lora_file(path)
    read_metadata(file)
    unload_lora(pipeline)
    try:
        pipeline.load_lora_weights(
            file.parent, weight_name=file.name, adapter_name="default", local_files_only=True
        )
        pipeline.set_adapters("default", scale)
        make_lean(pipeline.unet)
        if not in_uncond:
            pipeline.unet.forward = partial(_without_lora_in_uncond, pipeline, pipeline.unet.forward)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{file} does not fit this model; it was made for another architecture ({reason})."
        ) from error


def unload_lora(pipeline: StableDiffusionPipeline) -> None:
    """Let the pipeline be as it was without a LoRA."""
    pipeline.unload_lora_weights()
    vars(pipeline.unet).pop("forward", None)


def _without_lora_in_uncond(
    pipeline: StableDiffusionPipeline, forward: Callable, sample: Tensor, t: Tensor,
    encoder_hidden_states: Tensor, **options,
) -> tuple[Tensor]:  # fmt: skip
    """The UNet as the pipeline calls it: in guidance the first half of the rows is for the empty prompt."""
    if not pipeline.do_classifier_free_guidance:
        return forward(sample, t, encoder_hidden_states=encoder_hidden_states, **options)
    rows = list(zip(sample.chunk(2), encoder_hidden_states.chunk(2), strict=True))
    eps = []
    for (own, embeds), context in zip(rows, (lora_off(pipeline.unet), nullcontext()), strict=True):
        with context:
            eps.append(forward(own, t, encoder_hidden_states=embeds, **options)[0])
    return (torch.cat(eps),)


# -------------------------------------------------------------------------------------------------- inference


def load_pipeline(
    folder: str | Path, sampler: str, dtype: torch.dtype, device: str | torch.device
) -> StableDiffusionPipeline:
    """diffusers' pipeline with one of `SAMPLERS`; decodes in float32 where `dtype` is float16, picture by
    picture."""
    parts = load_stable_diffusion(folder, dtype, device)
    pipeline = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=SAMPLERS[sampler].from_config(parts.scheduler_config, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def generate(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    resolution: int | None = None,
) -> Tensor:
    """Pictures (B, 3, H, W) float32 in [0, 1] on the CPU, one for each prompt and its seed.

    A seed stands for one noise on every device and in every batch. Decoded one at a time, so that memory does
    not grow with the batch.
    """
    unet, factor = pipeline.unet, vae_factor(pipeline.vae)
    side = resolution // factor if resolution else unet.config.sample_size
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    noise = [
        torch.randn(unet.config.in_channels, side, side, generator=generator) for generator in generators
    ]
    latents = pipeline(
        list(prompts),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        height=side * factor,
        width=side * factor,
        latents=torch.stack(noise).to(
            unet.dtype
        ),  # drawn in float32: half precision would draw other numbers
        generator=generators,
        output_type="latent",
    ).images
    return torch.cat([decode(pipeline.vae, latent[None]).clamp(0, 1).cpu() for latent in latents])

"""Draw images with diffusers' pipeline, with or without a LoRA."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from refl.model import families
from refl.model.lean import lora_off, make_lean
from refl.model.lora import check_lora_file, lora_file, read_metadata
from refl.model.lora_check import check_applied, check_kind
from refl.model.noise_schedule import make_scheduler
from refl.model.stable_diffusion import decode, vae_factor
from refl.system.errors import UserError

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor

SAMPLERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
}


def load_lora(
    pipeline: StableDiffusionPipeline, path: str | Path, scale: float, in_uncond: bool = True
) -> None:
    """Load a LoRA in diffusers' or kohya's format into the pipeline at `scale`, replacing any other.

    Without `in_uncond`, guidance uses the base model's prediction for the empty prompt. Raises `UserError`
    unless all of the file is applied.
    """
    file = lora_file(path)
    read_metadata(file)
    check_kind(file)
    check_lora_file(file)
    unload_lora(pipeline)
    try:
        pipeline.load_lora_weights(
            file.parent, weight_name=file.name, adapter_name="default", local_files_only=True
        )
        check_applied(file, (pipeline.unet, pipeline.text_encoder))
        pipeline.set_adapters("default", scale)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        unload_lora(pipeline)
        raise
    except Exception as error:  # of diffusers, peft and torch, of many kinds
        unload_lora(pipeline)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{file} does not fit this model; it was trained for another architecture ({reason})."
        ) from error
    make_lean(pipeline.unet)
    if not in_uncond:
        pipeline.unet.forward = partial(_without_lora_in_uncond, pipeline, pipeline.unet.forward)


def unload_lora(pipeline: StableDiffusionPipeline) -> None:
    """Remove the LoRA from the pipeline, if it has one."""
    pipeline.unload_lora_weights()
    vars(pipeline.unet).pop("forward", None)


def _without_lora_in_uncond(
    pipeline: StableDiffusionPipeline, forward: Callable, sample: Tensor, t: Tensor,
    encoder_hidden_states: Tensor, **options,
) -> tuple[Tensor]:  # fmt: skip
    """Replace the UNet's forward: in guidance the first half of the batch is for the empty prompt."""
    if not pipeline.do_classifier_free_guidance:
        return forward(sample, t, encoder_hidden_states=encoder_hidden_states, **options)
    outputs = []
    contexts = lora_off(pipeline.unet), nullcontext()
    for half, embeds, context in zip(sample.chunk(2), encoder_hidden_states.chunk(2), contexts, strict=True):
        with context:
            outputs.append(forward(half, t, encoder_hidden_states=embeds, **options)[0])
    return (torch.cat(outputs),)


# -------------------------------------------------------------------------------------------------- inference


def load_pipeline(
    folder: str | Path, sampler: str, dtype: torch.dtype, device: str | torch.device
) -> StableDiffusionPipeline:
    """diffusers' pipeline with one of `SAMPLERS`; its VAE is in float32 if `dtype` is float16."""
    parts = families.load(folder, dtype, device)
    pipeline = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=make_scheduler(SAMPLERS[sampler], parts.scheduler_config),
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
    """Images (B, 3, H, W) float32 in [0, 1] on the CPU, one for each prompt and its seed.

    A seed gives the same noise on every device and in every batch. Decodes one image at a time, so that
    memory does not grow with the batch. Raises `UserError` for images that are not finite.
    """
    unet, factor = pipeline.unet, vae_factor(pipeline.vae)
    side = resolution // factor if resolution else unet.config.sample_size
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    noise = [
        torch.randn(unet.config.in_channels, side, side, generator=generator) for generator in generators
    ]
    latents = torch.stack(noise).to(unet.dtype)  # drawn in float32: half precision would draw other numbers
    latents = pipeline(  # (B, C, h, w)
        list(prompts),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        height=side * factor,
        width=side * factor,
        latents=latents,
        generator=generators,
        output_type="latent",
    ).images
    images = torch.cat([decode(pipeline.vae, latent[None]).clamp(0, 1).cpu() for latent in latents])
    if not images.isfinite().all():
        raise UserError(
            "the images are not finite numbers: the weights are damaged, or the LoRA or the guidance is too "
            f"strong in {unet.dtype}. Try a lower --lora_scale or --guidance_scale, or --dtype fp32."
        )
    return images

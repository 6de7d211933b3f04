"""The published ReFL step, ported directly to current libraries: the baseline of step.py.

It keeps the structure of the published training loop: encodes prompts for each batch, rolls out one
micro-batch at a time with diffusers' scheduler, builds one graph from the UNet to the loss, gathers and reads
the loss after every micro-batch, and computes attention in the reward with explicit matrices. The LoRA is
peft's as added by diffusers, float32 under autocast. Noise and stop index are arguments, so that it draws the
same images as our step.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.schedulers import scheduling_ddpm
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention


@dataclass
class Baseline:
    """Models, optimizer and accelerator of the published step."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel  # with peft's LoRA, the only part that is trained
    vae: AutoencoderKL
    scheduler: DDPMScheduler
    reward: torch.nn.Module  # (images, prompts) -> scores
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator


def use_eager_attention(reward: torch.nn.Module) -> None:
    """Switch ImageReward's layers to transformers' own attention, which saves (tokens x tokens) matrices."""
    for module in reward.modules():
        for cls in (BlipAttention, BlipTextSelfAttention):
            if isinstance(module, cls):
                module.__class__ = cls


def baseline_step(
    models: Baseline,
    batches: Sequence[tuple[list[str], Tensor, int]],
    grad_scale: float,
    num_inference_steps: int,
    max_grad_norm: float,
    phase: Callable[[str], AbstractContextManager],
) -> float:
    """Take one optimizer step; return its mean loss.

    `batches` are micro-batches (prompts, noise (B, > stop, C, h, w), stop).
    """
    parameters = [p for p in models.unet.parameters() if p.requires_grad]
    accelerator, device, dtype, losses = models.accelerator, models.unet.device, models.unet.dtype, []
    # Like accelerate's, which supports no float16 on the CPU.
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    models.optimizer.zero_grad()
    for prompts, noise, stop in batches:
        noise = noise.to(device)
        with phase("text"):
            tokens = models.tokenizer(
                prompts, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            prompt_embeds = models.text_encoder(tokens.to(device))[0]
        models.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps, latents = models.scheduler.timesteps, noise[:, 0]
        with phase("rollout"), torch.no_grad():
            for index, t in enumerate(timesteps[:stop]):
                with autocast():
                    eps = models.unet(latents, t, encoder_hidden_states=prompt_embeds).sample
                latents = _scheduler_step(models.scheduler, eps, t, latents, noise[:, index + 1]).prev_sample
        with phase("grad_step"):
            with autocast():
                eps = models.unet(latents, timesteps[stop], encoder_hidden_states=prompt_embeds).sample
            unused = noise[:, stop]  # the published step draws this noise without using it
            x0 = _scheduler_step(models.scheduler, eps, timesteps[stop], latents, unused).pred_original_sample
        with phase("decode"):
            x0 = x0.to(models.vae.dtype) / models.vae.config.scaling_factor
            images = (models.vae.decode(x0).sample / 2 + 0.5).clamp(0, 1)
        with phase("reward"):
            rewards = models.reward(images.float(), prompts)
            loss = (2 - rewards).relu().mean() * grad_scale
        losses.append(accelerator.gather(loss.detach().repeat(len(prompts))).mean().item())
        with phase("backward"):
            accelerator.backward(loss / len(batches))
    with phase("optimizer"):
        accelerator.clip_grad_norm_(parameters, max_grad_norm)
        models.optimizer.step()
    return sum(losses) / len(losses)


def _scheduler_step(
    scheduler: DDPMScheduler, eps: Tensor, t: Tensor, latents: Tensor, noise: Tensor
) -> object:
    """Take a scheduler step with the given noise instead of random noise."""
    original, scheduling_ddpm.randn_tensor = scheduling_ddpm.randn_tensor, lambda *_, **__: noise
    try:
        return scheduler.step(eps.to(latents.dtype), t, latents)
    finally:
        scheduling_ddpm.randn_tensor = original

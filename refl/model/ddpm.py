"""DDPM (Ho et al. 2020) on a grid of the training timesteps, with the noise given by the caller."""

from refl.system.errors import UserError

import torch
from diffusers import (
    DDPMScheduler,
)
from torch import Tensor


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

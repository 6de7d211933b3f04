"""The noise schedule: x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, on a grid of denoising steps."""

from refl.model.parameterisation import PARAMETERISATIONS
from refl.model.samplers import SAMPLERS
from refl.system.errors import UserError

import torch
from diffusers import DDPMScheduler
from torch import Tensor


class NoiseSchedule:
    """`num_inference_steps` of the model's training timesteps, and the arithmetic between them.

    Timesteps and abar are those of diffusers' scheduler; a step's coefficients are plain Python numbers, so
    that no step waits for the device. The caller gives the noise. x0 is never clipped: latents are not in
    [-1, 1]. `index` counts denoising steps from 0, the noisiest. Raises `UserError` for a model that predicts
    something unsupported.
    """

    def __init__(
        self,
        scheduler_config: dict,
        num_inference_steps: int,
        device: str | torch.device = "cpu",
        sampler: str = "ddpm",
    ):
        prediction_type = scheduler_config.get("prediction_type", "epsilon")
        if prediction_type not in PARAMETERISATIONS:
            supported = ", ".join(PARAMETERISATIONS)
            raise UserError(f"the model predicts {prediction_type}; only {supported} is supported.")
        self.parameterisation = PARAMETERISATIONS[prediction_type]
        self.sampler_step = SAMPLERS[sampler]
        scheduler = DDPMScheduler.from_config(
            scheduler_config, clip_sample=False, variance_type="fixed_small"
        )
        scheduler.set_timesteps(num_inference_steps)
        self.add_noise = scheduler.add_noise  # (x0, noise, training timesteps (B,)) -> x_t, DDPM eq. 4
        self.training_alphas_cumprod = scheduler.alphas_cumprod  # (num_train_timesteps,)
        self.timesteps = scheduler.timesteps.to(device)  # e.g. 976, 951, ..., 26, 1
        # abar of each step, and 1 after the last: float64 numbers
        self.alphas_cumprod = [*scheduler.alphas_cumprod.double()[scheduler.timesteps].tolist(), 1.0]

    def predict_x0(self, latents: Tensor, output: Tensor, index: int) -> Tensor:
        """x0 of latents x_t and the network's output, both (B, C, h, w)."""
        return self.parameterisation.x0(latents, output, self.alphas_cumprod[index])

    def x0_slope(self, index: int) -> float:
        """|d x0 / d output| at a denoising step."""
        return self.parameterisation.x0_slope(self.alphas_cumprod[index])

    def step(self, latents: Tensor, x0: Tensor, index: int, noise: Tensor) -> Tensor:
        """Latents of the next, less noisy step, given standard normal noise; all (B, C, h, w)."""
        return self.sampler_step(latents, x0, *self.alphas_cumprod[index : index + 2], noise)

    def training_target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network is trained to predict at training timesteps (B,)."""
        abar = self.training_alphas_cumprod[timesteps].view(-1, *[1] * (x0.ndim - 1))
        return self.parameterisation.target(x0, noise, abar)

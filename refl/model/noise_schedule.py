"""The noise schedule: x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, at training timesteps t."""

import math
from collections.abc import Sequence
from typing import Any

from refl.model.parameterisation import PARAMETERISATIONS
from refl.model.samplers import SAMPLERS, extrapolated_x0
from refl.system.errors import UserError

from diffusers import DDPMScheduler, SchedulerMixin
from torch import Tensor


def make_scheduler(kind: type[SchedulerMixin], config: dict, **changes: Any) -> SchedulerMixin:
    """A scheduler of diffusers for latents, which are not clipped; raises `UserError`."""
    try:
        scheduler = kind.from_config(config, clip_sample=False, **changes)
    except Exception as error:  # of many kinds, by the values in a configuration
        raise UserError(f"scheduler_config.json is not a noise schedule: {error}") from error
    if not ((scheduler.alphas_cumprod > 0) & (scheduler.alphas_cumprod < 1)).all():
        raise UserError("scheduler_config.json is not a noise schedule: betas must lie between 0 and 1.")
    return scheduler


class NoiseSchedule:
    """The model's training timesteps, the grid of `num_inference_steps` of them, and the arithmetic between
    any two.

    Timesteps and abar are those of diffusers' scheduler; a step's coefficients are plain Python numbers, so
    that no step waits for the device. The caller gives the noise. x0 is never clipped: latents are not in
    [-1, 1]. Raises `UserError` for a model that predicts something unsupported.
    """

    def __init__(self, scheduler_config: dict, num_inference_steps: int):
        prediction_type = scheduler_config.get("prediction_type", "epsilon")
        if prediction_type not in PARAMETERISATIONS:
            supported = ", ".join(PARAMETERISATIONS)
            raise UserError(f"the model predicts {prediction_type}; only {supported} is supported.")
        self.parameterisation = PARAMETERISATIONS[prediction_type]
        scheduler = make_scheduler(DDPMScheduler, scheduler_config, variance_type="fixed_small")
        scheduler.set_timesteps(num_inference_steps)
        self.add_noise = scheduler.add_noise  # (x0, noise, training timesteps (B,)) -> x_t, DDPM eq. 4
        self.training_alphas_cumprod = scheduler.alphas_cumprod  # (num_train_timesteps,)
        self.alphas_cumprod = scheduler.alphas_cumprod.double().tolist()  # the same as numbers
        self.timesteps = tuple(scheduler.timesteps.tolist())  # the grid, e.g. 976, 951, ..., 26, 1

    def path(self, stops: Sequence[int], num_steps: int | None = None) -> tuple[tuple[int, ...], list[int]]:
        """Timesteps of a rollout from the grid's first through its `stops`, and the stops' places among them.

        `stops` are rising indices of the grid. None: every timestep of the grid. Otherwise equal steps to
        each stop, of such a size that `num_steps` would cross the whole schedule.
        """
        if num_steps is None:
            return self.timesteps[: stops[-1] + 1], list(stops)
        timesteps, places = [self.timesteps[0]], []
        for stop in stops:
            start, end = timesteps[-1], self.timesteps[stop]
            count = math.ceil((start - end) * num_steps / len(self.alphas_cumprod))
            timesteps += [round(start + (end - start) * i / count) for i in range(1, count + 1)]
            places.append(len(timesteps) - 1)
        return tuple(timesteps), places

    def predict_x0(self, latents: Tensor, output: Tensor, timestep: int) -> Tensor:
        """x0 of latents x_t and the network's output, both (B, C, h, w)."""
        return self.parameterisation.x0(latents, output, self.alphas_cumprod[timestep])

    def x0_slope(self, timestep: int) -> float:
        """|d x0 / d output| at a timestep."""
        return self.parameterisation.x0_slope(self.alphas_cumprod[timestep])

    def step(
        self,
        timesteps: Sequence[int],
        index: int,
        latents: Tensor,
        x0: Tensor,
        noise: Tensor,
        sampler: str = "ddpm",
        previous_x0: Tensor | None = None,
    ) -> Tensor:
        """Latents at timesteps[index + 1] from those at timesteps[index], given standard normal noise.

        All tensors are (B, C, h, w). `previous_x0` was predicted at timesteps[index - 1]; second-order
        samplers need it wherever there is one.
        """
        abar, abar_next = (self.alphas_cumprod[timestep] for timestep in timesteps[index : index + 2])
        if SAMPLERS[sampler].is_second_order and previous_x0 is not None:
            abar_previous = self.alphas_cumprod[timesteps[index - 1]]
            x0 = extrapolated_x0(x0, previous_x0, abar_previous, abar, abar_next)
        return SAMPLERS[sampler].step(latents, x0, abar, abar_next, noise)

    def renoise(self, x0: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """x_t of x0, given standard normal noise; all (B, C, h, w)."""
        abar = self.alphas_cumprod[timestep]
        return abar**0.5 * x0 + (1 - abar) ** 0.5 * noise

    def training_target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network is trained to predict at training timesteps (B,)."""
        abar = self.training_alphas_cumprod[timesteps].view(-1, *[1] * (x0.ndim - 1))
        return self.parameterisation.target(x0, noise, abar)

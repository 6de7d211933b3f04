"""Samplers of the rollout: one step between two noise levels, as a function of the given noise.

Add one: write a function with the signature of `ddpm_step` and name it in `SAMPLERS`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sampler:
    """How a rollout gets from one noise level to the next."""

    step: Callable[[Tensor, Tensor, float, float, Tensor], Tensor]
    """(x_t, predicted x0, abar_t, abar of the next step, noise) -> latents of the next step"""
    is_second_order: bool = False
    """Whether `step` is given `extrapolated_x0` in place of x0, from the second step on."""


def ddpm_step(latents: Tensor, x0: Tensor, abar: float, abar_next: float, noise: Tensor) -> Tensor:
    """x_{t-1} ~ q(x_{t-1} | x_t, x0) (Ho et al. 2020, eq. 7); the last step, abar_next = 1, adds no noise.

    On any grid of timesteps it is DDIM's step with eta = 1.
    """
    alpha = abar / abar_next
    x0_weight = abar_next**0.5 * (1 - alpha) / (1 - abar)
    latents_weight = alpha**0.5 * (1 - abar_next) / (1 - abar)
    std = ((1 - abar_next) / (1 - abar) * (1 - alpha)) ** 0.5
    return x0_weight * x0 + latents_weight * latents + std * noise


def ddim_step(latents: Tensor, x0: Tensor, abar: float, abar_next: float, noise: Tensor) -> Tensor:
    """DDIM with eta = 0 (Song et al. 2021, eq. 12), which uses no noise."""
    latents_weight = ((1 - abar_next) / (1 - abar)) ** 0.5
    return (abar_next**0.5 - latents_weight * abar**0.5) * x0 + latents_weight * latents


def extrapolated_x0(
    x0: Tensor, previous_x0: Tensor, abar_previous: float, abar: float, abar_next: float
) -> Tensor:
    """x0 half a step ahead, on the line through the previous step's x0 and this one's over log(SNR).

    With it DDIM's step is DPM-Solver++(2M) (Lu et al. 2022, alg. 2), and DDPM's its stochastic variant.
    """
    previous, now, ahead = (math.log(a / (1 - a)) for a in (abar_previous, abar, abar_next))
    return x0 + 0.5 * (ahead - now) / (now - previous) * (x0 - previous_x0)


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm_step),
    "ddim": Sampler(ddim_step),
    "dpm++": Sampler(ddim_step, is_second_order=True),
    "dpm++sde": Sampler(ddpm_step, is_second_order=True),
}

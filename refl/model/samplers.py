"""Samplers of the rollout: one step between two noise levels, as a function of the given noise.

Add one: write a function with the signature of `ddpm_step` and name it in `SAMPLERS`.
"""

from collections.abc import Callable

from torch import Tensor

# (x_t, predicted x0, abar_t, abar of the next step, noise) -> latents of the next step
Sampler = Callable[[Tensor, Tensor, float, float, Tensor], Tensor]


def ddpm_step(latents: Tensor, x0: Tensor, abar: float, abar_next: float, noise: Tensor) -> Tensor:
    """x_{t-1} ~ q(x_{t-1} | x_t, x0) (Ho et al. 2020, eq. 7); the last step, abar_next = 1, adds no noise."""
    alpha = abar / abar_next
    x0_weight = abar_next**0.5 * (1 - alpha) / (1 - abar)
    latents_weight = alpha**0.5 * (1 - abar_next) / (1 - abar)
    std = ((1 - abar_next) / (1 - abar) * (1 - alpha)) ** 0.5
    return x0_weight * x0 + latents_weight * latents + std * noise


SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm_step}

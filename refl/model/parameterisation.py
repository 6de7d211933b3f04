"""What a diffusion network predicts. Add one: write its three functions and name it in `PARAMETERISATIONS`.

Names are diffusers' `prediction_type`; x_t = sqrt(abar) x0 + sqrt(1 - abar) noise.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Parameterisation:
    """How the network's output relates to x0 and noise."""

    x0: Callable[[Tensor, Tensor, float], Tensor]  # (x_t, output, abar) -> predicted x0
    x0_slope: Callable[[float], float]  # abar -> |d x0 / d output|
    target: Callable[[Tensor, Tensor, Tensor], Tensor]  # (x0, noise, abar) -> output to be learned


def _x0_from_epsilon(latents: Tensor, epsilon: Tensor, abar: float) -> Tensor:
    """x0 = (x_t - sqrt(1 - abar) eps) / sqrt(abar) (Ho et al. 2020, eq. 15)."""
    return (latents - (1 - abar) ** 0.5 * epsilon) / abar**0.5


EPSILON = Parameterisation(
    x0=_x0_from_epsilon,
    x0_slope=lambda abar: (1 / abar - 1) ** 0.5,
    target=lambda x0, noise, abar: noise,
)

PARAMETERISATIONS = {"epsilon": EPSILON}

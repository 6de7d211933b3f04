"""The gradient plan: which denoising steps of a rollout get a gradient.

Add one: write a function with the signature of `late_step` and name it in `PLANS`. A plan is a pure function
of seed, step and micro-step, so that all processes share it and a resumed run repeats it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from refl.model.noise_schedule import NoiseSchedule
from refl.system import randomness
from refl.train.options import Options


@dataclass(frozen=True)
class Plan:
    """Denoising steps that get a gradient, counted from 0; the rollout stops at the last of them."""

    steps: tuple[int, ...]
    weight: float = 1.0  # factor on the gradient

    @property
    def stop(self) -> int:
        """The denoising step whose predicted x0 is decoded and scored."""
        return self.steps[-1]


def late_step(options: Options, schedule: NoiseSchedule, step: int, micro_step: int) -> Plan:
    """ReFL: one step, uniform in [min_stop, max_stop]; its weight is mean slope / slope if so asked."""
    stops = range(options.min_stop, options.max_stop + 1)
    stop = randomness.stop_index(options.seed, step, micro_step, options.min_stop, options.max_stop)
    if not options.normalize_by_stop:
        return Plan((stop,))
    mean_slope = sum(schedule.x0_slope(k) for k in stops) / len(stops)
    return Plan((stop,), mean_slope / schedule.x0_slope(stop))


PLANS: dict[str, Callable[[Options, NoiseSchedule, int, int], Plan]] = {"late_step": late_step}

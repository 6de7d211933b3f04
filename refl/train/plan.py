"""The gradient plan: how a rollout goes from noise to x0, and which of its steps get a gradient.

Add one: write a function with the signature of `late_step` and name it in `PLANS`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from refl.model.noise_schedule import NoiseSchedule
from refl.system import randomness
from refl.train.options import Options


@dataclass(frozen=True)
class Term:
    """One term of the gradient: the x0 that a step predicts is scored, and the gradient flows through this
    step and the `depth` - 1 before it."""

    step: int  # of the rollout, counted from 0
    stop: int  # index of its timestep in the grid of --num_inference_steps
    depth: int = 1
    weight: float = 1.0  # factor on the gradient

    @property
    def steps(self) -> range:
        """Steps of the rollout that the gradient flows through."""
        return range(self.step - self.depth + 1, self.step + 1)


@dataclass(frozen=True)
class Plan:
    """A rollout and the terms of its gradient, which are averaged."""

    timesteps: tuple[int, ...]  # of its steps, falling; where one repeats, the first x0 there is noised anew
    terms: tuple[Term, ...]
    sampler: str = "ddpm"

    @property
    def gradient_steps(self) -> set[int]:
        """Steps that get a gradient, counted from 0."""
        return {step for term in self.terms for step in term.steps}


def to_stop(schedule: NoiseSchedule, stop: int) -> Plan:
    """DDPM along the grid of --num_inference_steps to index `stop`, which gets the gradient."""
    return Plan(schedule.timesteps[: stop + 1], (Term(stop, stop),))


def draw_plan(options: Options, schedule: NoiseSchedule, step: int, micro_step: int) -> Plan:
    """The plan of a micro-batch: a function of seed, step and micro-step, so that all processes share it and
    a resumed run repeats it."""
    key, bounds = (options.seed, step, micro_step), (options.min_stop, options.max_stop)
    number = _num_stops(options)
    if number == 1:
        stops = [randomness.stop_index(*key, *bounds)]
    else:
        stops = randomness.stop_indices(*key, *bounds, number)
    return PLANS[options.plan](options, schedule, stops)


def possible_plans(options: Options, schedule: NoiseSchedule) -> Iterator[Plan]:
    """Yield all plans that may be drawn; they are equally likely."""
    for stops in combinations(range(options.min_stop, options.max_stop + 1), _num_stops(options)):
        yield PLANS[options.plan](options, schedule, stops)


def _num_stops(options: Options) -> int:
    return options.num_gradient_steps if options.plan == "several_stops" else 1


def late_step(options: Options, schedule: NoiseSchedule, stops: Sequence[int]) -> Plan:
    """ReFL (Xu et al. 2023): a rollout to the stop, which gets the gradient. Several stops: each gets one.

    A term is weighted by mean slope / slope if so asked.
    """
    timesteps, places = schedule.path(stops, options.rollout_steps)
    terms = [
        Term(step, stop, weight=_weight(options, schedule, stop))
        for step, stop in zip(places, stops, strict=True)
    ]
    return Plan(timesteps, tuple(terms), options.rollout_sampler)


def draft_k(options: Options, schedule: NoiseSchedule, stops: Sequence[int]) -> Plan:
    """DRaFT-K (Clark et al. 2023): one gradient through the last K steps to the stop."""
    plan = late_step(options, schedule, stops)
    [term] = plan.terms
    return replace(plan, terms=(replace(term, depth=min(options.num_gradient_steps, term.step + 1)),))


def draft_lv(options: Options, schedule: NoiseSchedule, stops: Sequence[int]) -> Plan:
    """DRaFT-LV (Clark et al. 2023): the stop, and its noise level again after its x0 is noised anew."""
    plan = late_step(options, schedule, stops)
    [term] = plan.terms
    terms = tuple(replace(term, step=term.step + i) for i in range(options.num_gradient_steps))
    timesteps = plan.timesteps + plan.timesteps[-1:] * (len(terms) - 1)
    return replace(plan, terms=terms, timesteps=timesteps)


PLANS: dict[str, Callable[[Options, NoiseSchedule, Sequence[int]], Plan]] = {
    "late_step": late_step,
    "several_stops": late_step,
    "draft_k": draft_k,
    "draft_lv": draft_lv,
}


def _weight(options: Options, schedule: NoiseSchedule, stop: int) -> float:
    if not options.normalize_by_stop:
        return 1.0
    slopes = {
        k: schedule.x0_slope(schedule.timesteps[k]) for k in range(options.min_stop, options.max_stop + 1)
    }
    return sum(slopes.values()) / len(slopes) / slopes[stop]

"""Early stopping when the trained reward rises while image quality falls.

A reward model is a proxy. Optimised for too long, it is satisfied by images that nobody wants, and its own
value does not show it. Three other measures do, on prompts outside the training set: rewards that are not
trained on, the diversity of a prompt's images, and the share of saturated colours. Every validation uses the
same noise, so two validations are compared prompt by prompt. A measure is worse if a paired test rules out
chance, and training stops after two such validations in a row.
"""

import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats

SIGNIFICANCE = 0.01  # of the one-sided test: one false alarm in a hundred comparisons
MIN_DIFFERENCE = 1e-6  # smaller differences are rounding
IN_A_ROW = 2  # validations; a single one is too often worse by chance, since the best so far was also lucky
MIN_DIVERSITY = 0.25  # of the base model's; some loss is right, since correct images resemble each other
MAX_SATURATED = 0.05  # share of colour values, beyond the base model's


@dataclass
class ValidationMeans:
    """Results of one validation: means over the images of each prompt, one value per prompt."""

    step: int
    rewards: list[float]  # of the trained reward
    saturated: list[float]  # share of colour values that are 0 or 255, in [0, 1]
    held_out: list[float] | None = None  # of the held-out rewards
    diversity: list[float] | None = None

    @property
    def quality(self) -> float:
        """Mean that selects the best validation: of the held-out rewards if there are any."""
        return float(np.mean(self.rewards if self.held_out is None else self.held_out))


@dataclass
class Guard:
    """Early stopping: compares each validation with the base model's and with the best so far."""

    base: ValidationMeans | None = None
    best: ValidationMeans | None = None
    worse: int = 0  # validations in a row in which the reward rose and another measure got worse
    reason: str | None = None  # why training should stop; None: it should not

    def update(self, validation: ValidationMeans) -> bool:
        """Record a validation and return whether it is the best so far; set `reason` when training should
        stop. Validations that are not finite are ignored."""
        means = [validation.quality, np.mean(validation.rewards), np.mean(validation.saturated)]
        if not np.isfinite(means).all():
            return False
        if self.base is None:
            self.base = self.best = validation
            return True
        problems = self._problems(validation)
        is_hacked = problems and np.mean(validation.rewards) > np.mean(self.best.rewards)
        self.worse = self.worse + 1 if is_hacked else 0
        if self.worse >= IN_A_ROW:
            self.reason = "the reward still rises, but " + " and ".join(problems)
        if problems or validation.quality <= self.best.quality:
            return False
        self.best = validation
        return True

    def _problems(self, validation: ValidationMeans) -> list[str]:
        """Describe each measure that is significantly worse."""
        base, best, problems = self.base, self.best, []
        if validation.held_out is not None and is_lower(validation.held_out, best.held_out):
            problems.append(
                f"the held-out reward fell from {np.mean(best.held_out):+.3f} (step {best.step}) to "
                f"{np.mean(validation.held_out):+.3f}"
            )
        if validation.diversity is not None and is_lower(validation.diversity, base.diversity):
            ratio = np.mean(validation.diversity) / np.mean(base.diversity)
            if ratio < MIN_DIVERSITY:
                problems.append(f"diversity fell to {ratio:.0%} of the base model's")
        if is_lower(np.array(base.saturated) + MAX_SATURATED, validation.saturated):
            problems.append(
                f"saturated colours rose from {np.mean(base.saturated):.0%} to "
                f"{np.mean(validation.saturated):.0%}"
            )
        return problems

    def state(self) -> dict:
        """Return the state as JSON values."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict) -> "Guard":
        """Restore a guard from `state()`; {} gives a new one. Raises `TypeError` or `ValueError` for other
        values."""
        validations = {name: state.get(name) and ValidationMeans(**state[name]) for name in ("base", "best")}
        for validation in filter(None, validations.values()):
            operator.index(validation.step)
            for name in ("rewards", "saturated", "held_out", "diversity"):
                values = getattr(validation, name)
                if values is not None:
                    list(map(float, values))
        return cls(**validations, worse=state.get("worse", 0), reason=state.get("reason"))


def is_lower(values: Sequence[float], reference: Sequence[float]) -> bool:
    """Whether the mean of `values` is significantly below that of `reference`: Student's paired, one-sided
    t test."""
    difference = np.asarray(values, float) - np.asarray(reference, float)
    if len(difference) < 2:
        return False
    standard_error = difference.std(ddof=1) / len(difference) ** 0.5
    quantile = stats.t.ppf(1 - SIGNIFICANCE, len(difference) - 1)
    return bool(difference.mean() < -max(quantile * standard_error, MIN_DIFFERENCE))

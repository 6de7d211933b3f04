"""When to stop: the reward that is trained still rises, and what it stands for gets worse.

A reward model is a proxy. Optimised for too long it is satisfied by images that nobody wants, and its own
value does not tell. Three things do, on prompts that are not trained on: rewards that are not trained on,
images of a prompt that become all alike, and colours driven to their limits. Each validation draws from the
same noise, so two of them are compared prompt by prompt, and "worse" means worse beyond what the spread of
these differences explains by chance, in two validations in a row.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

Z = 2.326  # of a one-sided test that is wrong once in a hundred times
IN_A_ROW = 2  # validations; one alone is too often worse by chance, the best so far being the luckiest
MIN_DIVERSITY = 0.25  # of the base model's; much is lost rightly, since right images are more alike
MAX_SATURATED = 0.05  # share of colour values, beyond the base model's


@dataclass
class Seen:
    """What one validation found: means over the images of each prompt."""

    step: int
    rewards: list[float]  # of each prompt, trained on
    saturated: list[float]  # of each prompt
    held_out: list[float] | None = None  # of each prompt, not trained on
    diversity: list[float] | None = None  # of each prompt

    @property
    def quality(self) -> float:
        """What the best is chosen by."""
        return float(np.mean(self.rewards if self.held_out is None else self.held_out))


@dataclass
class Guard:
    """Remembers the base model's validation and the best one."""

    base: Seen | None = None
    best: Seen | None = None
    worse: int = 0  # validations in a row that found the reward risen and something else worse
    reason: str | None = None  # to stop, once there is one

    def look(self, seen: Seen) -> bool:
        """Whether this validation is the best so far; sets `reason` when it is time to stop."""
        if not np.isfinite([seen.quality, np.mean(seen.rewards), np.mean(seen.saturated)]).all():
            return False
        if self.base is None:
            self.base = self.best = seen
            return True
        complaints = self._complaints(seen)
        is_hacked = complaints and np.mean(seen.rewards) > np.mean(self.best.rewards)
        self.worse = self.worse + 1 if is_hacked else 0
        if self.worse >= IN_A_ROW:
            self.reason = "the reward still rises, but " + " and ".join(complaints)
        if complaints or seen.quality <= self.best.quality:
            return False
        self.best = seen
        return True

    def _complaints(self, seen: Seen) -> list[str]:
        """What got worse beyond noise, in words."""
        base, best, complaints = self.base, self.best, []
        if seen.held_out is not None and is_lower(seen.held_out, best.held_out):
            complaints.append(
                f"the held-out reward fell from {np.mean(best.held_out):+.3f} (step {best.step}) to "
                f"{np.mean(seen.held_out):+.3f}"
            )
        if seen.diversity is not None and is_lower(seen.diversity, base.diversity):
            left = np.mean(seen.diversity) / np.mean(base.diversity)
            if left < MIN_DIVERSITY:
                complaints.append(f"diversity fell to {left:.0%} of what it was")
        if is_lower(np.array(base.saturated) + MAX_SATURATED, seen.saturated):
            complaints.append(
                f"saturated colours rose from {np.mean(base.saturated):.0%} to {np.mean(seen.saturated):.0%}"
            )
        return complaints

    def state(self) -> dict:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict) -> "Guard":
        """What `state` gave."""
        seen = {name: state.get(name) and Seen(**state[name]) for name in ("base", "best")}
        return cls(**seen, worse=state.get("worse", 0), reason=state.get("reason"))


def is_lower(values: Sequence[float], reference: Sequence[float]) -> bool:
    """Whether `values` are lower in the mean than `reference`, pair by pair, beyond chance: Student's paired,
    one-sided test."""
    difference = np.asarray(values, float) - np.asarray(reference, float)
    if len(difference) < 2:
        return False
    error = difference.std(ddof=1) / len(difference) ** 0.5
    return bool(difference.mean() < -t_quantile(len(difference) - 1) * error) and difference.mean() < -1e-6


def t_quantile(freedom: int) -> float:
    """That of Student's t where the normal's is `Z` (Abramowitz and Stegun 1964, 26.7.5; 2 % too low at 3
    degrees of freedom, exact to three digits from 10 on)."""
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
    )
    return Z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))

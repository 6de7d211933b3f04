"""Statistics of an evaluation: bootstrap intervals over prompts, and counts of wins, ties and losses.

The images of one prompt resemble each other, so prompts are resampled, each with all of its images.
"""

import numpy as np
from scipy import stats

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
MAX_VALUES = 1_000_000  # resampled values in memory at once, 8 MB


def bootstrap(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Mean and ends of the percentile interval (Efron 1979), (3, ...), of values (num_prompts, ...).

    Each resample takes the same prompts for all columns, so columns can be compared.
    """
    mean = values.mean(0)
    if len(values) < 2:
        return np.stack([mean] * 3)
    interval = stats.bootstrap(
        (values,),
        np.mean,
        axis=0,
        method="percentile",
        vectorized=True,
        confidence_level=CONFIDENCE,
        n_resamples=NUM_RESAMPLES,
        batch=max(1, MAX_VALUES // values.size),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return np.stack([mean, *interval])


def outcomes(difference: np.ndarray, margin: float) -> dict[str, int]:
    """Number of differences above `margin`, within it, and below `-margin`."""
    win, loss = int((difference > margin).sum()), int((difference < -margin).sum())
    return {"win": win, "tie": difference.size - win - loss, "loss": loss}

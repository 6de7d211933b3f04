"""What the mean over some prompts says of the mean over all such prompts: bootstrap intervals.

Images of one prompt are alike, so prompts are what is drawn again, each with all of its images.
"""

import numpy as np

NUM_RESAMPLES = 10_000
LEVEL = 0.95
MAX_COUNTS = 2_000_000  # numbers in memory at once


def bootstrap(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Mean, low and high end of the percentile interval (Efron 1979), (3, ...), of values (num_prompts, ...).

    The prompts are drawn once for all columns, so that columns may be compared.
    """
    num_prompts = len(values)
    columns = values.reshape(num_prompts, -1)
    generator = np.random.default_rng(seed)
    rows = max(1, MAX_COUNTS // num_prompts)
    means = np.concatenate([
        _counts(generator, min(rows, NUM_RESAMPLES - start), num_prompts) @ columns / num_prompts
        for start in range(0, NUM_RESAMPLES, rows)
    ])  # fmt: skip
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return np.stack([columns.mean(0), low, high]).reshape(3, *values.shape[1:])


def _counts(generator: np.random.Generator, rows: int, num_prompts: int) -> np.ndarray:
    """How often each prompt is in each of `rows` resamples, (rows, num_prompts)."""
    drawn = generator.integers(num_prompts, size=(rows, num_prompts))
    drawn += np.arange(rows)[:, None] * num_prompts
    return np.bincount(drawn.ravel(), minlength=rows * num_prompts).reshape(rows, num_prompts).astype(float)


def outcomes(difference: np.ndarray, margin: float) -> dict[str, int]:
    """How many differences are above `margin`, within it, and below it."""
    win, loss = int((difference > margin).sum()), int((difference < -margin).sum())
    return {"win": win, "tie": difference.size - win - loss, "loss": loss}

"""Every random draw of training, as a pure function of what it is for.

Nothing here has a state: the draw for one sample depends on (purpose, seed, optimizer step, micro-step, index
of the sample among those of all processes) and on nothing else. So a resumed run repeats the uninterrupted
one, and N processes with batch B see what one process with batch N*B sees. Draws are made on the CPU, the
same for every device.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

NOISE, STOP, PROMPTS, VALIDATION, PRETRAINING, TIMESTEPS = range(
    6
)  # purposes, so that no two kinds of draw share a stream


def noise(key: Sequence[int], indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, (len(indices), *shape) float32; row i depends on `key` and `indices[i]`
    alone."""
    rows = [
        np.random.default_rng([*key, index]).standard_normal(shape, dtype=np.float32) for index in indices
    ]
    return torch.from_numpy(np.stack(rows))


def stop_index(seed: int, step: int, micro_step: int, min_stop: int, max_stop: int) -> int:
    """Index of the denoising step that gets the gradient, uniform in [min_stop, max_stop], the same on every
    process."""
    return int(
        np.random.default_rng([STOP, seed, step, micro_step]).integers(min_stop, max_stop, endpoint=True)
    )


def timesteps(key: Sequence[int], indices: Sequence[int], num_timesteps: int) -> Tensor:
    """A training timestep, uniform in [0, num_timesteps), for each index, (len(indices),) int64."""
    drawn = [np.random.default_rng([*key, index]).integers(num_timesteps) for index in indices]
    return torch.tensor(drawn)


def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """Order of `length` prompts in one pass over them."""
    return np.random.default_rng([PROMPTS, seed, epoch]).permutation(length)

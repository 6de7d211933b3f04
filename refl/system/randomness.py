"""Every random draw of training, as a pure function of its key.

Randomness is stateless: the draw for a sample is seeded by (stream, seed, optimizer step, micro-step, index
of the sample among those of all processes) and depends on nothing else. So a resumed run repeats the
uninterrupted one, and N processes with batch B see what one process with batch N*B sees. Draws are made on
the CPU and are the same for every device.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """Streams of random numbers, one for each purpose. Saved runs depend on the values."""

    NOISE = 0
    STOP = 1
    PROMPTS = 2
    VALIDATION = 3
    PRETRAINING = 4
    TIMESTEPS = 5


def noise(key: Sequence[int], indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, (len(indices), *shape) float32; row i depends on `key` and `indices[i]` only."""
    rows = [
        np.random.default_rng([*key, index]).standard_normal(shape, dtype=np.float32) for index in indices
    ]
    return torch.from_numpy(np.stack(rows))


def stop_index(seed: int, step: int, micro_step: int, min_stop: int, max_stop: int) -> int:
    """Index of the denoising step that gets a gradient, uniform in [min_stop, max_stop]; the same on every
    process."""
    generator = np.random.default_rng([Stream.STOP, seed, step, micro_step])
    return int(generator.integers(min_stop, max_stop, endpoint=True))


def stop_indices(
    seed: int, step: int, micro_step: int, min_stop: int, max_stop: int, number: int
) -> list[int]:
    """`number` different ones, rising, as `stop_index` draws one."""
    generator = np.random.default_rng([Stream.STOP, seed, step, micro_step])
    stops = generator.choice(range(min_stop, max_stop + 1), size=number, replace=False)
    return sorted(stops.tolist())


def timesteps(key: Sequence[int], indices: Sequence[int], num_timesteps: int) -> Tensor:
    """Training timesteps, uniform in [0, num_timesteps), (len(indices),) int64."""
    drawn = [np.random.default_rng([*key, index]).integers(num_timesteps) for index in indices]
    return torch.tensor(drawn)


def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """Order of `length` prompts in one pass over them."""
    return np.random.default_rng([Stream.PROMPTS, seed, epoch]).permutation(length)

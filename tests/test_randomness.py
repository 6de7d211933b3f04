"""Draws are pure functions of their keys."""

from collections import Counter

from refl.system import randomness
from refl.system.randomness import Stream

import torch


def test_noise_belongs_to_its_sample():
    key, shape = (Stream.NOISE, 0, 5, 1), (3, 4, 8, 8)
    together = randomness.noise(key, range(4), shape)
    assert torch.equal(together[2:], randomness.noise(key, [2, 3], shape))
    assert torch.equal(together[:, :2], randomness.noise(key, range(4), (2, 4, 8, 8)))  # a shorter rollout
    assert together.dtype == torch.float32 and abs(together.std() - 1) < 0.05


def test_no_two_draws_are_the_same():
    keys = [
        (stream, seed, step, micro)
        for stream in (Stream.NOISE, Stream.VALIDATION)
        for seed in (0, 1)
        for step in (0, 1)
        for micro in (0, 1)
    ]
    rows = torch.cat([randomness.noise(key, range(3), (4,)) for key in keys])
    assert len(rows.unique(dim=0)) == len(rows)


def test_stop_index_is_uniform_and_inclusive():
    stops = Counter(randomness.stop_index(0, step, 0, 30, 39) for step in range(5000))
    assert sorted(stops) == list(range(30, 40))
    assert all(400 < count < 600 for count in stops.values())
    assert randomness.stop_index(0, 0, 0, 7, 7) == 7


def test_a_stream_draws_what_its_number_draws():
    """Runs saved before `Stream` resume with the same numbers."""
    assert [*map(int, Stream)] == [0, 1, 2, 3, 4, 5]
    named = randomness.noise((Stream.VALIDATION, 7), [2], (4,))
    assert torch.equal(named, randomness.noise((3, 7), [2], (4,)))

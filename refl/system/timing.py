"""Seconds by phase, measured without waiting for the GPU."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch


class Phases:
    """Adds up the seconds of each named phase since the last `pop`; on a GPU by CUDA events."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.spans = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Context manager that adds its block to a phase."""
        start = self._now()
        yield
        self.spans.append((name, start, self._now()))

    def pop(self) -> dict[str, float]:
        """Seconds by phase; waits for the GPU."""
        seconds = defaultdict(float)
        if self.cuda:
            torch.cuda.synchronize()
        for name, start, end in self.spans:
            seconds[name] += start.elapsed_time(end) / 1000 if self.cuda else end - start
        self.spans.clear()
        return dict(seconds)

    def _now(self):
        if not self.cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

"""Seconds of the one exchange that processes make in an optimizer step: the LoRA's gradient, averaged.

torchrun --nproc_per_node 2 benchmarks/reduce.py                # SD-1.4's LoRA of rank 4: 797,184 values
torchrun --nproc_per_node 8 benchmarks/reduce.py --values 12754944
"""

import statistics
import time
from dataclasses import dataclass

import torch
import tyro
from accelerate import Accelerator


@dataclass
class Options:
    """Time the reduction of a gradient over the processes."""

    values: int = 797_186
    """Float32 values: the LoRA's, the loss, and whether someone was told to stop."""
    repeats: int = 50
    """Reductions that count."""


def main() -> None:
    """Median and extremes, by the first process's clock."""
    options = tyro.cli(Options, use_underscores=True)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    flat, seconds = torch.ones(options.values, device=accelerator.device), []
    for _ in range(5 + options.repeats):
        accelerator.wait_for_everyone()
        started = time.perf_counter()
        mean = accelerator.reduce(flat, reduction="mean")
        assert mean[0].item() == 1  # and with it the GPU's work is over
        seconds.append(time.perf_counter() - started)
    own = sorted(seconds[5:])
    accelerator.print(
        f"{options.values * 4 / 1e6:.1f} MB, {accelerator.num_processes} processes on "
        f"{accelerator.device.type}: median {statistics.median(own) * 1e3:.2f} ms, "
        f"{own[0] * 1e3:.2f} to {own[-1] * 1e3:.2f}"
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()

"""Time the only exchange between processes in an optimizer step: the average of the LoRA's gradient.

torchrun --nproc_per_node 2 benchmarks/reduce.py                # SD-1.4's LoRA of rank 4: 797,184 values
torchrun --nproc_per_node 8 benchmarks/reduce.py --values 12754944
"""

import statistics
import time
from dataclasses import dataclass

import torch
import tyro
from accelerate import Accelerator

WARM_UP = 5  # reductions


@dataclass
class Options:
    """Time the average of a gradient over all processes."""

    values: int = 797_186
    """Float32 values: the LoRA's gradient, the loss, and whether a process was told to stop."""
    repeats: int = 50
    """Reductions that are timed, after 5 that are not."""


def main() -> None:
    """Print median and extremes, by the first process's clock."""
    options = tyro.cli(Options, use_underscores=True)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    flat, seconds = torch.ones(options.values, device=accelerator.device), []
    for _ in range(WARM_UP + options.repeats):
        accelerator.wait_for_everyone()
        started = time.perf_counter()
        mean = accelerator.reduce(flat, reduction="mean")
        assert mean[0].item() == 1  # also waits for the GPU
        seconds.append(time.perf_counter() - started)
    timed = sorted(seconds[WARM_UP:])
    accelerator.print(
        f"{options.values * 4 / 1e6:.1f} MB, {accelerator.num_processes} processes on "
        f"{accelerator.device.type}: median {statistics.median(timed) * 1e3:.2f} ms, "
        f"{timed[0] * 1e3:.2f} to {timed[-1] * 1e3:.2f}"
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()

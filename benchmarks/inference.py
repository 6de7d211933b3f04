"""Compare inference with a LoRA with the plain diffusers call: images per second, in alternation, same noise.

python benchmarks/inference.py                                    # the demo world
python benchmarks/inference.py --checkpoint checkpoint/stable-diffusion-v1-4 --lora_path checkpoint/refl_lora
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from refl.model.lora import (
    LORA_FILE,
    add_lora,
    lora_file,
    pack_lora,
)
from refl.model.pipeline import (
    generate,
    load_lora,
    load_pipeline,
)
from refl.model.stable_diffusion import load_stable_diffusion
from refl.system import devices
from refl.system.files import write_whole

import torch
import tyro
from diffusers import StableDiffusionPipeline
from step import machine, peak_memory, reset_peak_memory, synchronize
from tqdm import tqdm


@dataclass
class Options:
    """Time our inference and the plain diffusers call."""

    checkpoint: str = "demo/checkpoint/stable-diffusion-v1-4"
    """Folder of the model."""
    lora_path: str | None = None
    """LoRA to load; None: a LoRA with random values."""
    batch_size: int = 10
    """Images at once."""
    num_inference_steps: int = 20
    """Denoising steps."""
    rounds: int = 5
    """Timed batches of each, after one that is not timed."""


def write_random_lora(checkpoint: str) -> Path:
    """Write a LoRA with random values for the model in `checkpoint`; returns its folder."""
    parts = load_stable_diffusion(checkpoint, torch.float32, "cpu")
    with torch.no_grad():
        for matrix in add_lora(parts.unet, 4, 4, 0):
            matrix.normal_(std=0.02)
    folder = ROOT / "result/benchmarks/inference_lora"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / LORA_FILE, pack_lora(parts.unet, {}))
    return folder


def load_plain(
    checkpoint: str, lora_path: str | Path, dtype: torch.dtype, device: torch.device
) -> StableDiffusionPipeline:
    """Load diffusers' pipeline and the LoRA as diffusers does by itself."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        checkpoint, dtype=dtype, safety_checker=None, local_files_only=True
    ).to(device)
    pipeline.load_lora_weights(str(lora_file(lora_path).parent), weight_name=LORA_FILE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def timed(draw: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, float, float]:
    """Call `draw`; return its images, seconds and peak memory in GiB."""
    reset_peak_memory(device)
    synchronize(device)
    started = time.perf_counter()
    images = draw()
    synchronize(device)
    return images, time.perf_counter() - started, peak_memory(device)


def main() -> None:
    """Draw with both in alternation and print a line for each."""
    options = tyro.cli(Options, use_underscores=True)
    device = devices.find(None)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    lora_path = options.lora_path or write_random_lora(options.checkpoint)
    ours = load_pipeline(options.checkpoint, "pndm", dtype, device)
    load_lora(ours, lora_path, 1.0)
    plain = load_plain(options.checkpoint, lora_path, dtype, device)
    prompts, steps = ["a red circle on a blue background"] * options.batch_size, options.num_inference_steps

    def draw_ours(seeds: range) -> torch.Tensor:
        return generate(ours, prompts, seeds, steps, 7.5)

    def draw_plain(seeds: range) -> torch.Tensor:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        images = plain(
            prompts, num_inference_steps=steps, guidance_scale=7.5, generator=generators, output_type="pt"
        ).images
        return images.float().cpu()

    draws = {"ours": draw_ours, "plain diffusers call": draw_plain}
    seconds = {name: [] for name in draws}
    memory = {name: [] for name in draws}
    for index in tqdm(range(1 + options.rounds), "drawing", unit="round"):
        seeds = range(index * len(prompts), (index + 1) * len(prompts))
        images = {}
        for name, draw in draws.items():
            images[name], time_taken, peak = timed(partial(draw, seeds), device)
            if index > 0:  # the first round includes start-up
                seconds[name].append(time_taken)
                memory[name].append(peak)
    one, other = images.values()
    print(f"{date.today()}, {machine()}: {options.batch_size} images at once, {steps} steps, {dtype}")
    for name in draws:
        rate = options.batch_size / statistics.median(seconds[name])
        print(f"{name}: {rate:.3g} images/s, peak {max(memory[name]):.2f} GiB")
    ratios = sorted(p / o for o, p in zip(*seconds.values(), strict=True))
    print(
        f"plain / ours, time: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); "
        f"pixels differ by at most {(one - other).abs().max().item():.1e}"
    )


if __name__ == "__main__":
    main()

"""Images per second of our drawing with a LoRA, and of the plain diffusers call, in turn, from one noise.

python benchmarks/inference.py                                    # the demo world
python benchmarks/inference.py --checkpoint checkpoint/stable-diffusion-v1-4 --lora_path checkpoint/refl_lora
"""

import statistics
import sys
import time
from dataclasses import dataclass
from datetime import date
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
    """Our drawing against the plain diffusers call."""

    checkpoint: str = "demo/checkpoint/stable-diffusion-v1-4"
    """Folder of the model."""
    lora_path: str | None = None
    """A LoRA; None: one with random values."""
    batch_size: int = 10
    """Images at once."""
    num_inference_steps: int = 20
    """Denoising steps."""
    rounds: int = 5
    """Batches of each that count, after one that does not."""


def main() -> None:
    """Both in turn; a line for each."""
    options = tyro.cli(Options, use_underscores=True)
    device = devices.find(None)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    lora_path = options.lora_path
    if lora_path is None:
        parts = load_stable_diffusion(options.checkpoint, torch.float32, "cpu")
        with torch.no_grad():
            for matrix in add_lora(parts.unet, 4, 4, 0):
                matrix.normal_(std=0.02)
        lora_path = ROOT / "result/benchmarks/inference_lora"
        lora_path.mkdir(parents=True, exist_ok=True)
        write_whole(lora_path / LORA_FILE, pack_lora(parts.unet, {}))
    ours = load_pipeline(options.checkpoint, "pndm", dtype, device)
    load_lora(ours, lora_path, 1.0)
    plain = StableDiffusionPipeline.from_pretrained(
        options.checkpoint, dtype=dtype, safety_checker=None, local_files_only=True
    ).to(device)
    plain.load_lora_weights(str(lora_file(lora_path).parent), weight_name=LORA_FILE)
    plain.set_progress_bar_config(disable=True)
    prompts, steps = ["a red circle on a blue background"] * options.batch_size, options.num_inference_steps

    def draw_ours(seed: int) -> torch.Tensor:
        return generate(ours, prompts, range(seed, seed + len(prompts)), steps, 7.5)

    def draw_plain(seed: int) -> torch.Tensor:
        generators = [torch.Generator("cpu").manual_seed(seed + index) for index in range(len(prompts))]
        images = plain(
            prompts, num_inference_steps=steps, guidance_scale=7.5, generator=generators, output_type="pt"
        ).images
        return images.float().cpu()

    found = {draw_ours: [], draw_plain: []}
    for index in tqdm(range(1 + options.rounds), "drawing", unit="round"):
        images = {}
        for draw, entries in found.items():
            reset_peak_memory(device)
            synchronize(device)
            started = time.perf_counter()
            images[draw] = draw(index * len(prompts))
            synchronize(device)
            entries.append((time.perf_counter() - started, peak_memory(device)))
        difference = (images[draw_ours] - images[draw_plain]).abs().max().item()
    print(f"{date.today()}, {machine()}: {options.batch_size} images at once, {steps} steps, {dtype}")
    for name, draw in (("ours", draw_ours), ("plain diffusers call", draw_plain)):
        seconds = statistics.median(entry[0] for entry in found[draw][1:])
        memory = max(entry[1] for entry in found[draw][1:])
        print(f"{name}: {options.batch_size / seconds:.3g} images/s, peak {memory:.2f} GiB")
    ratios = sorted(p[0] / o[0] for o, p in zip(found[draw_ours][1:], found[draw_plain][1:], strict=True))
    print(
        f"plain / ours, time: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); "
        f"pixels differ by at most {difference:.1e}"
    )


if __name__ == "__main__":
    main()

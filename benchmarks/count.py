"""FLOPs and memory of a training step and of inference at SD-1.4's size, counted without running anything.

python benchmarks/count.py                     # writes benchmarks/count.md

Operations run on tensors that have a shape but no content, in the architectures of SD-1.4 and ImageReward:
ours in refl's layers, the published step in the libraries' own, as one graph. On a GPU, CUDA itself (about
0.5 to 0.8 GiB) and what the allocator cannot hand out come on top; `python -m refl doctor` adds them.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from refl.model.drawing import DTYPES
from refl.model.lean import (
    lora_cast_once,
    make_lean,
)
from refl.model.stable_diffusion import decode
from refl.preflight import memory
from refl.reward import imagereward
from refl.system.files import write_whole
from refl.train.options import Options as TrainingOptions

import baseline_step
import torch
import tyro
from random_checkpoint import write_checkpoint
from step import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

STOPS = range(30, 40)  # the published ones
TEXT_ENCODER, VAE_ENCODER = 123_060_480, 34_163_664  # weights of SD-1.4 that are not counted as they run


@dataclass
class Options:
    """Count FLOPs and memory of SD-1.4 with ImageReward."""

    checkpoint: str = "result/benchmarks/sd14"
    """Weights of any content; only their shapes are read. Random ones are written if there are none."""
    output: str = "benchmarks/count.md"
    """Where the tables go."""


def inputs(size: int, resolution: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, a timestep, prompt embeddings."""
    side = resolution // 8
    latents = torch.empty(size, 4, side, side, dtype=dtype)
    return latents, torch.tensor(1), torch.empty(size, 77, 768, dtype=dtype)


def count_flops(folders: tuple[str, str], resolution: int) -> dict[str, float]:
    """TFLOP an image of each part of our step."""
    found = {}
    reward = imagereward.load_empty(folders[1])
    with memory.without_content(folders[0], 4, torch.float32) as base:
        unet, vae = base.unet, base.vae
        memory.empty(reward)
        for model in (unet, vae):
            make_lean(model)
        lora = [p for p in unet.parameters() if p.requires_grad]
        with flop_counter() as counter:

            def lap(name: str) -> None:
                found[name] = counter.get_total_flops() / 1e12 - sum(found.values())

            with torch.no_grad():
                unet(*inputs(1, resolution, torch.float32))
            lap("UNet forward")
            x0 = torch.empty(1, 4, resolution // 8, resolution // 8, requires_grad=True)
            images = decode(vae, x0)
            lap("decode")
            loss = reward(images.clamp(0, 1), [""]).sum()
            lap("reward")
            (gradient,) = torch.autograd.grad(loss, images)
            lap("reward backward")
            torch.autograd.grad(images, x0, gradient)
            lap("decode backward")
            eps = unet(*inputs(1, resolution, torch.float32)).sample
            lap("UNet forward with gradient")
            torch.autograd.grad(eps, lora, torch.empty_like(eps))
            lap("UNet backward")
    return found


def count_baseline(folders: tuple[str, str], resolution: int, batch_size: int, dtype: torch.dtype) -> float:
    """GiB of the published step: all weights, and one graph from the UNet to the loss.

    In half precision autocast is the CPU's; CUDA's also casts normalisations to float32, and keeps more.
    """
    reward = imagereward.load_empty(folders[1], dtype)
    with memory.without_content(folders[0], 4, dtype) as base:
        unet, vae = base.unet, base.vae
        memory.empty(reward)
        baseline_step.use_eager_attention(reward)
        lora = [p for p in unet.parameters() if p.requires_grad]

        def step() -> None:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                eps = unet(*inputs(batch_size, resolution, dtype)).sample
            images = decode(vae, eps.float()).clamp(0, 1)
            torch.autograd.grad(reward(images, [""] * batch_size).sum(), lora)

        weights = sum(p.nbytes for model in (unet, vae, reward) for p in model.parameters())
        weights += 3 * sum(p.nbytes for p in lora) + (TEXT_ENCODER + VAE_ENCODER) * dtype.itemsize
        return (weights + memory.peak_of(step)) / 2**30


class Launches(TorchDispatchMode):
    """Counts operations that compute or copy, each a kernel on a GPU or more, and the bytes they touch."""

    def __init__(self):
        super().__init__()
        self.number = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        known = {id(t.untyped_storage()) for t in given}
        is_new = any(id(t.untyped_storage()) not in known for t in made)
        if (is_new or function._schema.is_mutable) and "empty" not in str(function):
            self.number += 1
            self.bytes += sum(t.nbytes for t in given) + sum(t.nbytes for t in made)
        return result


def count_launches(folders: tuple[str, str], batch_size: int, is_lean: bool) -> tuple[int, float]:
    """Operations of one UNet forward at 512x512 in bfloat16 without gradient, and the GB that they touch."""
    with memory.without_content(folders[0], 4, torch.bfloat16) as base, torch.no_grad():
        unet = base.unet
        if is_lean:
            make_lean(unet)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=not is_lean),
            lora_cast_once(unet),
            Launches() as launches,
        ):
            unet(*inputs(batch_size, 512, torch.bfloat16))
    return launches.number, launches.bytes / 1e9


def count_inference(folders: tuple[str, str], batch_size: int, dtype: torch.dtype, is_plain: bool) -> float:
    """GiB of drawing images of 512x512 with guidance; `is_plain`: all decoded at once, in `dtype`."""
    with memory.without_content(folders[0], 4, dtype) as base, torch.no_grad():
        unet, vae = base.unet, base.vae
        if is_plain:
            memory.empty(vae, dtype)
        weights = sum(p.nbytes for model in (unet, vae) for p in model.parameters())
        weights += TEXT_ENCODER * dtype.itemsize + VAE_ENCODER * vae.dtype.itemsize
        x0 = torch.empty(batch_size if is_plain else 1, 4, 64, 64)
        parts = (lambda: unet(*inputs(2 * batch_size, 512, dtype)), lambda: decode(vae, x0))
        return (weights + max(memory.peak_of(run) for run in parts)) / 2**30


def main() -> None:
    """The three tables."""
    options = tyro.cli(Options, use_underscores=True)
    if not Path(options.checkpoint, "ImageReward.pt").exists():
        write_checkpoint(options.checkpoint, "full")
    folders = f"{options.checkpoint}/stable-diffusion-v1-4", options.checkpoint
    lines = [
        f"Counted on {date.today().isoformat()} by `python benchmarks/count.py`, torch {torch.__version__}.",
        "",
        "## TFLOP an image, by resolution",
        "",
    ]
    bar = tqdm(desc="counting", unit="case", total=23)
    flops = {}
    for resolution in (256, 512, 768):
        flops[resolution] = count_flops(folders, resolution)
        forwards = sum(STOPS) / len(STOPS) + 1  # the last one gives x0
        step = Counter(flops[resolution])
        step["rollout"] = step.pop("UNet forward") * forwards
        flops[resolution] |= {f"rollout, {forwards} UNet forwards": step["rollout"], "step": step.total()}
        bar.update()
    lines += ["| part | " + " | ".join(map(str, flops)) + " |", "|---|" + "---|" * len(flops)]
    for part in flops[512]:
        lines.append(f"| {part} | " + " | ".join(f"{own[part]:.3g}" for own in flops.values()) + " |")

    lines += ["", "## GiB of a training step, 8 images an optimizer step", ""]
    heads = "published, ported", "ours", "ours / published", "ours, `--low_memory`"
    lines += ["| pixels | batch | precision | " + " | ".join(heads) + " |", "|---|---|---|---|---|---|---|"]
    for resolution, precision, batch_size in (
        *((512, precision, batch_size) for precision in DTYPES for batch_size in (1, 2, 4, 8)),
        (256, "bf16", 1),
        (768, "bf16", 1),
    ):
        train = TrainingOptions(
            pretrained_model_name_or_path=folders[0],
            reward_path=folders[1],
            train_batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
        )
        dtype, ours = DTYPES[precision], []
        for train.low_memory in (False, True):
            counted = memory.count(train, dtype, resolution)
            ours.append(max(sum(sizes) for sizes in counted.values()))
        baseline = count_baseline(folders, resolution, batch_size, dtype)
        lines.append(
            f"| {resolution} | {batch_size} | {precision} | {baseline:.2f} | {ours[0]:.2f} "
            f"| {ours[0] / baseline:.0%} | {ours[1]:.2f} |"
        )
        bar.update()

    lines += ["", "## One UNet forward of a rollout, bf16, 512x512", ""]
    lines += ["| images | step | operations | GB touched | an image |", "|---|---|---|---|---|"]
    for batch_size in (1, 2, 8):
        for name, is_lean in (("published, ported", False), ("ours", True)):
            number, size = count_launches(folders, batch_size, is_lean)
            lines.append(f"| {batch_size} | {name} | {number} | {size:.1f} | {size / batch_size:.1f} |")
        bar.update()

    lines += ["", "## GiB of inference at 512x512, guided", ""]
    lines += ["| images at once | precision | plain diffusers call | ours |", "|---|---|---|---|"]
    for batch_size, precision in ((1, "fp16"), (10, "fp16"), (10, "fp32")):
        plain, ours = (
            count_inference(folders, batch_size, DTYPES[precision], is_plain) for is_plain in (True, False)
        )
        lines.append(f"| {batch_size} | {precision} | {plain:.2f} | {ours:.2f} |")
        bar.update()
    write_whole(options.output, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

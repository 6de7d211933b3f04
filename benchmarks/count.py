"""Count FLOPs and memory of a training step and of inference at SD-1.4's size, without computing anything.

python benchmarks/count.py                     # writes benchmarks/count.md

The architectures of SD-1.4 and ImageReward run on tensors that have a shape and no content: our step with
refl's layers, the published one with the libraries' layers and as one graph. On a GPU, CUDA itself (about 0.5
to 0.8 GiB) and fragmentation of its allocator add to the counts; `python -m refl doctor` includes them.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from refl.preflight import cost, memory
from refl.reward import imagereward
from refl.system.files import write_whole
from refl.train.options import Options as TrainingOptions

import baseline_step
import torch
import tyro
from diffusers import AutoencoderTiny
from random_checkpoint import write_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

PARTS = {  # field of `cost.Parts` -> row
    "unet": "UNet forward",
    "gradient": "UNet forward and backward to the LoRA",
    "chain": "UNet forward and backward to LoRA and latents",
    "decode": "decode",
    "decode_gradient": "decode forward and backward",
    "reward": "reward",
    "reward_gradient": "reward forward and backward",
}
FAST = json.loads((ROOT / "presets/fast.json").read_text())
del FAST["description"]
GUIDED = {"guidance_scale": 7.5}
TINY = {"tiny_decoder_path": "TAESD's"}
PRICED = {  # row -> options
    "as published": {},
    "`--guidance_scale 7.5`": GUIDED,
    "the same, `--guidance_in rollout`": GUIDED | {"guidance_in": "rollout"},
    "the same, `--guidance_in gradient`": GUIDED | {"guidance_in": "gradient"},
    "`--rollout_steps 20`": {"rollout_steps": 20},
    "`--rollout_steps 8`": {"rollout_steps": 8},
    "the same, guided by 7.5": {"rollout_steps": 8} | GUIDED,
    "`--rollout_steps 5`": {"rollout_steps": 5},
    "`--plan several_stops --num_gradient_steps 4`": {"plan": "several_stops", "num_gradient_steps": 4},
    "`--plan draft_k --num_gradient_steps 4`": {"plan": "draft_k", "num_gradient_steps": 4},
    "`--plan draft_lv --num_gradient_steps 2`": {"plan": "draft_lv", "num_gradient_steps": 2},
    "`--decode_resolution 256`": {"decode_resolution": 256},
    "`--tiny_decoder_path`, TAESD": TINY,
    "`--rollout_steps 8 --decode_resolution 256`": {"rollout_steps": 8, "decode_resolution": 256},
    "`--rollout_steps 8 --tiny_decoder_path`": {"rollout_steps": 8} | TINY,
    "`--rollout_steps 5 --tiny_decoder_path`": {"rollout_steps": 5} | TINY,
    "`presets/fast.json`": FAST,
    "`--gradient_checkpointing`": {"gradient_checkpointing": True},
    "`--noise_distance_weight`": {"noise_distance_weight": 0.1},
    "`--pretrain_data`": {"pretrain_data": "captioned images"},
}
TEXT_ENCODER, VAE_ENCODER = (
    123_060_480,
    34_163_664,
)  # number of weights, for models that the counts do not run


@dataclass
class Options:
    """Count FLOPs and memory of SD-1.4 with ImageReward."""

    checkpoint: str = "result/benchmarks/sd14"
    """Weights of any content, since only shapes are read; random ones are written if there are none."""
    output: str = "benchmarks/count.md"
    """Markdown file of the tables."""


def inputs(size: int, resolution: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """UNet inputs without content: latents, timestep, prompt embeddings."""
    side = resolution // 8
    latents = torch.empty(size, 4, side, side, dtype=dtype)
    return latents, torch.tensor(1), torch.empty(size, 77, 768, dtype=dtype)


def count_baseline(folders: tuple[str, str], resolution: int, batch_size: int, dtype: torch.dtype) -> float:
    """Count GiB of the published step: all weights, and one graph from the UNet to the loss.

    Half precision uses the CPU's autocast; CUDA's also casts normalisations to float32 and saves more.
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
    """Count operations that compute or copy, each at least one kernel on a GPU, and the bytes they touch."""

    def __init__(self):
        super().__init__()
        self.number = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        written = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        storages = {id(t.untyped_storage()) for t in read}
        is_new = any(id(t.untyped_storage()) not in storages for t in written)
        if (is_new or function._schema.is_mutable) and "empty" not in str(function):
            self.number += 1
            self.bytes += sum(t.nbytes for t in read) + sum(t.nbytes for t in written)
        return result


def count_launches(folders: tuple[str, str], batch_size: int, is_lean: bool) -> tuple[int, float]:
    """Count operations of one UNet forward at 512x512 in bfloat16 without gradient, and GB touched."""
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
    """Count GiB of inference at 512x512 with guidance; `is_plain`: decode all images at once, in `dtype`."""
    with memory.without_content(folders[0], 4, dtype) as base, torch.no_grad():
        unet, vae = base.unet, base.vae
        if is_plain:
            memory.empty(vae, dtype)
        weights = sum(p.nbytes for model in (unet, vae) for p in model.parameters())
        weights += TEXT_ENCODER * dtype.itemsize + VAE_ENCODER * vae.dtype.itemsize
        x0 = torch.empty(batch_size if is_plain else 1, 4, 64, 64)
        parts = (lambda: unet(*inputs(2 * batch_size, 512, dtype)), lambda: decode(vae, x0))
        return (weights + max(memory.peak_of(run) for run in parts)) / 2**30


# ----------------------------------------------------------------------------------------------------- tables


def training_options(folders: tuple[str, str], **changes) -> TrainingOptions:
    """Options of a training of SD-1.4, as published but for `changes`."""
    published = {
        "guidance_scale": 1.0,
        "pretrained_model_name_or_path": folders[0],
        "reward_path": folders[1],
    }
    return TrainingOptions(**published | changes)


def flops_table(folders: tuple[str, str]) -> Iterator[str]:
    """Yield the lines of the table of FLOPs, by part and resolution."""
    options, columns = training_options(folders), {}
    for resolution in (256, 512, 768):
        parts = cost.count_parts(options, torch.float32, resolution)
        own = {name: getattr(parts, field) for field, name in PARTS.items()}
        own |= {f"step: {part}": tflop for part, tflop in cost.per_image(options, parts).items()}
        own["step"] = sum(cost.per_image(options, parts).values())
        own["validation"] = cost.validation_image(options, parts)
        columns[resolution] = own
    yield "| part | " + " | ".join(map(str, columns)) + " |"
    yield "|---|" + "---|" * len(columns)
    for part in columns[512]:
        yield f"| {part} | " + " | ".join(f"{own[part]:.3g}" for own in columns.values()) + " |"


def options_table(folders: tuple[str, str]) -> Iterator[str]:
    """Yield the lines of the table of FLOPs by option, at 512x512."""
    tiny_decoder = f"{folders[1]}/tiny_decoder"  # the configuration's defaults are TAESD's
    AutoencoderTiny().save_config(tiny_decoder)
    published = None
    yield "| options | rollout | decoder | reward | gradient | step | share of published |"
    yield "|---|---|---|---|---|---|---|"
    for name, changes in PRICED.items():
        if "tiny_decoder_path" in changes:
            changes = changes | {"tiny_decoder_path": tiny_decoder}
        options = training_options(folders, **changes)
        image = cost.per_image(options, cost.count_parts(options, torch.float32, 512))
        total = sum(image.values())
        published = published or total
        yield (
            f"| {name} | {' | '.join(f'{tflop:.3g}' for tflop in image.values())} | {total:.3g} "
            f"| {total / published:.0%} |"
        )


def memory_table(folders: tuple[str, str]) -> Iterator[str]:
    """Yield the lines of the table of a training step's memory."""
    columns = (
        "pixels",
        "batch",
        "precision",
        "published, ported",
        "ours",
        "ours / published",
        "ours, `--low_memory`",
    )
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for resolution, precision, batch_size in (
        *((512, precision, batch_size) for precision in DTYPES for batch_size in (1, 2, 4, 8)),
        (256, "bf16", 1),
        (768, "bf16", 1),
    ):
        sizes = {"train_batch_size": batch_size, "gradient_accumulation_steps": 8 // batch_size}
        options = training_options(folders, **sizes)
        dtype = DTYPES[precision]
        ours, low_memory = (
            max(sum(sizes) for sizes in memory.count(o, dtype, resolution).values())
            for o in (options, replace(options, low_memory=True))
        )
        baseline = count_baseline(folders, resolution, batch_size, dtype)
        yield (
            f"| {resolution} | {batch_size} | {precision} | {baseline:.2f} | {ours:.2f} "
            f"| {ours / baseline:.0%} | {low_memory:.2f} |"
        )


def launches_table(folders: tuple[str, str]) -> Iterator[str]:
    """Yield the lines of the table of operations of one UNet forward."""
    yield "| images | step | operations | GB touched | GB per image |"
    yield "|---|---|---|---|---|"
    for batch_size in (1, 2, 8):
        for name, is_lean in (("published, ported", False), ("ours", True)):
            number, size = count_launches(folders, batch_size, is_lean)
            yield f"| {batch_size} | {name} | {number} | {size:.1f} | {size / batch_size:.1f} |"


def inference_table(folders: tuple[str, str]) -> Iterator[str]:
    """Yield the lines of the table of memory in inference."""
    yield "| images at once | precision | plain diffusers call | ours |"
    yield "|---|---|---|---|"
    for batch_size, precision in ((1, "fp16"), (10, "fp16"), (10, "fp32")):
        plain, ours = (
            count_inference(folders, batch_size, DTYPES[precision], is_plain) for is_plain in (True, False)
        )
        yield f"| {batch_size} | {precision} | {plain:.2f} | {ours:.2f} |"


TABLES = {  # heading -> lines
    "TFLOP per image, by resolution": flops_table,
    "TFLOP per image of a training step at 512x512, by option": options_table,
    "GiB of a training step, 8 images per optimizer step": memory_table,
    "One UNet forward of a rollout, bf16, 512x512": launches_table,
    "GiB of inference at 512x512, guided": inference_table,
}


def main() -> None:
    """Write the tables."""
    options = tyro.cli(Options, use_underscores=True)
    if not Path(options.checkpoint, "ImageReward.pt").exists():
        write_checkpoint(options.checkpoint, "full")
    folders = f"{options.checkpoint}/stable-diffusion-v1-4", options.checkpoint
    lines = [
        f"Counted on {date.today().isoformat()} by `python benchmarks/count.py`, torch {torch.__version__}."
    ]
    for heading, table in TABLES.items():
        lines += ["", f"## {heading}", "", *tqdm(table(folders), heading, unit="line")]
    write_whole(options.output, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

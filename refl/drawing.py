"""What inference.py and inference_lora.py share: their options, and pictures drawn to files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from refl import board, devices, diffusion, doctor
from refl.errors import UserError
from refl.prompts import read_prompts

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tqdm import tqdm

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class DrawingOptions:
    """Options of every script that draws."""

    pretrained_model_name_or_path: str = "checkpoint/stable-diffusion-v1-4"
    """Folder of the text-to-image model, in diffusers' layout."""
    prompt: tuple[str, ...] = ("a lighthouse on a cliff at sunset, oil painting",)
    """One prompt or several."""
    prompts_file: str | None = None
    """Take the prompts from a .txt, .json, .jsonl or .csv file instead."""
    num_images_per_prompt: int = 10
    """Pictures of each prompt."""
    seed: int = 0
    """Seed of the first picture; the next has the next seed, and so on."""
    num_inference_steps: int = 50
    """Denoising steps."""
    guidance_scale: float = 7.5
    """Classifier-free guidance; 1 is none."""
    sampler: Literal["pndm", "ddim", "ddpm", "euler", "euler_a", "dpm++"] = "pndm"
    """How the noise is removed."""
    resolution: int | None = None
    """Pixels a side; None: the model's own (512 for SD-1.4)."""
    batch_size: int = 10
    """Pictures drawn at once. Halved by itself when the GPU's memory does not suffice."""
    device: str | None = None
    """"cuda", "cuda:1", "cpu", ...; None: a GPU if there is one."""
    dtype: Literal["fp16", "bf16", "fp32"] | None = None
    """Precision; None: fp16 on a GPU, fp32 on the CPU."""


def memory_advice() -> str:
    """What to do when the GPU's memory does not suffice for one picture."""
    return "Try --dtype fp16, a lower --resolution, another GPU, or --device cpu."


def check(options: DrawingOptions) -> list[str]:
    """The prompts; raises `UserError` for options that cannot be. Loads nothing."""
    for name in ("num_images_per_prompt", "num_inference_steps", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be 1 or more.")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: must be 0 or more.")
    doctor.check_model(options.pretrained_model_name_or_path, options.num_inference_steps)
    doctor.resolution_of(options.pretrained_model_name_or_path, options.resolution)
    doctor.check_output_folder(options.output_dir)
    return read_prompts(options.prompts_file) if options.prompts_file else list(options.prompt)


def pipeline(options: DrawingOptions) -> StableDiffusionPipeline:
    """The pipeline that the options ask for."""
    device = devices.find(options.device)
    dtype = DTYPES[options.dtype or ("fp16" if device.type == "cuda" else "fp32")]
    return diffusion.load_pipeline(options.pretrained_model_name_or_path, options.sampler, dtype, device)


def draw(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], options: DrawingOptions, title: str
) -> Iterator[Image.Image]:
    """Pictures, `num_images_per_prompt` of each prompt in turn, seeds counting up from `seed`."""
    wanted = [prompt for prompt in prompts for _ in range(options.num_images_per_prompt)]
    batch_size, done = options.batch_size, 0
    with tqdm(total=len(wanted), desc=title, unit="picture") as bar:
        while done < len(wanted):
            batch = wanted[done : done + batch_size]
            seeds = range(options.seed + done, options.seed + done + len(batch))
            steps, guidance, resolution = (
                options.num_inference_steps,
                options.guidance_scale,
                options.resolution,
            )
            try:
                pictures = diffusion.generate(pipeline, batch, seeds, steps, guidance, resolution)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                pictures = None
            if pictures is None:  # outside `except`, whose traceback still holds the tensors
                torch.cuda.empty_cache()
                batch_size = (len(batch) + 1) // 2
                bar.write(f"out of memory; going on with {batch_size} pictures at once")
                continue
            yield from map(board.to_pil, pictures)
            done += len(batch)
            bar.update(len(batch))

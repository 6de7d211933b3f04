"""Options and batched generation shared by inference.py, inference_lora.py and evaluate.py."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal, TypeVar

from refl.model.folder import check_model, resolution_of
from refl.model.lora import guidance_of, read_metadata
from refl.model.pipeline import generate, load_pipeline
from refl.system import devices
from refl.system.errors import UserError, is_first_process
from refl.system.files import check_output_folder
from refl.system.images import to_pil
from refl.system.ownership import check_place
from refl.system.prompts import check_prompt, read_prompts
from refl.system.text import printable

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tqdm import tqdm

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MAX_IMAGES = 10**6  # of a command
AS_TRAINED = ("sampler", "num_inference_steps", "resolution", "lora_in_uncond")  # taken by --as_trained
NOTED = ("resolution", "lora_in_uncond")  # of these; drawing with another sampler is the usual case


@dataclass
class ImageOptions:
    """Options of every script that generates images."""

    pretrained_model_name_or_path: str = "checkpoint/stable-diffusion-v1-4"
    """Folder of the text-to-image model, in diffusers' layout."""
    num_images_per_prompt: int = 10
    """Images of each prompt."""
    seed: int = 0
    """Seed of the first image; each further image has the next seed."""
    num_inference_steps: int = 50
    """Denoising steps."""
    guidance_scale: float = 7.5
    """Scale of classifier-free guidance; 1: no guidance."""
    sampler: Literal["pndm", "ddim", "ddpm", "euler", "euler_a", "dpm++"] = "pndm"
    """Denoising algorithm."""
    resolution: int | None = None
    """Width and height in pixels; None: the model's own (512 for SD-1.4)."""
    batch_size: int = 10
    """Images generated at once; halved automatically when the GPU runs out of memory."""
    device: str | None = None
    """"cuda", "cuda:1", "cpu", ...; None: a GPU if there is one."""
    dtype: Literal["fp16", "bf16", "fp32"] | None = None
    """Precision of the model; None: fp16 on a GPU, fp32 on the CPU."""


@dataclass
class DrawingOptions(ImageOptions):
    """Options of scripts that take prompts from the command line."""

    prompt: tuple[str, ...] = ("a lighthouse on a cliff at sunset, oil painting",)
    """One or more prompts."""
    prompts_file: str | None = None
    """Read the prompts from a .txt, .json, .jsonl, .csv, .tsv or .parquet file instead."""


@dataclass
class LoraOptions:
    """Options of scripts that apply a LoRA."""

    guidance_scale: float | None = None
    """Scale of classifier-free guidance; 1: no guidance.
    None: the one that the LoRA's file names, or 7.5 if it names none."""
    base_guidance_scale: float | None = ImageOptions.guidance_scale
    """Compare also with the base model at this guidance, by default that of inference.py.
    None: only with the base model at the LoRA's guidance."""
    lora_scale: float = 1.0
    """Scale of the LoRA; 0 is the base model."""
    lora_in_uncond: bool = True
    """Also apply the LoRA to guidance's prediction for the empty prompt, as diffusers does.
    In the demo world images were worse without it, for all ways to train the LoRA."""
    as_trained: bool = False
    """Draw as in training: its sampler, steps, resolution and lora_in_uncond replace these options.
    The guidance is then also that of the training, unless --guidance_scale is given."""


AnyOptions = TypeVar("AnyOptions", bound=LoraOptions)


def memory_advice() -> str:
    """Advice when the GPU runs out of memory for a single image."""
    return "Try --dtype fp16, a lower --resolution, another GPU, or --device cpu."


def check(options: DrawingOptions) -> list[str]:
    """Return the prompts; raises `UserError` for invalid options. Loads no weights."""
    check_images(options)
    if not (options.prompt or options.prompts_file):
        raise UserError("--prompt is empty; name one prompt or several, in quotes.")
    given = [check_prompt(prompt, "--prompt") for prompt in options.prompt]
    prompts = read_prompts(options.prompts_file) if options.prompts_file else given
    check_amount(len(prompts), options.num_images_per_prompt)
    if options.seed + len(prompts) * options.num_images_per_prompt > 2**64:
        raise UserError(f"--seed {options.seed}: the seeds of all images must be below 2^64.")
    return prompts


def check_amount(num_prompts: int, num_images: int) -> None:
    """Raise `UserError` for more images than anybody draws."""
    if num_prompts * num_images > MAX_IMAGES:
        raise UserError(
            f"--num_images_per_prompt {num_images}: {num_prompts * num_images:,} images in all, and at most "
            f"{MAX_IMAGES:,} can be drawn at once."
        )


def check_images(options: ImageOptions) -> None:
    """Raise `UserError` for invalid options other than prompts."""
    for name in ("num_images_per_prompt", "num_inference_steps", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be 1 or more.")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: must be 0 or more.")
    check_model(options.pretrained_model_name_or_path, options.num_inference_steps)
    resolution_of(options.pretrained_model_name_or_path, options.resolution)
    check_output_folder(options.output_dir)
    model = {"--pretrained_model_name_or_path": options.pretrained_model_name_or_path}
    check_place(options.output_dir, model, {"--reward_path": getattr(options, "reward_path", None)})


def find_guidance(options: LoraOptions, lora_paths: Sequence[str], is_quiet: bool = False) -> list[float]:
    """Find the guidance to draw with, LoRA by LoRA, and print it with the reason unless `is_quiet`.

    It is --guidance_scale; without it what the LoRA's file says, or else the default of inference.py.
    """
    found, paths_by_text = [], defaultdict(list)
    for path in lora_paths:
        named = guidance_of(read_metadata(path), in_training=options.as_trained)
        if options.guidance_scale is not None:
            scale, reason = options.guidance_scale, "--guidance_scale"
            if named not in (None, scale):
                reason += f"; the LoRA's file names {named:g}"
        elif named is not None:
            scale, reason = named, "named by the LoRA's file"
        else:
            scale, reason = ImageOptions.guidance_scale, "the default; the LoRA's file names none"
        found.append(scale)
        paths_by_text[f"guidance {scale:g} ({reason})"].append(path)
    if is_first_process() and not is_quiet:
        for text, paths in paths_by_text.items():
            print(text if len(paths_by_text) == 1 else printable(f"{text}: {', '.join(paths)}"))
    return found


def apply_trained_settings(options: AnyOptions, lora_paths: Sequence[str]) -> AnyOptions:
    """Apply --as_trained: return the options with `AS_TRAINED` as the LoRAs were trained.

    Without it, print a note about settings of `NOTED` that differ from the training's. Raises `UserError`
    for --as_trained with LoRAs of different settings.
    """
    trained = {}
    for path in lora_paths:
        metadata = read_metadata(path)
        trained[path] = {name: metadata[name] for name in AS_TRAINED if name in metadata}
    if options.as_trained:
        first, *others = trained
        for other in others:
            names = [name for name in AS_TRAINED if trained[first].get(name) != trained[other].get(name)]
            if names:
                raise UserError(
                    f"--as_trained: {first} was trained with {_flags(trained[first], names)}, {other} with "
                    f"{_flags(trained[other], names)}; evaluate them separately, or omit --as_trained."
                )
        return replace(options, **trained[first])
    differ = {
        _flags(own, [n for n in NOTED if n in own and getattr(options, n) not in (own[n], None)])
        for own in trained.values()
    }
    for flags in sorted(differ - {""}):
        which = "this LoRA" if len(trained) == 1 else "a LoRA"
        if is_first_process():
            print(f"note: {which} was trained with {flags}; --as_trained uses these settings")
    return options


def _flags(settings: dict, names: Sequence[str]) -> str:
    return " ".join(f"--{name} {settings.get(name, '(unknown)')}" for name in names)


def pipeline(options: ImageOptions) -> StableDiffusionPipeline:
    """Load the pipeline on the device, in the precision and with the sampler of the options."""
    device = devices.find(options.device)
    devices.set_tf32(False)
    dtype = DTYPES[precision(options, device)]
    return load_pipeline(options.pretrained_model_name_or_path, options.sampler, dtype, device)


def precision(options: ImageOptions, device: torch.device) -> str:
    """One of `DTYPES`: --dtype, or the default for the device."""
    return options.dtype or ("fp16" if device.type == "cuda" else "fp32")


def draw(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], options: ImageOptions, title: str
) -> Iterator[Image.Image]:
    """Yield `num_images_per_prompt` images of each prompt in turn, with seeds counting up from `seed`."""
    wanted = [prompt for prompt in prompts for _ in range(options.num_images_per_prompt)]
    with tqdm(total=len(wanted), desc=title, unit="image") as bar:
        yield from draw_each(pipeline, list(zip(wanted, count(options.seed), strict=False)), options, bar)


def draw_each(
    pipeline: StableDiffusionPipeline, wanted: Sequence[tuple[str, int]], options: ImageOptions, bar: tqdm
) -> Iterator[Image.Image]:
    """Yield the image of each prompt and seed; a batch that does not fit into memory is halved."""
    batch_size, done = options.batch_size, 0
    steps, guidance, resolution = options.num_inference_steps, options.guidance_scale, options.resolution
    while done < len(wanted):
        prompts, seeds = zip(*wanted[done : done + batch_size], strict=True)
        try:
            images = generate(pipeline, prompts, seeds, steps, guidance, resolution)
        except torch.OutOfMemoryError:
            if len(prompts) == 1:
                raise
            images = None
        if images is None:  # outside `except`, whose traceback still holds the tensors
            torch.cuda.empty_cache()
            batch_size = (len(prompts) + 1) // 2
            bar.write(f"out of memory; continuing with {batch_size} images at once")
            continue
        yield from map(to_pil, images)
        done += len(prompts)
        bar.update(len(prompts))

"""Every check that can fail before anything is loaded; training makes them first.

python -m refl doctor                                          # a table of what is right, doubtful, wrong
python -m refl doctor --output_dir elsewhere --rank 16         # the same options as for training

Each check returns what it found, or raises `Doubt` with what to look at or `UserError` with what to do. None
reads weights beyond the headers of their files.
"""

import os
import re
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from refl.model.folder import (
    MODEL_PARTS,
    WEIGHT_FILES,
    check_model,
    count_weights,
    read_config,
    resolution_of,
)
from refl.system import devices
from refl.system.errors import UserError
from refl.system.files import check_output_folder
from refl.system.prompts import read_prompts
from refl.train.options import Options as TrainingOptions
from refl.train.options import check_values, saved_arguments


def check_weights(model_folder: str | Path, reward_folder: str | Path | None) -> None:
    """All weights are there; what is missing is named at once, with its place and its source.

    `reward_folder` is ImageReward's, None where it is not used.
    """
    model = Path(model_folder)
    wanted = {path: "CompVis/stable-diffusion-v1-4" for path in [model / part for part in MODEL_PARTS]}
    if not model.exists():
        wanted = {model: "CompVis/stable-diffusion-v1-4"}
    if reward_folder is not None:
        wanted |= _reward_files(Path(reward_folder))
    _require(wanted)


def check_reward(folder: str | Path) -> None:
    """ImageReward's files are there."""
    _require(_reward_files(Path(folder)))


def _reward_files(folder: Path) -> dict[Path, str]:
    weights = folder / "ImageReward.pt"
    if folder.suffix in (".pt", ".safetensors"):
        weights, folder = folder, folder.parent
    elif not weights.exists() and weights.with_suffix(".safetensors").exists():
        weights = weights.with_suffix(".safetensors")
    tokenizer = folder / "bert-base-uncased"
    return {
        weights: "THUDM/ImageReward",
        folder / "med_config.json": "THUDM/ImageReward",
        tokenizer / "vocab.txt" if tokenizer.exists() else tokenizer: "google-bert/bert-base-uncased",
    }


def _require(wanted: dict[Path, str]) -> None:
    missing = [
        f"  {path}  (on the Hugging Face Hub: {hub})" for path, hub in wanted.items() if not path.exists()
    ]
    if missing:
        raise UserError("weights are missing:\n" + "\n".join(missing) + "\nSee checkpoint/README.md.")


class Doubt(Exception):
    """Something that may go well. Training does not stop for it."""


@dataclass
class Options(TrainingOptions):
    """Look at everything that training will need. The options are those of refl_lora.py."""

    main_process_port: int = 0
    """The port that processes meet at; 0: a free one."""


def check_options(options: TrainingOptions) -> str:
    """Their values are possible ones."""
    check_values(options)
    images = options.train_batch_size * options.gradient_accumulation_steps
    return f"{options.max_train_steps} steps of {images} images a process"


def check_versions(options: Any) -> str:
    """The libraries are those that were tested together."""
    requirements = Path(__file__).parents[2] / "requirements.txt"
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", requirements.read_text(), re.M))
    found = {}
    for name in pins:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError as error:
            raise UserError(f"{name} is not installed. Run: pip install -r {requirements}") from error
    others = [f"{name} {found[name]} (tested: {pin})" for name, pin in pins.items() if found[name] != pin]
    if others:
        raise Doubt(f"not what was tested together: {', '.join(others)}. pip install -r {requirements}")
    return f"Python {sys.version.split()[0]}, {len(pins)} packages as tested"


def check_files(options: Any) -> str:
    """The rewards exist, and so do the files of the model and, if it is asked for, of ImageReward."""
    named = _rewards(options)
    check_weights(
        options.pretrained_model_name_or_path, options.reward_path if "imagereward" in named else None
    )
    return f"those of {options.pretrained_model_name_or_path} and of {', '.join(named)}"


def _rewards(options: Any) -> list[str]:
    """Names of the rewards that are trained on and held out; raises `UserError` if one is both."""
    from refl.reward import rewards  # only here: its libraries may be what is wrong

    trained, held_out = rewards.parse(options.reward), rewards.parse_held_out(options.held_out_reward)
    if both := trained.keys() & held_out.keys():
        raise UserError(
            f"--held_out_reward: {min(both)} is in --reward, so it is not held out; name another."
        )
    return [*trained, *held_out]


def check_model_files(options: Any) -> str:
    """The text-to-image model is of the right architecture, its files as long as they should be."""
    folder = options.pretrained_model_name_or_path
    check_model(folder, options.num_inference_steps)
    files = [Path(folder) / part / names[0] for part, names in WEIGHT_FILES.items()]
    num_weights = sum(count_weights(file) for file in files if file.exists())
    size = resolution_of(folder, options.resolution)
    return f"{folder}: {num_weights / 1e6:,.1f} million weights, {size}x{size}"


def check_scheduler(options: Any) -> str:
    """DDPM on latents must not clip: they are not in [-1, 1]."""
    config = read_config(options.pretrained_model_name_or_path, "scheduler", "scheduler_config.json")
    clip_sample = config.get("clip_sample", "not set, True as diffusers reads it for DDPM")
    return f"clip_sample in the file: {clip_sample}; False is used"


def check_prompts(options: Any) -> str:
    """Both prompt files can be read, and captioned images, if they are asked for."""
    counts = [len(read_prompts(path)) for path in (options.prompts, options.validation_prompts)]
    text = f"{counts[0]} to train on, {counts[1]} to validate with"
    if options.pretrain_data:
        from refl.train import captioned  # only here: its libraries may be what is wrong

        text += f"; {len(captioned.read_captioned(options.pretrain_data))} images with captions"
    return text


def check_output(options: Any) -> str:
    """The output folder can be written, and its disk takes the checkpoints."""
    folder = Path(options.output_dir)
    free = shutil.disk_usage(check_output_folder(folder)).free
    # The LoRA of SD-1.4 has 0.2 million values per rank; a checkpoint holds each three times, in float32.
    needed = (options.checkpoints_total_limit + 2) * 3 * 4 * 0.2e6 * options.rank + 50e6
    text = f"{free / 1e9:.1f} GB free on the disk of {folder}, about {needed / 1e9:.2f} needed"
    if free < needed:
        raise Doubt(f"{text}. Make room, or lower --checkpoints_total_limit.")
    return text


def check_devices(options: Any) -> str:
    """GPUs, and what they can compute in."""
    import torch  # only here: the other checks are for machines where it may be what is wrong

    if not torch.cuda.is_available():
        raise Doubt("no GPU is visible: training runs on the CPU, which is for the demo world only.")
    gpus = range(torch.cuda.device_count())
    is_new = all(torch.cuda.get_device_capability(gpu) >= (8, 0) for gpu in gpus)
    if options.mixed_precision == "bf16" and not is_new:
        raise UserError("--mixed_precision bf16: a visible GPU is older than Ampere; take fp16.")
    return "; ".join(f"{gpu}: {torch.cuda.get_device_name(gpu)}" for gpu in gpus)


def check_memory(options: Any) -> str:
    """The GPUs' free memory, and whether the options fit into it. Takes some of it until the process ends."""
    from refl.preflight import memory

    import torch

    size = memory.needed(options, *_dtype_and_resolution(options))
    texts = [f"about {size:.1f} GiB needed"]
    if others := [name for name in _rewards(options) if name != "imagereward"]:
        texts[0] += f" besides what {', '.join(others)} takes"
    for gpu in range(torch.cuda.device_count()):
        try:
            free, total = (number / 2**30 for number in torch.cuda.mem_get_info(gpu))
        except RuntimeError as error:
            raise Doubt(
                f"GPU {gpu} cannot be used: {error}. Choose others by CUDA_VISIBLE_DEVICES."
            ) from error
        texts.append(f"GPU {gpu}: {free:.1f} of {total:.1f} GiB free")
        if free < size:
            raise Doubt(f"{'; '.join(texts)}. {memory_advice(options)}")
    return "; ".join(texts)


def memory_advice(options: Any) -> str:
    """What to do when the GPU's memory does not suffice."""
    from refl.preflight import memory

    ways = memory.advice(options, *_dtype_and_resolution(options))
    others = "Choose other GPUs by CUDA_VISIBLE_DEVICES, or a lower --resolution"
    return f"{others}, or one of these, with what it needs:\n{ways}" if ways else f"{others}."


def _dtype_and_resolution(options: Any) -> tuple[Any, int]:
    """Of the frozen models and the images: as asked for, as launched, or as train_refl_lora.sh chooses."""

    import torch

    name = options.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if name is None:
        gpus = range(torch.cuda.device_count())
        is_new = all(torch.cuda.get_device_capability(gpu) >= (8, 0) for gpu in gpus)
        name = "no" if not gpus else "bf16" if is_new else "fp16"
    return devices.DTYPES[name], resolution_of(options.pretrained_model_name_or_path, options.resolution)


def check_port(options: Any) -> str:
    """A port that was asked for is free."""
    port = getattr(options, "main_process_port", 0)
    if port == 0:
        return "a free one is chosen"
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"--main_process_port {port} cannot be used: {error}. Take another, or 0."
            ) from error
    return f"{port} is free"


CHECKS: dict[str, Callable[[Any], str]] = {
    "options": check_options,
    "versions": check_versions,
    "devices": check_devices,
    "port": check_port,
    "files": check_files,
    "model": check_model_files,
    "scheduler": check_scheduler,
    "memory": check_memory,
    "prompts": check_prompts,
    "output": check_output,
}


def check(options: Any, is_training: bool) -> None:
    """What `refl_lora.py` asks for; raises the first `UserError`.

    Prompts are left to it, which reads them anyway. Processes that are about to train do not look at the
    GPUs, and nothing here looks at their memory, because looking takes some of it.
    """
    for name, function in CHECKS.items():
        if name in ("prompts", "memory") or (name == "devices" and is_training):
            continue
        try:
            function(options)
        except Doubt as doubt:
            if not is_training and name != "devices":  # training says what it runs on
                print(f"warning: {doubt}", file=sys.stderr)


def main() -> None:
    """A table of all checks; exit code 2 if one fails."""
    import tyro

    read = partial(
        tyro.cli, Options, prog="python -m refl doctor", use_underscores=True, return_unknown_args=True
    )
    options, others = read()
    if options.options_file:
        options, others = read(args=[*saved_arguments(options.options_file), *sys.argv[1:]])
    if others:
        print(f"not looked at: {' '.join(others)}")
    failed = False
    for name, function in CHECKS.items():
        try:
            status, found = "pass", function(options)
        except Doubt as doubt:
            status, found = "warn", str(doubt)
        except UserError as error:
            status, found, failed = "FAIL", str(error), True
        print(f"{status}  {name:<9}  " + found.replace("\n", "\n" + " " * 17))
    sys.exit(2 if failed else 0)

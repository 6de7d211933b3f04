"""Check everything that training needs before it loads anything; training runs the same checks first.

python -m refl doctor                                          # a table: pass, warn or FAIL for each check
python -m refl doctor --output_dir elsewhere --rank 16         # with the options of a training

Each check returns a summary, or raises `CheckWarning` with what to look at or `UserError` with what to do. No
check reads more of the weights than the headers of their files.
"""

import os
import re
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from refl.model.folder import (
    WEIGHT_FILES,
    check_decode_resolution,
    check_model,
    check_tiny_decoder,
    count_weights,
    read_config,
    required_files,
    resolution_of,
)
from refl.system import devices
from refl.system.errors import UserError, is_first_process
from refl.system.files import check_output_folder, require
from refl.system.options import check_numbers
from refl.system.ownership import check_place
from refl.system.prompts import read_prompts
from refl.system.reading import exists
from refl.train.options import Options as TrainingOptions
from refl.train.options import check_values, describe, expand, naming_file, read_options

import torch


class CheckWarning(Exception):
    """A problem that does not stop training."""


@dataclass
class Options(TrainingOptions):
    """Check everything that training needs. The options are those of refl_lora.py."""

    main_process_port: int = 0
    """Port at which the processes meet; 0: a free one."""
    tflops: float | None = None
    """TFLOP/s that training reaches on one GPU, if it was measured, to tell its minutes."""


def check_options(options: TrainingOptions) -> str:
    """Check the values of the options."""
    check_numbers(options)
    check_values(options)
    images = options.train_batch_size * options.gradient_accumulation_steps
    guidance = f"guidance {options.guidance_scale:g}"
    if options.drawn_with != options.guidance_scale:
        guidance += f" in training and {options.drawn_with:g} in drawing"
    return f"{options.max_train_steps} steps of {images} images per process, {guidance}"


def check_versions(options: Any) -> str:
    """Compare the versions of the libraries with those that were tested together."""
    requirements = Path(__file__).parents[2] / "requirements.txt"
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", requirements.read_text(), re.M))
    installed = {}
    for name in pins:
        try:
            installed[name] = version(name).partition("+")[0]
        except PackageNotFoundError as error:
            raise UserError(f"{name} is not installed. Run: pip install -r {requirements}") from error
    others = [
        f"{name} {installed[name]} (tested: {pin})" for name, pin in pins.items() if pin != installed[name]
    ]
    if others:
        raise CheckWarning(f"untested versions: {', '.join(others)}. Run: pip install -r {requirements}")
    return f"Python {sys.version.split()[0]}, {len(pins)} packages as tested"


def check_files(options: Any) -> str:
    """Check that the rewards exist, and all files of the model and of the rewards; name all missing ones at
    once.

    Needs only those of `options` that name the model, the rewards and their folder.
    """
    from refl.reward import rewards  # only here: its libraries may be what is wrong

    trained, held_out = rewards.parse(options.reward), rewards.parse_held_out(options.held_out_reward)
    if both := trained.keys() & held_out.keys():
        raise UserError(
            f"--held_out_reward: {min(both)} is in --reward, so it is not held out; name another."
        )
    folder = options.pretrained_model_name_or_path
    require(
        required_files(folder)
        | rewards.required_files(options.reward, options.reward_path, options.held_out_reward)
    )
    target = rewards.default_target(options.reward)
    scale = (
        f"; {scales}; default --reward_target {target}" if (scales := rewards.scales(options.reward)) else ""
    )
    return f"{folder}, {', '.join([*trained, *held_out])}{scale}"


def check_model_files(options: Any) -> str:
    """Check the architecture of the text-to-image model, and that its files are complete."""
    folder = options.pretrained_model_name_or_path
    check_model(folder, options.num_inference_steps)
    files = [Path(folder) / part / names[0] for part, names in WEIGHT_FILES.items()]
    num_weights = sum(count_weights(file) for file in files if exists(file))
    size = resolution_of(folder, options.resolution)
    if options.decode_resolution:
        check_decode_resolution(folder, size, options.decode_resolution)
    if options.tiny_decoder_path:
        check_tiny_decoder(options.tiny_decoder_path, folder)
    return f"{folder}: {num_weights / 1e6:,.1f} million weights, {size}x{size}"


def check_scheduler(options: Any) -> str:
    """Report `clip_sample`: DDPM must not clip latents, which are not in [-1, 1]."""
    config = read_config(options.pretrained_model_name_or_path, "scheduler")
    clip_sample = config.get("clip_sample", "not set, which diffusers reads as True for DDPM")
    return f"clip_sample in the file: {clip_sample}; training uses False"


def check_prompts(options: Any) -> str:
    """Read both prompt files, and the captions of --pretrain_data if it is given."""
    counts = [len(read_prompts(path)) for path in (options.prompts, options.validation_prompts)]
    text = f"{counts[0]} for training, {counts[1]} for validation"
    if options.pretrain_data:
        from refl.train import captioned  # only here: its libraries may be what is wrong

        text += f"; {len(captioned.read_captioned(options.pretrain_data))} captioned images"
    return text


def check_output(options: Any) -> str:
    """Check that the output folder can be written, and that its disk has room for the checkpoints."""
    folder = Path(options.output_dir)
    inside = {
        f"--{name}": getattr(options, name)
        for name in ("pretrained_model_name_or_path", "tiny_decoder_path", "pretrain_data")
    }
    free = shutil.disk_usage(check_output_folder(folder)).free
    check_place(folder, inside, {"--reward_path": options.reward_path})
    # A LoRA for SD-1.4 has 0.2 million values per rank; a checkpoint contains each three times, in float32.
    needed = (options.checkpoints_total_limit + 2) * 3 * 4 * 0.2e6 * options.rank + 50e6
    text = f"{free / 1e9:.1f} GB free on the disk of {folder}, about {needed / 1e9:.2f} needed"
    if free < needed:
        raise CheckWarning(f"{text}. Make room, or lower --checkpoints_total_limit.")
    return text


def check_devices(options: Any) -> str:
    """List the visible GPUs, and check that they support the precision."""
    if not torch.cuda.is_available():
        raise CheckWarning("no GPU is visible: training runs on the CPU, fast enough for the demo only.")
    if options.mixed_precision == "bf16" and devices.best_precision() != "bf16":
        raise UserError("--mixed_precision bf16: a visible GPU is older than Ampere; take fp16.")
    return "; ".join(f"{gpu}: {torch.cuda.get_device_name(gpu)}" for gpu in range(torch.cuda.device_count()))


def check_memory(options: Any) -> str:
    """Compare the memory that the options need with that of the GPUs and, with --low_memory, of the machine.

    Takes some GPU memory until the process ends.
    """
    from refl.preflight import memory  # only here: its libraries may be what is wrong
    from refl.reward import rewards

    dtype, resolution = _dtype_and_resolution(options)
    size = memory.needed(options, dtype, resolution)
    texts = [f"about {size:.1f} GiB needed"]
    specs = rewards.parse(options.reward) | rewards.parse_held_out(options.held_out_reward)
    if others := [name for name, (_, spec) in specs.items() if spec.load_empty is None]:
        texts[0] += f" plus the memory of {', '.join(others)}"
    for gpu in range(torch.cuda.device_count()):
        try:
            free, total = (number / 2**30 for number in torch.cuda.mem_get_info(gpu))
        except RuntimeError as error:
            raise CheckWarning(
                f"GPU {gpu} cannot be used: {error}. Choose others by CUDA_VISIBLE_DEVICES."
            ) from error
        texts.append(f"GPU {gpu}: {free:.1f} of {total:.1f} GiB free")
        if free < size:
            raise CheckWarning(f"{'; '.join(texts)}. {memory_advice(options)}")
    if options.low_memory:
        texts.append(_check_host_memory(memory.pinned(options, dtype)))
    return "; ".join(texts)


def check_cost(options: Any) -> str:
    """Report how many FLOPs the run takes, and how many minutes on a GPU whose rate is known."""
    from refl.preflight import cost  # only here: its libraries may be what is wrong

    dtype, resolution = _dtype_and_resolution(options)
    parts = cost.count_parts(options, dtype, resolution)
    image = cost.per_image(options, parts)
    training, validation = cost.of_run(options, parts)
    total = sum(image.values())
    shares = ", ".join(f"{part} {tflop / total:.0%}" for part, tflop in image.items())
    texts = [
        f"computed: {total:.3g} TFLOP an image ({shares})",
        f"{training / 1000:.3g} PFLOP of training per process",
        f"{validation / 1000:.3g} PFLOP of validation in all",
    ]
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    rate = cost.published_rate(gpu) if dtype != torch.float32 else None
    if reached := getattr(options, "tflops", None):
        texts.append(f"{training / reached / 60:.0f} minutes of training at {reached:g} TFLOP/s, as given")
    elif rate:
        minutes = training / (cost.ASSUMED_UTILISATION * rate) / 60
        texts.append(
            f"about {minutes:.0f} minutes of training on {gpu}, assuming {cost.ASSUMED_UTILISATION:.0%} of "
            f"the {rate} TFLOP/s that NVIDIA publishes; give what it really reaches by --tflops"
        )
    return "; ".join(texts)


def _check_host_memory(pinned: float) -> str:
    """Compare GiB of pinned memory per process with the memory of the machine, if the system tells it."""
    text = f"host memory: about {pinned:.1f} GiB pinned per process"
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return text
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    text += f", {total:.1f} GiB in this machine"
    if pinned > total:
        raise CheckWarning(f"{text}. Train without --low_memory, or in half precision.")
    return text


def memory_advice(options: Any) -> str:
    """Ways to train with less GPU memory."""
    from refl.preflight import memory

    ways = memory.advice(options, *_dtype_and_resolution(options))
    others = "Choose other GPUs by CUDA_VISIBLE_DEVICES, or a lower --resolution"
    return f"{others}, or one of these, with what it needs:\n{ways}" if ways else f"{others}."


def memory_advice_for_training() -> str:
    """What to do when training, with the command line's options, runs out of GPU memory."""
    if not is_first_process():
        return "python -m refl doctor, with the same options, says what others would need."
    options = read_options(sys.argv[1:])
    options.mixed_precision = options.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    print("out of GPU memory; counting what other options would need ...", file=sys.stderr, flush=True)
    return memory_advice(options)


def _dtype_and_resolution(options: Any) -> tuple[Any, int]:
    """Precision of the frozen models (as given, as launched, or as train_refl_lora.sh chooses), and
    pixels."""
    name = options.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION") or devices.best_precision()
    resolution = resolution_of(options.pretrained_model_name_or_path, options.resolution)
    return devices.weight_dtype(name), resolution


def check_port(options: Any) -> str:
    """Check that a port that was given is free."""
    port = getattr(options, "main_process_port", 0)
    if port == 0:
        return "a free one will be chosen"
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
    "cost": check_cost,
    "prompts": check_prompts,
    "output": check_output,
}


def check(options: Any, is_training: bool) -> None:
    """Run the checks for refl_lora.py; raises the first `UserError`.

    Skips the prompts, which it reads itself, the memory of the GPUs, because asking for it takes some, and
    the cost, which is counted in seconds. Processes that are about to train also skip the GPUs themselves.
    """
    for name, function in CHECKS.items():
        if name in ("prompts", "memory", "cost") or (name == "devices" and is_training):
            continue
        try:
            with naming_file(options):
                function(options)
        except CheckWarning as warning:
            if not is_training and name != "devices":  # training reports its device
                print(f"warning: {warning}", file=sys.stderr)


def main() -> None:
    """Print a table of all checks; exit code 2 if one fails."""
    import tyro

    options, others = tyro.cli(
        Options, prog="python -m refl doctor", args=expand(sys.argv[1:]), description=describe(Options),
        use_underscores=True, return_unknown_args=True,
    )  # fmt: skip
    if others:
        print(f"not checked: {' '.join(others)}")
    failed = False
    for name, function in CHECKS.items():
        try:
            with naming_file(options):
                status, text = "pass", function(options)
        except CheckWarning as warning:
            status, text = "warn", str(warning)
        except UserError as error:
            status, text, failed = "FAIL", str(error), True
        print(f"{status}  {name:<9}  " + text.replace("\n", "\n" + " " * 17))
    sys.exit(2 if failed else 0)

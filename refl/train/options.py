"""The options of a training run: meaning, valid values, and which of them its result depends on."""

import dataclasses
import hashlib
import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from refl.system.errors import UserError
from refl.system.options import check_numbers
from refl.system.reading import check_types, read_json

MAX_STEP_IMAGES = 10_000  # images of a process in a step or a validation, whose noise is held in memory
PRESETS = Path(__file__).parents[2] / "presets"  # files like a run's options.json, each with a description


@dataclass
class Files:
    """Options that name files of other options."""

    preset: str | None = None
    """Take defaults from a preset, listed above; options on the command line win."""
    options_file: str | None = None
    """Take defaults from a run's options.json; those of --preset and on the command line win."""


@dataclass
class Options(Files):
    """Reward Feedback Learning with LoRA. Every option is saved with the run; --options_file repeats one."""

    check: bool = False
    """Check everything that can be checked without loading weights, then stop.
    Exit code 2 if something is wrong."""

    # Model, reward, data
    pretrained_model_name_or_path: str = "checkpoint/stable-diffusion-v1-4"
    """Folder of the text-to-image model, in diffusers' layout."""
    reward: str = "imagereward"
    """The reward to maximise: imagereward, pickscore, hpsv2, hpsv2.1, clip, aesthetic_v1, aesthetic_v2, your
    own function as module:function, or a weighted sum such as imagereward:1.0,my_rewards:redness:0.5.
    Their scales differ: python -m refl doctor prints them."""
    reward_path: str = "checkpoint"
    """Folder of the rewards' files, placed as in checkpoint/README.md."""
    prompts: str = "data/train_prompts.txt"
    """Training prompts: .txt, .json, .jsonl, .csv, .tsv or .parquet."""
    validation_prompts: str = "data/held_out_prompts.txt"
    """Prompts that are not trained on. Every validation uses the first --num_validation_images of them."""
    output_dir: str = "checkpoint/refl_lora"
    """Folder for the LoRA, the options, the checkpoints and the logs."""
    also_kohya: bool = True
    """Also write the LoRA in kohya's format, for ComfyUI, A1111 and Forge, to kohya_lora.safetensors."""
    resolution: int | None = None
    """Side of the images in pixels; None: the model's own (512 for SD-1.4)."""

    # LoRA
    rank: int = 4
    """Rank of the LoRA matrices."""
    lora_alpha: float | None = None
    """The LoRA's output is multiplied by lora_alpha / rank. None: the rank, so that the factor is 1."""

    # Optimisation
    train_batch_size: int = 2
    """Images per process and micro-step."""
    gradient_accumulation_steps: int = 4
    """Micro-steps per optimizer step."""
    max_train_steps: int = 400
    """Optimizer steps. 400 steps of 16 images, those of two processes, are the paper's 6,400 images."""
    learning_rate: float = 1e-4
    """Learning rate of AdamW."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """Schedule of the learning rate after the warm-up."""
    lr_warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from 0 to its full value."""
    adam_beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of AdamW's mean of squared gradients."""
    adam_weight_decay: float = 1e-2
    """Decoupled weight decay of the LoRA matrices."""
    adam_epsilon: float = 1e-8
    """Epsilon of AdamW; it damps gradients far below it."""
    max_grad_norm: float = 1.0
    """Clip the gradient of an optimizer step to this norm."""
    use_8bit_adam: bool = False
    """Keep AdamW's state in 8 bits, except that of small matrices; needs the package bitsandbytes."""

    # ReFL
    grad_scale: float = 0.01
    """Factor on the loss. AdamW nearly cancels it.
    It matters only relative to --max_grad_norm, --adam_epsilon and the weights of regularisers."""
    reward_target: float | Literal["default"] | None = "default"
    """Images whose reward (the weighted sum) exceeds this get no gradient; None: no limit.
    default: the weighted sum of the rewards' own, 2.0 for ImageReward as published."""
    num_inference_steps: int = 40
    """Denoising steps from noise to image, by which stops are counted."""
    min_stop: int = 30
    """First denoising step, counted from 0, that may get a gradient."""
    max_stop: int = 39
    """Last denoising step that may get a gradient, inclusive."""
    rollout_steps: int | None = None
    """Equal denoising steps that the rollout would take through the whole noise schedule, 1 to 1000.
    It takes its share of them, to the timestep at which it stops; 8 cost a quarter of the published 40.
    None: the steps of --num_inference_steps, as published. Validation always takes those."""
    rollout_sampler: Literal["ddpm", "ddim", "dpm++", "dpm++sde"] = "ddpm"
    """Sampler of the rollout: DDPM as published, DDIM with eta 0, DPM-Solver++(2M) or its SDE variant.
    Validation always uses DDPM."""
    plan: Literal["late_step", "several_stops", "draft_k", "draft_lv"] = "late_step"
    """How to estimate the gradient; stops are drawn from --min_stop to --max_stop.
    late_step: ReFL, through the step at which the rollout stops.
    several_stops: the mean over --num_gradient_steps stops of one rollout.
    draft_k: through the last --num_gradient_steps steps (Clark et al. 2023, who always stop at the last one).
    draft_lv: the mean over the stop and --num_gradient_steps - 1 noisings of its x0 (the same paper)."""
    num_gradient_steps: int = 1
    """UNet evaluations of a rollout that get a gradient; 1 for late_step."""
    guidance_scale: float = 5.0
    """Scale of classifier-free guidance in training; 1: none, as published. Otherwise the UNet runs twice."""
    guidance_in: Literal["both", "rollout", "gradient"] = "both"
    """Use guidance in the rollout, at the step that gets the gradient, or in both."""
    draw_guidance_scale: float | None = None
    """Guidance at which people will draw with the LoRA: validation uses it, and the LoRA's file names it.
    None: 1.5 times --guidance_scale, which was best in the demo world; 1 if that is 1."""
    lora_in_uncond: bool = True
    """Apply the LoRA to the prediction for the empty prompt as well, as diffusers does in inference."""
    normalize_by_stop: bool = False
    """Divide each gradient by |dx0/deps| of its stop index, so that early and late stops have equal weight.
    The slope falls from 0.63 at step 30 of SD-1.4 to 0.04 at 39."""

    # Against over-optimising the reward
    noise_distance_weight: float = 0.0
    """Weight of the mean squared difference between the noise predicted with and without the LoRA.
    Needs no data. Ten times --grad_scale worked well in the demo world."""
    lora_shrinkage: float = 0.0
    """Multiply what the LoRA adds to the model by 1 minus this, such as 0.01, after each optimizer step."""
    pretrain_data: str | None = None
    """Folder of captioned images; adds the base model's denoising loss on them, as published.
    Captions: metadata.jsonl with file_name and text, or a .txt beside each."""
    pretrain_weight: float = 1.0
    """Weight of that loss; the paper uses 1 with --grad_scale 0.001."""
    held_out_reward: str | None = None
    """Rewards to measure at validation but not to train on, named as in --reward."""
    early_stop: bool = False
    """Stop when the reward rises while held-out rewards, diversity or saturation get significantly worse.
    The result is the best LoRA so far, which is also kept in best/."""

    # Precision, speed, memory
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the frozen models; the LoRA stays in float32. None: as launched."""
    gradient_checkpointing: bool = False
    """Recompute activations of UNet and decoder in the backward pass: less memory, more time."""
    decode_batch_size: int = 1
    """Images decoded and scored at once; must divide --train_batch_size. More need more memory."""
    decode_resolution: int | None = None
    """Side in pixels of the images that are decoded for the gradient, from latents made smaller.
    At most --resolution; 256 at 512 costs a quarter of the decoder. Approximate. None: --resolution, exact.
    Validation always decodes exactly."""
    tiny_decoder_path: str | None = None
    """Folder of a small decoder to use for the gradient alone: diffusers' AutoencoderTiny, such as TAESD.
    Approximate. None: the model's own, exact."""
    low_memory: bool = False
    """Fit small GPUs at the cost of time; 8 GB suffice at 512 pixels in any precision.
    Recomputes activations, decodes one by one, keeps each frozen model on the GPU only while it is used."""
    rollout_batch_size: int = 8
    """Images rolled out at once, across micro-steps; more use a large GPU better."""
    allow_tf32: bool = False
    """Use TF32 for float32 matrix products and convolutions on Ampere and newer GPUs."""
    torch_compile: bool = False
    """Compile the UNet with torch.compile. Takes minutes at the start; results differ by rounding.
    Not measured on a GPU; on the CPU it is no faster."""
    seed: int = 0
    """Seed of the LoRA's initial values, prompts, noise and stop indices."""

    # Checkpoints
    checkpointing_steps: int = 10
    """Optimizer steps between checkpoints; 0: only at the end and when stopped by a signal."""
    checkpoints_total_limit: int = 3
    """Number of checkpoints to keep; older ones are deleted once a new one is complete."""
    resume_from_checkpoint: str = "latest"
    """latest: resume from the newest complete checkpoint in --output_dir, if there is one.
    none: start over and replace that run. Otherwise the folder of a checkpoint."""
    allow_changed_options: bool = False
    """Resume even if options that the result depends on differ from the checkpoint's."""
    max_nonfinite_steps: int = 10
    """End the run after this many skipped steps in a row, whose loss or gradient was not finite."""

    # Validation and logs
    validation_steps: int = 20
    """Optimizer steps between validations; also before the first step and after the last. 0: none."""
    num_validation_images: int = 4
    """Prompts per validation."""
    validation_images_per_prompt: int = 1
    """Images of each validation prompt; 2 or more also measure diversity."""
    logging_dir: str = "logs"
    """TensorBoard's folder, inside --output_dir."""
    report_to: Literal["tensorboard", "none"] = "tensorboard"
    """Where to log curves and images."""

    @property
    def alpha(self) -> float:
        """`lora_alpha`, or the rank where it is None."""
        return self.rank if self.lora_alpha is None else self.lora_alpha

    @property
    def drawn_with(self) -> float:
        """`draw_guidance_scale`; if None, 1.5 times the guidance of the training, or 1 without guidance."""
        if self.draw_guidance_scale is not None:
            return self.draw_guidance_scale
        return 1.0 if self.guidance_scale == 1 else 1.5 * self.guidance_scale


def read_options(arguments: list[str]) -> Options:
    """Read the command line; its options override those of --preset and --options_file."""
    import tyro  # here, because the doctor imports this module to check whether tyro is installed

    options = tyro.cli(Options, args=expand(arguments), use_underscores=True, description=describe(Options))
    with naming_file(options):
        check_numbers(options)
        if options.reward_target == "default":
            from refl.reward import rewards  # likewise

            options.reward_target = rewards.default_target(options.reward)
    return options


def describe(kind: type[Options]) -> str:
    """The head of --help: what a command does, and the presets."""
    presets = {file.stem: _read(file).get("description", "") for file in sorted(PRESETS.glob("*.json"))}
    return "\n".join([kind.__doc__, "", "presets:", *(f"  {name}: {text}" for name, text in presets.items())])


def expand(arguments: list[str]) -> list[str]:
    """Put the arguments of --options_file and --preset before those of the command line, which override them.

    Raises `UserError` for a file that cannot be read or has a wrong option.
    """
    import tyro

    files, _ = tyro.cli(Files, args=arguments, use_underscores=True, return_unknown_args=True, add_help=False)
    return [argument for file in _paths(files) for argument in _read_arguments(file)] + arguments


def _paths(files: Files) -> list[Path]:
    """The files that are named; later ones override earlier ones."""
    paths = [] if files.options_file is None else [Path(files.options_file)]
    if files.preset is not None:
        known = {file.stem: file for file in sorted(PRESETS.glob("*.json"))}
        if files.preset not in known:
            raise UserError(f"--preset {files.preset}: no such preset; there are {', '.join(known)}.")
        paths.append(known[files.preset])
    return paths


def _read(file: Path) -> dict[str, Any]:
    """The options in a file by their names, which may be spelled with hyphens, as on the command line."""
    content = check_types(read_json(file), {}, file, "It should be like a run's options.json.")
    return {name.replace("-", "_"): value for name, value in content.items()}


def _read_arguments(file: Path) -> list[str]:
    """Convert a file of options to command-line arguments; raises `UserError` that names the file."""
    skipped = (*COMMAND_ONLY, "description")
    options = {name: value for name, value in _read(file).items() if name not in skipped}
    arguments = [_as_argument(name, value) for name, value in options.items()]
    known = vars(Options()).keys()
    for argument, (name, value) in zip(arguments, options.items(), strict=True):
        if name not in known or not isinstance(value, str | int | float | None):
            raise _wrong_option(file, argument)
    if not _is_valid(arguments):
        raise _wrong_option(file, next(argument for argument in arguments if not _is_valid([argument])))
    return arguments


def _wrong_option(file: Path, argument: str) -> UserError:
    return UserError(f"{file}: {argument} is not an option or not a value of it; --help lists them.")


def _as_argument(name: str, value: str | int | float | bool | None) -> str:
    return f"--{name if value else 'no_' + name}" if isinstance(value, bool) else f"--{name}={value}"


def _is_valid(arguments: list[str]) -> bool:
    import tyro

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            tyro.cli(Options, args=arguments, use_underscores=True)
        except SystemExit:
            return False
    return True


@contextmanager
def naming_file(options: Options) -> Iterator[None]:
    """Add the file to a `UserError` about an option that was given in a preset or an options file."""
    try:
        yield
    except UserError as error:
        name = re.match(r"(?:--(\w+) )?", str(error))[1]
        value = getattr(options, name or "", None)
        start = f"--{name} {value}"
        files = [file for file in _paths(options) if str(_read(file).get(name, start)) == str(value)]
        if not files or not str(error).startswith(start):
            raise
        raise UserError(f"{start} (in {files[-1]}){str(error).removeprefix(start)}") from error


# Options of one command, not of the run.
COMMAND_ONLY = ("preset", "options_file", "check", "resume_from_checkpoint", "allow_changed_options")
# Options that the LoRA does not depend on, or only to rounding.
SAFE_TO_CHANGE = """preset options_file check output_dir also_kohya prompts train_batch_size
    decode_batch_size rollout_batch_size gradient_checkpointing low_memory torch_compile checkpointing_steps
    checkpoints_total_limit resume_from_checkpoint allow_changed_options max_nonfinite_steps logging_dir
    report_to""".split()
VALIDATION_OPTIONS = """draw_guidance_scale held_out_reward validation_prompts validation_steps
    num_validation_images validation_images_per_prompt""".split()  # they matter to --early_stop alone


def to_save(options: Options) -> dict[str, Any]:
    """The options as saved in options.json."""
    return {name: value for name, value in dataclasses.asdict(options).items() if name not in COMMAND_ONLY}


def run_fingerprint(
    options: Options,
    mixed_precision: str,
    num_processes: int,
    prompts: Sequence[str],
    validation_prompts: Sequence[str],
    captioned: Sequence[tuple[Path, str]],
) -> dict[str, Any]:
    """Everything that the LoRA depends on, by name: it must be the same when a run resumes."""
    ignored = SAFE_TO_CHANGE if options.early_stop else SAFE_TO_CHANGE + VALIDATION_OPTIONS
    fingerprint = {name: value for name, value in dataclasses.asdict(options).items() if name not in ignored}
    for name in ("validation_prompts", "pretrain_data"):  # identified by content below
        fingerprint.pop(name, None)
    fingerprint["mixed_precision"] = mixed_precision
    fingerprint["global_batch_size"] = options.train_batch_size * num_processes
    texts = {"prompts": prompts}
    if options.early_stop:
        texts["validation_prompts"] = validation_prompts
    if captioned:
        texts["pretrain_data"] = [f"{file.name} {file.stat().st_size} {text}" for file, text in captioned]
    for name, lines in texts.items():
        fingerprint[name] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if options.lr_scheduler.startswith("constant"):  # other schedules depend on the last step
        del fingerprint["max_train_steps"]
    return fingerprint


def check_values(options: Options) -> None:
    """Check values that are wrong on every machine; raises `UserError` for the first."""
    o = options
    demands = (  # names of options, predicate, requirement in words
        (
            """rank train_batch_size gradient_accumulation_steps decode_batch_size rollout_batch_size
            max_train_steps num_inference_steps num_gradient_steps num_validation_images
            validation_images_per_prompt checkpoints_total_limit max_nonfinite_steps""",
            lambda v: v >= 1,
            "be 1 or more",
        ),
        (
            """lr_warmup_steps min_stop seed validation_steps checkpointing_steps noise_distance_weight
            pretrain_weight adam_weight_decay""",
            lambda v: 0 <= v < math.inf,
            "be 0 or more",
        ),
        (
            "learning_rate grad_scale guidance_scale draw_guidance_scale adam_epsilon lora_alpha",
            lambda v: v is None or 0 < v < math.inf,
            "be positive",
        ),
        ("adam_beta1 adam_beta2 lora_shrinkage", lambda v: 0 <= v < 1, "be at least 0 and below 1"),
        ("max_grad_norm", lambda v: v > 0, "be positive; inf does not clip"),
        (
            "reward_target",
            lambda v: v in (None, "default") or math.isfinite(v),
            "be a number, or None",
        ),
        ("use_8bit_adam", lambda v: not v or find_spec("bitsandbytes"), "have: pip install bitsandbytes"),
        ("decode_batch_size", lambda v: v == 1 or not o.low_memory, "be 1 with --low_memory"),
        (
            "decode_batch_size",
            lambda v: o.train_batch_size % v == 0,
            f"divide --train_batch_size {o.train_batch_size}",
        ),
        (
            "gradient_accumulation_steps",
            lambda v: v * o.train_batch_size <= MAX_STEP_IMAGES,
            f"be at most {MAX_STEP_IMAGES:,} divided by --train_batch_size {o.train_batch_size}",
        ),
        (
            "validation_images_per_prompt",
            lambda v: v * o.num_validation_images <= MAX_STEP_IMAGES,
            f"be at most {MAX_STEP_IMAGES:,} divided by --num_validation_images {o.num_validation_images}",
        ),
        ("max_stop", lambda v: o.min_stop <= v, f"not be below --min_stop {o.min_stop}"),
        (
            "max_stop",
            lambda v: v < o.num_inference_steps,
            f"be below --num_inference_steps {o.num_inference_steps}: denoising steps are counted from 0",
        ),
        ("decode_resolution", lambda v: v is None or v >= 1, "be None, or 1 or more"),
        ("rollout_steps", lambda v: v is None or 1 <= v <= 1000, "be None, or 1 to 1000"),
        ("num_gradient_steps", lambda v: v == 1 or o.plan != "late_step", "be 1 for --plan late_step"),
        (
            "num_gradient_steps",
            lambda v: o.plan != "several_stops" or v <= o.max_stop - o.min_stop + 1,
            f"be at most {o.max_stop - o.min_stop + 1}, the number of stops that can be drawn",
        ),
        (
            "noise_distance_weight",
            lambda v: v == 0 or o.plan != "draft_k" or o.num_gradient_steps == 1,
            "be 0 with --plan draft_k of several steps, which the distance does not cover",
        ),
        (
            "lr_warmup_steps",
            lambda v: v == 0 or o.lr_scheduler != "constant",
            "be 0 for the constant schedule; take --lr_scheduler constant_with_warmup",
        ),
        (
            "guidance_in",
            lambda v: v == "both" or o.guidance_scale != 1,
            "go with a --guidance_scale other than 1",
        ),
        ("torch_compile", lambda v: not (v and o.low_memory), "be False with --low_memory"),
        ("early_stop", lambda v: not v or o.validation_steps, "have --validation_steps above 0"),
    )
    for names, is_valid, demand in demands:
        for name in names.split():
            if not is_valid(value := getattr(options, name)):
                with naming_file(options):
                    raise UserError(f"--{name} {value}: must {demand}.")

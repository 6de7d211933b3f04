"""The options of a training: what each means, which values it may have, what a run's result depends on."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from refl.system.errors import UserError


@dataclass
class Options:
    """Reward Feedback Learning with LoRA. Every option is saved with the run; --options_file repeats one."""

    options_file: str | None = None
    """Take defaults from a run's options.json; options on the command line win."""
    check: bool = False
    """Check everything that can be checked without loading weights, then stop.
    Exit code 2 if something is wrong."""

    # What is trained, by what, on what
    pretrained_model_name_or_path: str = "checkpoint/stable-diffusion-v1-4"
    """Folder of the text-to-image model, in diffusers' layout."""
    reward: str = "imagereward"
    """What to maximise: imagereward, a function of your own as module:function, or a weighted sum.
    Such a sum is imagereward:1.0,my_rewards:redness:0.5."""
    reward_path: str = "checkpoint"
    """Folder of ImageReward.pt (or .safetensors), med_config.json and bert-base-uncased/."""
    prompts: str = "data/train_prompts.txt"
    """Training prompts: .txt, .json, .jsonl or .csv."""
    validation_prompts: str = "data/held_out_prompts.txt"
    """Prompts never trained on; the first --num_validation_images of them are drawn again and again."""
    output_dir: str = "checkpoint/refl_lora"
    """Where the LoRA, the options and the logs go."""
    also_kohya: bool = False
    """Write the LoRA in kohya's format as well, for A1111 and ComfyUI: kohya_lora.safetensors."""
    resolution: int | None = None
    """Pixels a side of the images; None: the model's own (512 for SD-1.4)."""

    # LoRA
    rank: int = 4
    """Rank of the LoRA matrices."""
    lora_alpha: float | None = None
    """The LoRA's output is scaled by lora_alpha / rank; None: the rank, so by 1."""

    # Optimisation
    train_batch_size: int = 2
    """Images per process and micro-step."""
    gradient_accumulation_steps: int = 4
    """Micro-steps per optimizer step."""
    max_train_steps: int = 100
    """Optimizer steps."""
    learning_rate: float = 1e-4
    """Step size of AdamW."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """How the learning rate goes on after the warm-up."""
    lr_warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises to its full value, the first of them at 0."""
    adam_beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of AdamW's mean of squared gradients."""
    adam_weight_decay: float = 1e-2
    """Decoupled weight decay of the LoRA matrices."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon; gradients far below it are damped."""
    max_grad_norm: float = 1.0
    """The gradient of an optimizer step is clipped to this norm."""
    use_8bit_adam: bool = False
    """Keep AdamW's state in 8 bits (that of small matrices stays in 32); needs the package bitsandbytes."""

    # ReFL
    grad_scale: float = 0.01
    """Factor on the loss. AdamW nearly cancels it.
    It matters against --max_grad_norm, --adam_epsilon and the weights of regularisers only."""
    reward_target: float | Literal["default"] | None = "default"
    """Images whose reward, the weighted sum of all, is above this get no gradient; None: no such limit.
    default: the reward's own, 2.0 for ImageReward as published."""
    num_inference_steps: int = 40
    """DDPM steps from noise to image."""
    min_stop: int = 30
    """First denoising step, counted from 0, that may get the gradient."""
    max_stop: int = 39
    """Last denoising step that may get the gradient, inclusive."""
    guidance_scale: float = 1.0
    """Classifier-free guidance while training; 1 is none, as published. Above 1 the UNet runs twice."""
    guidance_in: Literal["both", "rollout", "gradient"] = "both"
    """Where guidance is used: without gradient, at the step that gets the gradient, or both.
    Validation always draws with it."""
    lora_in_uncond: bool = True
    """Whether the LoRA acts on the prediction for the empty prompt as well, as in programs that draw."""
    normalize_by_stop: bool = False
    """Divide each gradient by |dx0/deps| of its stop index, so that early and late stops count alike.
    It falls from 0.63 at step 30 of SD-1.4 to 0.04 at 39."""

    # Against over-optimising the reward
    noise_distance_weight: float = 0.0
    """Weight, in the loss, of the mean squared difference between noise predicted with and without LoRA.
    Needs no data. Ten times --grad_scale did well in the demo world."""
    lora_shrinkage: float = 0.0
    """After each optimizer step what the LoRA adds to the model is multiplied by 1 - this, such as 0.01."""
    pretrain_data: str | None = None
    """Folder of captioned images: adds the model's own training loss on them, as published.
    Captions: metadata.jsonl with file_name and text, or a .txt beside each."""
    pretrain_weight: float = 1.0
    """Factor on that loss; the paper has 1 with --grad_scale 0.001."""
    held_out_reward: str | None = None
    """Rewards that are watched at validation and not trained on, as in --reward."""
    early_stop: bool = False
    """Stop when the reward rises while held-out rewards, diversity or saturation get worse beyond noise.
    The best LoRA so far is kept, in best/ and as the result."""

    # Precision, speed, memory
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the frozen parts; the LoRA stays in float32. None: as launched."""
    gradient_checkpointing: bool = False
    """Recompute UNet's and decoder's activations in the backward pass: less memory, some more time."""
    decode_batch_size: int = 1
    """Images decoded and scored at once; must divide --train_batch_size. Higher: more memory."""
    low_memory: bool = False
    """For small GPUs (8 GB do at 512 pixels in any precision); some time more.
    Recomputes activations, decodes one by one, has each frozen model on the GPU only while it is used."""
    rollout_batch_size: int = 8
    """Images rolled out at once, from as many micro-steps as it takes; more fill a large GPU better."""
    allow_tf32: bool = False
    """Let float32 matrix products on Ampere and newer GPUs use TF32."""
    seed: int = 0
    """Seed of the LoRA's initial values and of every draw."""

    # Checkpoints
    checkpointing_steps: int = 10
    """Optimizer steps between checkpoints in --output_dir; 0: only at the end and when told to stop."""
    checkpoints_total_limit: int = 3
    """Checkpoints kept; older ones go once a new one is whole."""
    resume_from_checkpoint: str = "latest"
    """"latest": go on from the newest whole checkpoint in --output_dir, if there is one.
    "none": start anew and replace what is there. Or the folder of a checkpoint."""
    allow_changed_options: bool = False
    """Go on although options that the result depends on are not those of the checkpoint."""
    max_nonfinite_steps: int = 10
    """Steps in a row whose loss or gradient is not finite, and which are skipped, before the run ends."""

    # Watching
    validation_steps: int = 20
    """Optimizer steps between validations, which also happen before the first and after the last; 0: none."""
    num_validation_images: int = 4
    """Prompts per validation."""
    validation_images_per_prompt: int = 1
    """Images of each; 2 or more also show how diverse they are."""
    logging_dir: str = "logs"
    """TensorBoard's folder, inside --output_dir."""
    report_to: Literal["tensorboard", "none"] = "tensorboard"
    """Where curves and images go."""

    @property
    def alpha(self) -> float:
        """`lora_alpha`, or the rank where it is None."""
        return self.rank if self.lora_alpha is None else self.lora_alpha


def read_options(arguments: list[str]) -> Options:
    """Options from the command line; those of --options_file come first, so that the command line wins."""
    import tyro  # only here: the doctor, which has the same options, looks whether it is there

    options = tyro.cli(Options, args=arguments, use_underscores=True)
    if options.options_file:
        arguments = [*saved_arguments(options.options_file), *arguments]
        options = tyro.cli(Options, args=arguments, use_underscores=True)
    if options.reward_target == "default":
        from refl.reward import rewards  # likewise

        options.reward_target = rewards.default_target(options.reward)
    return options


def saved_arguments(options_file: str) -> list[str]:
    """A run's options.json as arguments of a command."""
    try:
        saved = json.loads(Path(options_file).read_text())
        return [_as_argument(name, value) for name, value in saved.items() if name not in OF_A_COMMAND]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--options_file {options_file} cannot be read ({error}).") from error


def _as_argument(name: str, value: str | int | float | bool | None) -> str:
    return f"--{name if value else 'no_' + name}" if isinstance(value, bool) else f"--{name}={value}"


# How one command was started, not what a run is.
OF_A_COMMAND = ("options_file", "check", "resume_from_checkpoint", "allow_changed_options")
# Options that the LoRA does not depend on, or only to rounding.
HARMLESS = """options_file check output_dir also_kohya prompts train_batch_size decode_batch_size
    rollout_batch_size gradient_checkpointing low_memory checkpointing_steps checkpoints_total_limit
    resume_from_checkpoint allow_changed_options max_nonfinite_steps logging_dir report_to""".split()
WATCHING = """held_out_reward validation_prompts validation_steps num_validation_images
    validation_images_per_prompt""".split()  # what --early_stop decides by


def to_save(options: Options) -> dict[str, Any]:
    """What options.json has."""
    return {name: value for name, value in dataclasses.asdict(options).items() if name not in OF_A_COMMAND}


def run_fingerprint(
    options: Options,
    mixed_precision: str,
    num_processes: int,
    prompts: Sequence[str],
    validation_prompts: Sequence[str],
    captioned: Sequence[tuple[Path, str]],
) -> dict[str, Any]:
    """All that the LoRA depends on, by name: what has to stay when a run is resumed."""
    harmless = HARMLESS if options.early_stop else HARMLESS + WATCHING
    decides = {name: value for name, value in dataclasses.asdict(options).items() if name not in harmless}
    for name in ("validation_prompts", "pretrain_data"):  # by content, wherever they are
        decides.pop(name, None)
    decides["mixed_precision"] = mixed_precision
    decides["train_batch_size x processes"] = options.train_batch_size * num_processes
    texts = {"prompts": prompts}
    if options.early_stop:
        texts["validation_prompts"] = validation_prompts
    if captioned:
        texts["pretrain_data"] = [f"{file.name} {file.stat().st_size} {text}" for file, text in captioned]
    for name, lines in texts.items():
        decides[name] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if options.lr_scheduler.startswith("constant"):  # others look at where the run will end
        del decides["max_train_steps"]
    return decides


def check_values(options: Options) -> None:
    """Raises `UserError` for a value that no machine could train with."""
    o = options
    demands = (  # names, what is right, in words
        (
            """rank train_batch_size gradient_accumulation_steps decode_batch_size rollout_batch_size
            max_train_steps num_inference_steps num_validation_images validation_images_per_prompt
            checkpoints_total_limit max_nonfinite_steps""",
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
            "learning_rate grad_scale guidance_scale adam_epsilon lora_alpha",
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
        ("max_stop", lambda v: o.min_stop <= v, f"not be below --min_stop {o.min_stop}"),
        (
            "max_stop",
            lambda v: v < o.num_inference_steps,
            f"be below --num_inference_steps {o.num_inference_steps}: denoising steps are counted from 0",
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
        ("early_stop", lambda v: not v or o.validation_steps, "have --validation_steps above 0"),
    )
    for names, is_right, demand in demands:
        for name in names.split():
            if not is_right(getattr(options, name)):
                raise UserError(f"--{name} {getattr(options, name)}: must {demand}.")

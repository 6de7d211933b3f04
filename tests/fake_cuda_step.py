"""An optimizer step and a validation of training on fake CUDA tensors, for test_fake_cuda.py.

The functions run in the process that `fake_cuda.start_process` makes; results travel back by pickle.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import refl_lora
from refl.model import families
from refl.reward import rewards
from refl.train import models as train_models
from refl.train.batches import Batches, Inputs, MicroBatch
from refl.train.metrics import Metrics
from refl.train.models import Models, load_models
from refl.train.options import Options
from refl.train.progress import Progress
from refl.train.update import Updater
from refl.train.validation import Validator

import torch
from fake_cuda import DEVICE, fake_cuda, to_fake
from PIL import Image
from random_checkpoint import SIZES, make_reward, make_unet, make_vae
from torch import Tensor

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROMPTS = ["a red cat", "three green apples"]
# One process, whose collectives have nothing to do.
ACCELERATOR = SimpleNamespace(
    process_index=0, num_processes=1, is_main_process=False, device=DEVICE,
    reduce=lambda tensor, reduction: tensor, gather=lambda tensor: tensor,
)  # fmt: skip


@dataclass
class Case:
    """A run to imitate, and a fault to put into it."""

    precision: str = "bf16"
    options: dict = field(default_factory=dict)  # of refl_lora.py, by name
    is_full_size: bool = False  # SD-1.4 and ImageReward at 512 x 512, instead of tiny models
    is_checked: bool = True  # the reward's first scores and gradient have been checked before
    fault: str | None = None


@dataclass
class Report:
    """Observations of a run on fake CUDA tensors."""

    syncs: Counter  # in `refl_step` or the validation: "operation, file:line" -> times
    float64: Counter  # the same, of operations with a float64 result
    update_syncs: Counter = field(default_factory=Counter)  # of the updater
    metrics_syncs: Counter = field(default_factory=Counter)  # of what is logged
    dtypes: dict[str, set[torch.dtype]] = field(default_factory=dict)  # phase -> those of its matrix products
    gradients: set[tuple[str, torch.dtype]] = field(default_factory=set)  # (device type, dtype)
    lora: set[tuple[str, torch.dtype]] = field(default_factory=set)  # the same, of LoRA and optimizer state


# ------------------------------------------------------------------------------------------- models and data


def make_options(folder: Path, case: Case) -> Options:
    """Options of a run with one micro-batch of two images and two denoising steps, changed by `case`."""
    settings = {
        "pretrained_model_name_or_path": str(folder / "stable-diffusion-v1-4"),
        "reward_path": str(folder),
        "train_batch_size": 2,
        "decode_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "num_inference_steps": 2,
        "reward_target": 2.0,
        "min_stop": 0,
        "max_stop": 0,
        "validation_images_per_prompt": 2,
    }
    return Options(**settings | case.options)


def load(options: Options, case: Case) -> Models:
    """Models of a run, loaded on the CPU; at full size without values."""
    models = (
        load_full_size(options, case)
        if case.is_full_size
        else load_models(options, CPU, DTYPES[case.precision])
    )
    if case.is_checked:
        models.rewards.validated.add("imagereward")
        models.rewards.finite.add("imagereward")
    return models


def load_full_size(options: Options, case: Case) -> Models:
    """As `load_models`, with models of SD-1.4's and ImageReward's architectures in place of those loaded."""
    dtype = DTYPES[case.precision]
    base = families.load(options.pretrained_model_name_or_path, dtype, CPU)
    judge = rewards.load("imagereward", options.reward_path, CPU, dtype)
    with torch.device("meta"):
        unet, vae = make_unet(SIZES["full"]), make_vae(SIZES["full"])
        reward = make_reward(SIZES["full"], judge.rewards["imagereward"].tokenizer)
    for model in (unet, vae, reward):
        model.requires_grad_(False).eval()
    base.unet, base.vae = unet.to(dtype), vae.to(base.vae.dtype)
    reward.vision.to(dtype)
    reward.text.to(dtype)
    judge.rewards["imagereward"] = reward
    with ExitStack() as stack:
        for module, loaded in ((families, base), (rewards, judge)):
            load_loaded = mock.patch.object(module, "load", lambda *_, loaded=loaded: loaded)
            stack.enter_context(load_loaded)
        return load_models(options, CPU, dtype)


def to_cuda(models: Models, options: Options) -> None:
    """Put the models on the fake GPU, or where --low_memory has them; within `fake_cuda`."""
    home, base = CPU if options.low_memory else DEVICE, models.base
    scorers = [scorer for scorer in (models.rewards, models.held_out) if scorer]
    modules = [module for scorer in scorers for module in scorer.modules()]
    for model in (base.text_encoder, base.unet, base.vae, *modules):
        to_fake(model, home)
    models.lora = [matrix for matrix in base.unet.parameters() if matrix.requires_grad]
    if options.low_memory:
        train_models._offload(models, DEVICE)


def make_batches(folder: Path, options: Options, models: Models, case: Case) -> Batches:
    """Data of one optimizer step, encoded on the fake GPU; with a captioned image where it has a weight."""
    captioned = []
    if options.pretrain_weight:
        Image.new("RGB", (64, 64)).save(folder / "captioned.png")
        captioned = [(folder / "captioned.png", PROMPTS[0])]
    validation_prompts = [prompt for prompt in PROMPTS for _ in range(options.validation_images_per_prompt)]
    inputs = Inputs(512 if case.is_full_size else 64, PROMPTS, validation_prompts, captioned)
    batches = Batches(options, inputs, models, ACCELERATOR, range(1))
    if case.is_full_size:  # the text encoder is a tiny one all the same
        width, dtype = SIZES["full"]["clip"]["width"], DTYPES[case.precision]
        embeds = {"encoder_hidden_states": torch.zeros(77, width, dtype=dtype)}
        batches.embeds = dict.fromkeys(batches.embeds, embeds)
    return batches


# ----------------------------------------------------------------------------------------------------- faults


def add_fault(fault: str, models: Models, batches: list[MicroBatch]) -> None:
    """Put a mistake into the step, most of them by way of its reward."""
    reward, layer = models.rewards.rewards["imagereward"], models.base.unet.conv_out

    def with_syncs(images: Tensor, prompts: list[str]) -> Tensor:
        total = images.mean().item()  # a read
        if images.isfinite().all():  # a read
            total += sum(images.flatten()[:2].tolist())  # a read
        total += images.detach().cpu().mean()  # a read
        return reward(images, prompts) + total + torch.tensor([0.5], device=DEVICE)  # a blocking upload

    faulty_rewards: dict[str, Callable[[Tensor, list[str]], Tensor]] = {
        "syncs": with_syncs,
        "float64": lambda images, prompts: reward(images.double(), prompts),
        "CPU tensor": lambda images, prompts: reward(images, prompts) + torch.zeros(len(prompts)),
        "boolean mask": lambda images, prompts: reward(images, prompts) + images[images > 0.5].sum(),
    }
    if fault in faulty_rewards:
        models.rewards.rewards["imagereward"] = faulty_rewards[fault]
    elif fault == "batch on the CPU":
        for batch in batches:
            batch.to = lambda device, batch=batch: batch
    elif fault == "float16 LoRA":
        for matrix in models.lora:
            matrix.data = matrix.data.half()
    elif fault == "float32 layer":
        layer.weight = torch.nn.Parameter(layer.weight.float(), requires_grad=False)
    else:
        raise ValueError(fault)


# ------------------------------------------------------------------------------------------------------- runs


def optimizer_step(folder: Path, case: Case) -> Report:
    """An optimizer step as refl_lora.py's loop makes it, from micro-batches on the CPU to logged numbers."""
    options = make_options(folder, case)
    models = load(options, case)
    with fake_cuda() as observer:
        to_cuda(models, options)
        updater = Updater(options, models, ACCELERATOR, Progress(), fp16=case.precision == "fp16")
        micro_batches = make_batches(folder, options, models, case).micro_batches(0)
        if case.fault:
            add_fault(case.fault, models, micro_batches)
        observer.forget()
        step = refl_lora.refl_step(
            models, micro_batches, options.grad_scale, options.reward_target, options.decode_batch_size,
            options.rollout_batch_size, updater.scaler.scale, observer.phase, options.noise_distance_weight,
            options.pretrain_weight,
        )  # fmt: skip
        micro_steps = list(step)
        report = Report(observer.syncs.copy(), observer.float64.copy())
        report.dtypes = {phase: set(dtypes) for phase, dtypes in observer.dtypes.items()}
        report.gradients = {(g.device.type, g.dtype) for _, gradients in micro_steps for g in gradients}
        observer.forget()
        accumulated = updater.accumulate(micro_steps)
        update = updater(accumulated, stop_requested=False)
        report.update_syncs = observer.syncs.copy()
        observer.forget()
        Metrics(options, models.rewards, ACCELERATOR)(accumulated, update, {"total": 1.0})
        report.metrics_syncs = observer.syncs.copy()
        moments = [
            own[name] for own in updater.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
        ]
        assert len(moments) == 2 * len(models.lora), "AdamW has made no update"
        report.lora = {(tensor.device.type, tensor.dtype) for tensor in (*models.lora, *moments)}
        return report


def validation(folder: Path, case: Case) -> Report:
    """A validation of two prompts, two images each."""
    options = make_options(folder, case)
    models = load(options, case)
    with fake_cuda() as observer:
        to_cuda(models, options)
        batches = make_batches(folder, options, models, case)
        validator = Validator(options, models, batches, ACCELERATOR, refl_lora.rollout)
        observer.forget()
        validated = validator(0, SimpleNamespace(is_open=False))
        assert validated.images.shape == (4, 3, 64, 64) and validated.images.is_cuda
        return Report(observer.syncs, observer.float64)

"""One optimizer step, a validation and a move to the GPU on fake CUDA tensors, for test_fake_cuda.py.

The functions run in the process that `fake_cuda.start_process` makes; results travel back by pickle.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import refl_lora
from refl.model import offload
from refl.model.lean import make_lean
from refl.model.lora import add_lora
from refl.model.stable_diffusion import load_stable_diffusion
from refl.reward import rewards
from refl.system import randomness

import torch
from fake_cuda import DEVICE, fake_cuda, to_fake
from random_checkpoint import SIZES, make_reward, make_unet, make_vae
from refl.model.ddpm import Ddpm
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROMPTS = ["a red cat", "three green apples"]
NUM_STEPS = 2


@dataclass
class Case:
    """Settings of a training step, and a fault to be put into it."""

    precision: str = "bf16"
    guidance: tuple[float, float] = (1.0, 1.0)
    lora_in_uncond: bool = True
    gradient_checkpointing: bool = False
    low_memory: bool = False
    noise_distance_weight: float = 0.0
    pretrain_weight: float = 0.0
    held_out: bool = False
    is_proven: bool = True  # the rewards have passed the checks of their first gradient
    stops: tuple[int, ...] = (0,)  # of the micro-batches
    is_full_size: bool = False  # SD-1.4 and ImageReward at 512 x 512, instead of tiny models
    fault: str | None = None


@dataclass
class Report:
    """What a run on fake CUDA tensors did."""

    syncs: Counter  # in `refl_step` or `validate`: "operation, file:line" -> times
    float64: Counter  # the same, of operations with a float64 result
    update_syncs: Counter = field(default_factory=Counter)  # from there to the end of the optimizer step
    dtypes: dict[str, set[torch.dtype]] = field(default_factory=dict)  # phase -> those of its matrix products
    gradients: set[tuple[str, torch.dtype]] = field(default_factory=set)  # (device type, dtype)
    lora: set[tuple[str, torch.dtype]] = field(default_factory=set)  # the same, of LoRA and optimizer state


# ------------------------------------------------------------------------------------------- models and data


def load(folder: Path, case: Case) -> refl_lora.Models:
    """Models as training loads them, on the CPU; at full size without values."""
    dtype, cpu = DTYPES[case.precision], torch.device("cpu")
    parts = load_stable_diffusion(folder / "stable-diffusion-v1-4", dtype, cpu)
    judge = rewards.load("imagereward", folder, cpu, dtype)
    if case.is_full_size:
        with torch.device("meta"):
            unet, vae = make_unet(SIZES["full"]), make_vae(SIZES["full"])
            reward = make_reward(SIZES["full"], judge.rewards["imagereward"].tokenizer)
        parts.unet, parts.vae = unet.to(parts.unet.dtype), vae.to(parts.vae.dtype)
        for tower in (reward.vision, reward.text):
            tower.to(dtype)
        judge.rewards["imagereward"] = reward
        for model in (unet, vae, reward):
            model.requires_grad_(False).eval()
    models = refl_lora.Models(
        unet=parts.unet,
        lora=add_lora(parts.unet, 4, 4, 0),
        vae=parts.vae,
        rewards=judge,
        ddpm=Ddpm(parts.scheduler_config, NUM_STEPS),
        guidance=case.guidance,
        lora_in_uncond=case.lora_in_uncond,
        held_out=rewards.load("imagereward", folder, cpu, dtype) if case.held_out else None,
    )
    for model in (models.unet, models.vae):
        make_lean(model)
        if case.gradient_checkpointing or case.low_memory:
            model.enable_gradient_checkpointing()
    if case.is_proven:
        models.rewards.proven.add("imagereward")
    return models


def to_cuda(models: refl_lora.Models, low_memory: bool) -> None:
    """Put the models on the fake GPU; with `low_memory` only the LoRA, all else into pinned memory."""
    frozen = [models.unet, models.vae, *models.rewards.modules()]
    frozen += models.held_out.modules() if models.held_out else []
    for model in frozen:
        to_fake(model, torch.device("cpu") if low_memory else DEVICE)
    models.lora = [matrix for matrix in models.unet.parameters() if matrix.requires_grad]
    models.ddpm.timesteps = torch.empty_like(models.ddpm.timesteps, device=DEVICE)
    if low_memory:
        for matrix in models.lora:
            matrix.data = matrix.data.to(DEVICE)
        models.present = partial(offload.visit, DEVICE)
        for model in frozen:
            offload.pin(model)


def embeds(case: Case, chosen: list[str]) -> Tensor:
    """Embeddings of prompts on the CPU, shaped as `MicroBatch.prompt_embeds`."""
    width = SIZES["full" if case.is_full_size else "tiny"]["clip"]["width"]
    shape = (len(chosen), 77, width) if case.guidance == (1.0, 1.0) else (2, len(chosen), 77, width)
    return torch.zeros(shape, dtype=DTYPES[case.precision])


def micro_batches(case: Case) -> list[refl_lora.MicroBatch]:
    """One micro-batch of two images for each of `case.stops`, on the CPU and real, as training has them."""
    side = SIZES["full" if case.is_full_size else "tiny"]["sample_size"]
    noise = randomness.noise((1,), range(2), (NUM_STEPS, 4, side, side))
    pretraining = None
    if case.pretrain_weight:
        text = embeds(replace(case, guidance=(1.0, 1.0)), PROMPTS)
        pretraining = refl_lora.Pretraining(noise[:, 0], torch.tensor([1, 500]), text, noise[:, 1])
    return [
        refl_lora.MicroBatch(PROMPTS, embeds(case, PROMPTS), noise, stop, pretraining=pretraining)
        for stop in case.stops
    ]


# ----------------------------------------------------------------------------------------------------- faults


def add_fault(fault: str, models: refl_lora.Models, batches: list[refl_lora.MicroBatch]) -> None:
    """Put a mistake into the step, most of them by way of its reward."""
    reward = models.rewards.rewards["imagereward"]

    def with_syncs(images: Tensor, prompts: list[str]) -> Tensor:
        total = images.mean().item()  # a read
        if images.isfinite().all():  # a read
            total += sum(images.flatten()[:2].tolist())  # a read
        total += images.detach().cpu().mean()  # a read
        return reward(images, prompts) + total + torch.tensor([0.5], device=DEVICE)  # a blocking upload

    rewards_with_faults = {
        "syncs": with_syncs,
        "float64": lambda images, prompts: reward(images.double(), prompts),
        "CPU tensor": lambda images, prompts: reward(images, prompts) + torch.zeros(len(prompts)),
        "boolean mask": lambda images, prompts: reward(images, prompts) + images[images > 0.5].sum(),
    }
    if fault in rewards_with_faults:
        models.rewards.rewards["imagereward"] = rewards_with_faults[fault]
    elif fault == "batch on the CPU":
        for batch in batches:
            batch.to = lambda device, batch=batch: batch
    elif fault == "float16 LoRA":
        for matrix in models.lora:
            matrix.data = matrix.data.half()
    elif fault == "float32 layer":
        layer = models.unet.conv_out
        layer.weight = torch.nn.Parameter(layer.weight.float(), requires_grad=False)
    else:
        raise ValueError(fault)


# ------------------------------------------------------------------------------------------------------- runs


def optimizer_step(folder: Path, case: Case) -> Report:
    """All of an optimizer step from micro-batches on the CPU to the updated LoRA."""
    models, batches = load(folder, case), micro_batches(case)
    with fake_cuda() as observer:
        to_cuda(models, case.low_memory)
        if case.fault:
            add_fault(case.fault, models, batches)
        optimizer = torch.optim.AdamW(models.lora)
        scaler = torch.amp.GradScaler("cuda", enabled=case.precision == "fp16")
        observer.forget()
        found = list(
            refl_lora.refl_step(
                models, batches, 0.01, 2.0, 2, 8, scaler.scale, observer.phase,
                case.noise_distance_weight, case.pretrain_weight,
            )
        )  # fmt: skip
        in_step = observer.syncs.copy(), observer.float64.copy()
        observer.syncs.clear()
        update(models, optimizer, scaler, found)
        state = [value for own in optimizer.state.values() for name, value in own.items() if name != "step"]
        assert len(state) == 2 * len(models.lora), "AdamW made no update"
        return Report(
            *in_step,
            update_syncs=observer.syncs,
            dtypes={phase: set(dtypes) for phase, dtypes in observer.dtypes.items()},
            gradients={(g.device.type, g.dtype) for _, gradients in found for g in gradients},
            lora={(tensor.device.type, tensor.dtype) for tensor in (*models.lora, *state)},
        )


def update(models, optimizer, scaler, found) -> None:
    """The rest of an optimizer step, as training makes it."""
    gradients = [torch.zeros_like(matrix) for matrix in models.lora]
    for _, own in found:
        torch._foreach_add_(gradients, own)
    loss = torch.stack([result.loss for result, _ in found]).sum()
    told = torch.tensor(0.0, device=DEVICE)
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), torch.stack([loss, told])])
    *flat, ends = (flat / len(found)).split([*(matrix.numel() for matrix in models.lora), 2])
    ends.tolist()
    for matrix, gradient in zip(models.lora, flat, strict=True):
        matrix.grad = gradient.view_as(matrix)
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(models.lora, 1.0).item()
    scaler.step(optimizer)
    scaler.update()


def validation(folder: Path, case: Case) -> Report:
    """The validation of two prompts, two images each."""
    models = load(folder, case)
    accelerator = SimpleNamespace(
        process_index=0, num_processes=1, device=DEVICE, gather=lambda tensor: tensor
    )
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    with fake_cuda() as observer:
        to_cuda(models, case.low_memory)
        observer.forget()
        found = refl_lora.validate(models, prompts, 2, partial(embeds, case), (4, 8, 8), 0, 2, accelerator)
        assert found.scores.shape == (1, len(prompts))
        return Report(observer.syncs, observer.float64)

"""Reward Feedback Learning (ReFL) with LoRA: teach Stable Diffusion what people prefer by backpropagating a
reward.

Algorithm 1 of Xu et al. 2023 (arXiv 2304.05977), reward part. For each batch of prompts c:

    x_T ~ N(0, I),  k ~ U{min_stop, ..., max_stop}
    x_T -> x_k by DDPM, without gradient
    eps = unet(x_k, t_k, c);  x0 = (x_k - sqrt(1 - abar_k) eps) / sqrt(abar_k)
    r = ImageReward(c, decode(x0))
    loss = grad_scale * mean(relu(reward_target - r))
    one step of AdamW on the LoRA matrices

Departures from the published code, each for a reason:

- Trains a LoRA in float32 and keeps the model frozen; the pretraining loss, which protected what is frozen
  here, only with --pretrain_data.
- The gradient is taken in two stages: d loss / d x0 through reward and decoder, a few images at a time,
  then d x0 / d LoRA through the UNet. The same chain rule for one more UNet forward, about 2 % of a step, and
  the two largest graphs never exist together. The micro-batches of an optimizer step are rolled out together.
- k and all noise are pure functions of (seed, step, micro-step, sample): k is the same on every process, so
  that none waits for another's longer rollout; noise never is.
- x0 is computed, not sampled; the reward and its normalisation stay in float32; its resize is antialiased.
- Prompts are encoded once, before training.
- Nothing random has a state and the learning rate is a function of the updates made, so that a run that is
  resumed, by the same command, is the run that was not stopped.

Start it with train_refl_lora.sh. `refl_lora.py --help` explains every option.
"""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from refl.model import offload
from refl.model.ddpm import Ddpm
from refl.model.folder import resolution_of
from refl.model.lean import lora_cast_once, lora_off, make_lean
from refl.model.lora import KOHYA_FILE, LORA_FILE, add_lora, pack_lora, to_kohya, unpack_lora
from refl.model.stable_diffusion import decode, encode, encode_prompts, load_stable_diffusion, vae_factor
from refl.preflight import doctor
from refl.report import card
from refl.report.log import Phases, write_image, write_options, write_scalars
from refl.report.sheets import MAX_IMAGES, sheet
from refl.reward import rewards
from refl.reward.rewards import WeightedRewards
from refl.system import checkpoints, devices, randomness
from refl.system.errors import UserError, is_first_process, run_as_command
from refl.system.files import write_whole
from refl.system.images import to_pil
from refl.system.prompts import prompt_index, read_prompts
from refl.system.signals import Stopped, StopSignals
from refl.train import progress as progress_module
from refl.train.captioned import read_captioned, read_square
from refl.train.guard import Guard, ValidationMeans
from refl.train.options import Options, read_options, to_save, what_decides
from refl.train.progress import Progress, pack_optimizer, pack_state, unpack_optimizer

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

BEST = "best"  # folder of the best LoRA so far, inside --output_dir
BEST_LORA = "best_lora_weights.safetensors"  # the same in a checkpoint, which goes on from it
ENOUGH_IMAGES = 64  # for --early_stop to tell a change from chance

# ---------------------------------------------------------------------------------------------- one ReFL step


@dataclass
class Models:
    """What a step computes with. Only `lora`, matrices inside `unet`, is trained."""

    unet: torch.nn.Module
    lora: list[torch.nn.Parameter]
    vae: torch.nn.Module
    rewards: WeightedRewards
    ddpm: Ddpm
    guidance: tuple[float, float] = (1.0, 1.0)  # scale in the rollout, and at the step that gets the gradient
    lora_in_uncond: bool = True
    held_out: WeightedRewards | None = None
    present: Callable[..., AbstractContextManager] = lambda *models: nullcontext()
    """Has the given models on the device for a block, where they are not always there."""


@dataclass
class MicroBatch:
    """Images that share a stop index and one gradient."""

    prompts: list[str]
    prompt_embeds: Tensor  # (B, tokens, width); for guidance (2, B, tokens, width), the empty prompt's first
    noise: Tensor  # (B, > stop, C, h, w): x_T first, then that of each denoising step
    stop: int
    weight: float = 1.0  # of its reward's gradient
    pretraining: "Pretraining | None" = None

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on `device`; a GPU copies it while it does other things."""
        return replace(
            self,
            prompt_embeds=devices.send(self.prompt_embeds, device),
            noise=devices.send(self.noise, device),
            pretraining=self.pretraining and self.pretraining.to(device),
        )


@dataclass
class Pretraining:
    """Captioned images with noise, and what the model is to say of them."""

    latents: Tensor  # (B, C, h, w), noised to `timesteps` (B,)
    timesteps: Tensor
    prompt_embeds: Tensor  # (B, tokens, width)
    noise: Tensor  # (B, C, h, w)

    def to(self, device: torch.device) -> "Pretraining":
        return Pretraining(*(devices.send(tensor, device) for tensor in vars(self).values()))


@dataclass
class StepResult:
    """What a micro-batch found, nothing of it attached to a graph."""

    loss: Tensor  # (), grad_scale * mean over the micro-batch, and regularisers
    scores: Tensor  # (K, B), of each reward by itself, not weighted
    rewards: Tensor  # (B,), their weighted sum
    saturated: Tensor  # (), share of colour values that decode outside [0, 1], where the gradient is zero
    regularisers: dict[str, Tensor] = field(default_factory=dict)  # () each, not weighted


def predict_noise(
    models: Models, latents: Tensor, index: int, prompt_embeds: Tensor, guidance_scale: float
) -> Tensor:
    """eps(x_t, t, c), (B, C, h, w), at denoising step `index`; guided (Ho & Salimans 2022, eq. 6, with
    guidance_scale = 1 + w) unless `guidance_scale` is 1.

    The UNet computes in the precision of `prompt_embeds`, shaped as in `MicroBatch`.
    """
    t, sample = models.ddpm.timesteps[index], latents.to(prompt_embeds.dtype)
    if guidance_scale == 1:
        embeds = prompt_embeds if prompt_embeds.ndim == 3 else prompt_embeds[1]
        return models.unet(sample, t, embeds).sample.to(latents.dtype)
    if models.lora_in_uncond:
        eps = models.unet(sample.repeat(2, 1, 1, 1), t, prompt_embeds.flatten(0, 1)).sample
        eps_empty, eps_prompt = eps.to(latents.dtype).chunk(2)
    else:
        with torch.no_grad(), lora_off(models.unet):
            eps_empty = models.unet(sample, t, prompt_embeds[0]).sample.to(latents.dtype)
        eps_prompt = models.unet(sample, t, prompt_embeds[1]).sample.to(latents.dtype)
    return eps_empty + guidance_scale * (eps_prompt - eps_empty)


@torch.no_grad()
def rollout(models: Models, batches: Sequence[MicroBatch]) -> list[tuple[Tensor, Tensor]]:
    """DDPM from x_T to each batch's stop index: its x_k, and the x0 that this lets expect, (B, C, h, w).

    All batches go together, which fills a GPU better, and each leaves where it stops.
    """
    going = sorted(batches, key=lambda batch: batch.stop, reverse=True)  # the next to leave is the last
    latents = torch.cat([batch.noise[:, 0] for batch in going])
    prompt_embeds = torch.cat([batch.prompt_embeds for batch in going], dim=-3)
    found = {}
    with models.present(models.unet), lora_cast_once(models.unet):
        for index in range(going[0].stop + 1):
            # Those that go on and, at the end, those that stop here, may be guided differently.
            stopping = sum(len(batch.prompts) for batch in going if batch.stop == index)
            sizes = [len(latents) - stopping, stopping] if len(set(models.guidance)) == 2 else [len(latents)]
            rows = zip(
                latents.split(sizes), prompt_embeds.split(sizes, dim=-3), models.guidance, strict=False
            )
            eps = torch.cat(
                [
                    predict_noise(models, own, index, embeds, guidance_scale)
                    for own, embeds, guidance_scale in rows
                    if len(own)
                ]
            )
            while going and going[-1].stop == index:
                size = len(going[-1].prompts)
                x0 = models.ddpm.predict_x0(latents[-size:], eps[-size:], index)
                found[id(going.pop())] = latents[-size:], x0
                latents, eps, prompt_embeds = latents[:-size], eps[:-size], prompt_embeds[..., :-size, :, :]
            if going:
                noise = torch.cat([batch.noise[:, index + 1] for batch in going])
                latents = models.ddpm.step(latents, eps, index, noise)
    return [found[id(batch)] for batch in batches]


def saturated_share(images: Tensor) -> Tensor:
    """Share of each image's colour values, (B,), that decode outside [0, 1]."""
    return ((images < 0) | (images > 1)).float().mean((1, 2, 3))


def x0_gradient(
    models: Models,
    batch: MicroBatch,
    x0: Tensor,
    grad_scale: float,
    reward_target: float | None,
    decode_batch_size: int = 1,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    phase: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
) -> tuple[StepResult, Tensor]:
    """Loss of a micro-batch, and scale(d loss / d x0), (B, C, h, w), through reward and decoder."""
    losses, scores, gradients, saturated = [], [], [], []
    for start in range(0, len(x0), decode_batch_size):
        chunk = slice(start, start + decode_batch_size)
        leaf = x0[chunk].detach().requires_grad_()
        with phase("decode"):
            images = decode(models.vae, leaf)  # (b, 3, H, W)
        with phase("reward"):
            own_scores = models.rewards(images.clamp(0, 1), batch.prompts[chunk])  # (K, b)
            reward = models.rewards.total(own_scores)  # (b,)
            shortfall = -reward if reward_target is None else (reward_target - reward).relu()
            loss = grad_scale * shortfall.sum() / len(x0)
        with phase("backward"):
            gradients += torch.autograd.grad(scale(loss), leaf)
        losses.append(loss.detach())
        scores.append(own_scores.detach())
        saturated.append(saturated_share(images).mean())
        del images, own_scores, reward, shortfall, loss  # and with them the rest of the graph
    scores = torch.cat(scores, dim=1)  # (K, B)
    result = StepResult(
        loss=torch.stack(losses).sum(),
        scores=scores,
        rewards=models.rewards.total(scores),
        saturated=torch.stack(saturated).mean(),
    )
    return result, torch.cat(gradients)


def lora_gradient(
    models: Models,
    batch: MicroBatch,
    latents: Tensor,
    upstream: Tensor,
    noise_distance_weight: float = 0.0,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    phase: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """d loss / d LoRA = <upstream, d x0 / d LoRA> through the UNet, one for each matrix; `upstream` is
    d loss / d x0. With the gradient of the distance to the base model's noise, and that distance, if it has a
    weight."""
    at_stop = latents, batch.stop, batch.prompt_embeds, models.guidance[1]
    if noise_distance_weight:
        with phase("grad_step"), torch.no_grad(), lora_off(models.unet):
            base_eps = predict_noise(models, *at_stop)
    with phase("grad_step"):
        eps = predict_noise(models, *at_stop)
        x0 = models.ddpm.predict_x0(latents, eps, batch.stop)
    if not noise_distance_weight:
        with phase("backward"):
            return torch.autograd.grad(x0, models.lora, upstream), {}
    distance = (eps - base_eps).square().mean()
    with phase("backward"):
        losses, upstreams = (x0, scale(noise_distance_weight * distance)), (upstream, None)
        gradients = torch.autograd.grad(losses, models.lora, upstreams)
    return gradients, {"noise_distance": distance.detach()}


def pretraining_gradient(
    models: Models, batch: Pretraining, weight: float, scale: Callable[[Tensor], Tensor]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """d / d LoRA of weight * ||eps - eps(z_t, t, c)||^2, the diffusion model's own loss, and that loss."""
    sample = batch.latents.to(batch.prompt_embeds.dtype)
    eps = models.unet(sample, batch.timesteps, batch.prompt_embeds).sample
    loss = (eps.to(batch.noise.dtype) - batch.noise).square().mean()
    return torch.autograd.grad(scale(weight * loss), models.lora), loss.detach()


def refl_step(
    models: Models,
    batches: Sequence[MicroBatch],
    grad_scale: float,
    reward_target: float | None,
    decode_batch_size: int = 1,
    rollout_batch_size: int = 1,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    phase: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
    noise_distance_weight: float = 0.0,
    pretrain_weight: float = 0.0,
) -> Iterator[tuple[StepResult, tuple[Tensor, ...]]]:
    """What each micro-batch of an optimizer step finds, and scale(d loss / d LoRA) of it, for each matrix.

    About `rollout_batch_size` images go together: x_T -> x_k and x0 for all, then d loss / d x0, then
    d loss / d LoRA. `scale` keeps small gradients from vanishing in float16 (a GradScaler's); `phase` times
    its block. Regularisers with a weight are part of the loss.
    """
    device = models.lora[0].device
    together = max(1, rollout_batch_size // len(batches[0].prompts))
    for start in range(0, len(batches), together):
        group = [batch.to(device) for batch in batches[start : start + together]]
        with phase("rollout"):
            rolled_out = rollout(models, group)
        with models.present(models.vae, *models.rewards.modules()):
            judged = [
                x0_gradient(models, batch, x0, grad_scale, reward_target, decode_batch_size, scale, phase)
                for batch, (_, x0) in zip(group, rolled_out, strict=True)
            ]
        with models.present(models.unet):
            for batch, (latents, _), (result, upstream) in zip(group, rolled_out, judged, strict=True):
                gradients, found = lora_gradient(
                    models, batch, latents, upstream * batch.weight, noise_distance_weight, scale, phase
                )
                if batch.pretraining:
                    with phase("pretraining"):
                        more, found["pretraining"] = pretraining_gradient(
                            models, batch.pretraining, pretrain_weight, scale
                        )
                    gradients = torch._foreach_add(gradients, more)
                weights = {"noise_distance": noise_distance_weight, "pretraining": pretrain_weight}
                added = sum(weights[name] * value for name, value in found.items())
                yield replace(result, loss=result.loss + added, regularisers=found), tuple(gradients)


# ------------------------------------------------------------------------------------------------- validation


@dataclass
class Validation:
    """Images of prompts that are not trained on, P prompts, N images, those of a prompt side by side."""

    images: Tensor  # (N, 3, H, W) uint8
    scores: Tensor  # (K, N), of each reward
    held_out: Tensor | None  # (H, N), of each reward that is not trained on, if there is one
    saturated: Tensor  # (N,), share of colour values that decode outside [0, 1]
    diversity: Tensor | None  # (P,), of the images of each prompt, if the rewards can tell


@torch.no_grad()
def validate(
    models: Models, prompts: list[str], images_per_prompt: int, embeds: Callable[[list[str]], Tensor],
    noise_shape: tuple[int, ...], seed: int, batch_size: int, accelerator: Accelerator,
) -> Validation:  # fmt: skip
    """Draw an image for each of N prompts, always from the same noise, and judge them; a prompt is there
    `images_per_prompt` times in a row.

    The processes share the work; each returns the whole.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    own = range(rank, math.ceil(len(prompts) / world) * world, world)  # padded: every process draws as many
    images, judged, device = [], [], accelerator.device
    last = len(models.ddpm.timesteps) - 1
    guidance_scale = next((scale for scale in models.guidance if scale != 1), 1.0)
    guided = replace(models, guidance=(guidance_scale, guidance_scale))
    judges = [judge for judge in (models.rewards, models.held_out) if judge]
    for start in range(0, len(own), batch_size):
        indices = [index % len(prompts) for index in own[start : start + batch_size]]
        chosen = [prompts[index] for index in indices]
        noise = randomness.noise((randomness.VALIDATION, seed), indices, (last + 1, *noise_shape))
        batch = MicroBatch(chosen, embeds(chosen), noise, last).to(device)
        [(_, x0)] = rollout(guided, [batch])
        with models.present(models.vae, *(module for judge in judges for module in judge.modules())):
            for latent, prompt in zip(x0, chosen, strict=True):
                image = decode(models.vae, latent[None])
                columns = [saturated_share(image)[:, None]]
                image = image.clamp(0, 1)
                columns += [judge(image, [prompt]).T for judge in judges]  # (1, K), (1, H)
                if images_per_prompt > 1 and (features := models.rewards.features(image)) is not None:
                    columns.append(features)  # (1, width)
                judged.append(torch.cat([column.float() for column in columns], dim=1))
                images.append((image * 255).round().byte())
    order = torch.arange(len(own) * world).view(world, len(own)).T.flatten()[: len(prompts)].to(device)
    images = accelerator.gather(torch.cat(images))[order]
    judged = accelerator.gather(torch.cat(judged))[order].cpu()  # (N, 1 + K + H + width)
    sizes = [1, *(len(judge.weights) for judge in judges)]
    saturated, *scores, features = judged.split([*sizes, judged.shape[1] - sum(sizes)], dim=1)
    of_prompts = features.unflatten(0, (-1, images_per_prompt))  # (P, n, width), or of width 0
    return Validation(
        images=images,
        scores=scores[0].T,
        held_out=scores[1].T if models.held_out else None,
        saturated=saturated[:, 0],
        diversity=rewards.diversity(of_prompts) if features.numel() else None,
    )


# ------------------------------------------------------------------------------------------------------- main


def make_optimizer(options: Options, lora: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, its state in 8 bits if so asked."""
    if options.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as AdamW
    else:
        from torch.optim import AdamW
    return AdamW(
        lora,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
    )


def resume(
    options: Options, accelerator: Accelerator, decides: dict
) -> tuple[Progress, dict[str, bytes] | None]:
    """`resume` by the first process, which tells the others, also if it raises `UserError`."""
    found = None
    if accelerator.is_main_process:
        where, allow_changed = options.resume_from_checkpoint, options.allow_changed_options
        try:
            found = progress_module.resume(Path(options.output_dir), where, decides, allow_changed)
        except UserError as error:
            found = error
    [found] = broadcast_object_list([found])
    if isinstance(found, UserError):
        raise found
    return found


def one_ahead(function: Callable, items: Iterable) -> Iterator:
    """function(item) for each, the next one computed by another thread while one is used."""
    with ThreadPoolExecutor(1) as worker:
        waiting = None
        for item in items:
            ready, waiting = waiting, worker.submit(function, item)
            if ready:
                yield ready.result()
        if waiting:
            yield waiting.result()


def step_numbers(
    results: list[StepResult],
    batches: list[MicroBatch],
    norms: list[Tensor],
    seconds: dict[str, float],
    device: torch.device,
) -> dict[str, Tensor]:
    """What one process has to log of an optimizer step, by tag; () each, to be averaged over processes."""
    numbers = {
        f"gradient_norm_by_stop/{k}": torch.stack(
            [norm for norm, batch in zip(norms, batches, strict=True) if batch.stop == k]
        ).mean()
        for k in sorted({batch.stop for batch in batches})
    }
    for name in results[0].regularisers:
        values = [result.regularisers[name] for result in results]
        numbers[f"regularisers/{name}"] = torch.stack(values).mean()
    numbers["images/saturated"] = torch.stack([result.saturated for result in results]).mean()
    numbers |= {f"seconds/{name}": torch.tensor(value) for name, value in seconds.items()}
    numbers["memory/peak_gib"] = torch.tensor(devices.peak_memory(device))
    return numbers


def main() -> None:
    """Options, models, data, loop, save."""
    # ---- options
    options = read_options(sys.argv[1:])
    doctor.check(options, is_training=not options.check)
    resolution = resolution_of(options.pretrained_model_name_or_path, options.resolution)
    prompts = read_prompts(options.prompts)
    validation_prompts = [
        prompt
        for prompt in read_prompts(options.validation_prompts)[: options.num_validation_images]
        for _ in range(options.validation_images_per_prompt)
    ]
    captioned = read_captioned(options.pretrain_data) if options.pretrain_data else []
    if options.check:
        return
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=options.mixed_precision)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    weight_dtype = devices.DTYPES[accelerator.mixed_precision]
    if options.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU, no GPU being visible"
    accelerator.print(f"{world} process{'es' * (world > 1)} on {name}, frozen parts in {weight_dtype}")
    output = Path(options.output_dir)
    decides = what_decides(
        options, accelerator.mixed_precision, world, prompts, validation_prompts, captioned
    )
    progress, checkpoint = resume(options, accelerator, decides)
    saved_options = to_save(options)

    def lora_files(content: bytes, folder: Path) -> dict[Path, bytes]:
        files = {folder / LORA_FILE: content}
        if options.also_kohya:
            files[folder / KOHYA_FILE] = to_kohya(content)
        return files

    def save(files: dict[Path, bytes | str]) -> None:
        try:
            for file, content in files.items():
                file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(file, content)
        except OSError as error:
            raise UserError(
                f"{output} cannot be written: {error}. Make room and give the same command again."
            ) from error

    def finish(result: bytes, is_repeated: bool = False) -> None:
        """Put the run's result in its place, with a model card, if it is not there yet."""
        files = lora_files(result, output)
        is_there = all(file.exists() and file.read_bytes() == own for file, own in files.items())
        if is_repeated and is_there and (output / card.FILE).exists():
            return
        save(files | {output / "options.json": json.dumps(saved_options, indent=2) + "\n"})
        if not options.also_kohya:  # an earlier LoRA's
            (output / KOHYA_FILE).unlink(missing_ok=True)
        card.write_if_possible(output)

    guard = Guard.from_state(progress.guard if options.early_stop else {})
    progress.guard = guard.state()
    best_lora = checkpoint.get(BEST_LORA) if checkpoint and options.early_stop else None
    if checkpoint and (progress.step >= options.max_train_steps or guard.reason):
        if accelerator.is_main_process:  # it may have been ended between its last checkpoint and its LoRA
            finish(best_lora or checkpoint[LORA_FILE], is_repeated=True)
            stopped = f", where {guard.reason}" if guard.reason else ""
            print(f"finished before: {progress.step} steps{stopped}; LoRA in {output / LORA_FILE}")
        return
    if checkpoint:
        accelerator.print(f"going on after step {progress.step}")

    number = len(validation_prompts)
    is_unsure = number < ENOUGH_IMAGES or options.validation_images_per_prompt == 1
    if options.early_stop and is_unsure and not checkpoint:
        accelerator.print(
            f"note: --early_stop compares {number} images, and diversity from 2 of a prompt on; surer: "
            f"--num_validation_images {ENOUGH_IMAGES // 2} --validation_images_per_prompt 2"
        )

    # ---- models
    home = torch.device("cpu") if options.low_memory else device  # of the frozen models
    parts = load_stable_diffusion(options.pretrained_model_name_or_path, weight_dtype, home)
    lora_alpha = options.rank if options.lora_alpha is None else options.lora_alpha
    models = Models(
        unet=parts.unet,
        lora=add_lora(parts.unet, options.rank, lora_alpha, options.seed),
        vae=parts.vae,
        rewards=rewards.load(options.reward, options.reward_path, home, weight_dtype),
        ddpm=Ddpm(parts.scheduler_config, options.num_inference_steps, device),
        guidance=(
            1.0 if options.guidance_in == "gradient" else options.guidance_scale,
            1.0 if options.guidance_in == "rollout" else options.guidance_scale,
        ),
        lora_in_uncond=options.lora_in_uncond,
    )
    if options.held_out_reward:
        models.held_out = rewards.load(
            options.held_out_reward, options.reward_path, home, weight_dtype, "--held_out_reward"
        )
    frozen = [parts.unet, parts.vae, *models.rewards.modules()]
    frozen += models.held_out.modules() if models.held_out else []
    for model in (parts.unet, parts.vae):
        make_lean(model)
        if options.gradient_checkpointing or options.low_memory:
            model.enable_gradient_checkpointing()
    if options.low_memory:
        for matrix in models.lora:
            matrix.data = matrix.data.to(device)
        models.present = partial(offload.visit, device)
        if device.type == "cuda":
            for model in frozen:
                offload.pin(model)
    optimizer = make_optimizer(options, models.lora)
    schedule = get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=options.max_train_steps,
    ).lr_lambdas[0]  # updates made -> factor on the learning rate
    lora_up = [matrix for name, matrix in parts.unet.named_parameters() if "lora_B" in name]
    scaler = torch.amp.GradScaler(device.type, enabled=weight_dtype == torch.float16)
    if checkpoint:
        unpack_lora(parts.unet, checkpoint[LORA_FILE])
        unpack_optimizer(optimizer, checkpoint["optimizer.safetensors"])
        if scaler.is_enabled() and progress.scaler:
            scaler.load_state_dict(progress.scaler)

    # ---- data: which prompt each sample of the run gets is known beforehand, so only those are encoded
    batch, micro_steps = options.train_batch_size, options.gradient_accumulation_steps
    own = range(rank * batch, (rank + 1) * batch)  # this process's samples among those of all

    def batch_prompts(step: int, micro_step: int) -> list[str]:
        first = (step * micro_steps + micro_step) * batch * world
        return [prompts[prompt_index(options.seed, first + index, len(prompts))] for index in own]

    remaining = range(progress.step, options.max_train_steps)
    needed = {p for s in remaining for m in range(micro_steps) for p in batch_prompts(s, m)}
    needed = ["", *sorted(needed | set(validation_prompts) | {caption for _, caption in captioned})]
    encoded = encode_prompts(parts, needed)
    bar = tqdm(
        encoded, "encoding prompts", len(needed), unit="prompt", disable=not accelerator.is_main_process
    )
    with models.present(parts.text_encoder):
        cache = {prompt: embedding.cpu() for prompt, embedding in zip(needed, bar, strict=True)}
    parts.text_encoder = None

    def embeds(chosen: list[str]) -> Tensor:  # (B, tokens, width), or (2, B, tokens, width) for guidance
        embedded = torch.stack([cache[prompt] for prompt in chosen])
        if options.guidance_scale != 1:
            embedded = torch.stack([cache[""].expand_as(embedded), embedded])
        return embedded

    side = resolution // vae_factor(parts.vae)
    noise_shape = (parts.unet.config.in_channels, side, side)
    with models.present(parts.vae):
        files = tqdm(
            [file for file, _ in captioned], "encoding images", unit="image",
            disable=not captioned or not accelerator.is_main_process,
        )  # fmt: skip
        latents = [encode(parts.vae, read_square(file, resolution)).cpu() for file in files]
    parts.vae.encoder = None
    slopes = {k: models.ddpm.x0_slope(k) for k in range(options.min_stop, options.max_stop + 1)}

    def pretraining(step: int, micro_step: int) -> Pretraining:
        """Images for this process's share of a micro-step, noised."""
        first = (step * micro_steps + micro_step) * batch * world
        chosen = [prompt_index(options.seed, first + index, len(captioned)) for index in own]
        key = (options.seed, step, micro_step)
        noise = randomness.noise((randomness.PRETRAINING, *key), own, noise_shape)
        timesteps = randomness.timesteps((randomness.TIMESTEPS, *key), own, models.ddpm.num_train_timesteps)
        return Pretraining(
            models.ddpm.add_noise(torch.stack([latents[i] for i in chosen]), noise, timesteps),
            timesteps,
            torch.stack([cache[captioned[i][1]] for i in chosen]),
            noise,
        )

    def micro_batches(step: int) -> list[MicroBatch]:
        """This process's share of an optimizer step, on the CPU."""
        batches = []
        for micro_step in range(micro_steps):
            stop = randomness.stop_index(options.seed, step, micro_step, options.min_stop, options.max_stop)
            key = (randomness.NOISE, options.seed, step, micro_step)
            noise = randomness.noise(key, own, (stop + 1, *noise_shape))
            chosen = batch_prompts(step, micro_step)
            weight = sum(slopes.values()) / len(slopes) / slopes[stop] if options.normalize_by_stop else 1.0
            images = pretraining(step, micro_step) if captioned else None
            batches.append(MicroBatch(chosen, embeds(chosen), noise, stop, weight, images))
        return batches

    # ---- output
    writer = None
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        if options.report_to == "tensorboard":
            # Points that an earlier process wrote after its last checkpoint are taken back.
            purge_step = progress.step + 1 if checkpoint else 0
            writer = SummaryWriter(output / options.logging_dir, purge_step=purge_step)
            if not checkpoint:
                write_options(writer, saved_options)

    def log(write: Callable[[SummaryWriter], None]) -> None:
        """Write to TensorBoard's files, if there are any; a full disk is no reason to stop."""
        nonlocal writer
        try:
            if writer:
                write(writer)
        except OSError as error:
            tqdm.write(f"WARNING: the curves end here, they cannot be written: {error}", file=sys.stderr)
            writer = None

    def lora_metadata() -> dict:
        return {
            "step": progress.step,
            "rank": options.rank,
            "lora_alpha": lora_alpha,
            "base_model": options.pretrained_model_name_or_path,
            "reward": options.reward,
            "resolution": resolution,
            "guidance_scale": options.guidance_scale,
            "guidance_in": options.guidance_in,
            "lora_in_uncond": options.lora_in_uncond,
            "sampler": "ddpm",
            "num_inference_steps": options.num_inference_steps,
        }

    def save_checkpoint() -> bool:
        """True if it is on the disk, or another process's business."""
        if not accelerator.is_main_process:
            return True
        log(lambda writer: writer.flush())  # its points up to here are then as safe as the checkpoint
        files = {
            LORA_FILE: pack_lora(parts.unet, lora_metadata()),
            "optimizer.safetensors": pack_optimizer(optimizer),
            checkpoints.STATE: pack_state(progress, decides, saved_options),
        } | ({BEST_LORA: best_lora} if best_lora else {})
        try:
            checkpoints.write(output, progress.step, files)
        except OSError as error:
            tqdm.write(
                f"WARNING: checkpoint-{progress.step} could not be saved: {error}. Earlier checkpoints are "
                "whole. Make room: the next one will be tried as usual.",
                file=sys.stderr,
            )
            return False
        try:
            checkpoints.prune(output, progress.step, options.checkpoints_total_limit)
        except OSError as error:
            tqdm.write(f"WARNING: old checkpoints could not be deleted: {error}.", file=sys.stderr)
        return True

    def is_validated(step: int) -> bool:
        every = options.validation_steps
        return every > 0 and (step % every == 0 or step == options.max_train_steps)

    def by_prompt(values: Tensor) -> list[float]:
        """Means over the images of each validation prompt."""
        return values.unflatten(0, (-1, options.validation_images_per_prompt)).mean(1).tolist()

    def show_best() -> None:
        """Write the best LoRA so far where people find it."""
        try:
            save(lora_files(best_lora, output / BEST))
        except UserError as error:
            tqdm.write(f"WARNING: {error} The next checkpoint will hold it.", file=sys.stderr)

    def show_validation(step: int) -> None:
        nonlocal best_lora
        found = validate(
            models, validation_prompts, options.validation_images_per_prompt, embeds, noise_shape,
            options.seed, batch, accelerator,
        )  # fmt: skip
        total = models.rewards.total(found.scores)  # (N,)
        if options.early_stop:
            held_out = models.held_out and by_prompt(models.held_out.total(found.held_out))
            diversity = None if found.diversity is None else found.diversity.tolist()
            is_best = guard.update(
                ValidationMeans(step, by_prompt(total), by_prompt(found.saturated), held_out, diversity)
            )
            progress.guard = guard.state()
            if is_best and accelerator.is_main_process:
                best_lora = pack_lora(parts.unet, lora_metadata())
                show_best()
        if writer:
            captions = [f"{own:+.2f}  {p}" for own, p in zip(total, validation_prompts, strict=True)]
            shown = slice(MAX_IMAGES)
            images = [to_pil(image / 255) for image in found.images[shown]]
            image = sheet(images, captions[shown], f"step {step}")
            means = models.rewards.means(found.scores) | {"reward": total.mean().item()}
            means["saturated"] = found.saturated.mean().item()
            if found.held_out is not None:
                means |= models.held_out.means(found.held_out)
            if found.diversity is not None:
                means["diversity"] = found.diversity.mean().item()
            means = {f"validation/{name}": mean for name, mean in means.items()}
            log(lambda writer: write_image(writer, "validation/images", image, step))
            log(lambda writer: write_scalars(writer, means, step))
        progress.validation = total.mean().item()
        if progress.first_validation is None:
            progress.first_validation = progress.validation

    def own_gradients(batches: list[MicroBatch]) -> tuple[list[StepResult], list[Tensor], list[Tensor]]:
        """This process's micro-batches: what each found, its gradient's norm; the sum of the gradients."""
        results, norms = [], []
        gradients = [torch.zeros_like(matrix) for matrix in models.lora]
        for result, own in refl_step(
            models,
            batches,
            options.grad_scale,
            options.reward_target,
            options.decode_batch_size,
            options.rollout_batch_size,
            scaler.scale,
            phase,
            options.noise_distance_weight,
            options.pretrain_weight,
        ):
            torch._foreach_add_(gradients, own)
            norms.append(torch.nn.utils.get_total_norm(own))
            results.append(result)
        return results, norms, gradients

    def update(results: list[StepResult], gradients: list[Tensor]) -> tuple[float, float, float, bool]:
        """One optimizer step, the same on every process; its loss, gradient norm, learning rate, and whether
        any process was told to stop.

        All processes' gradients and losses meet in one reduction. One that is not finite, on whichever
        process, is so for all after it, and all skip the step.
        """
        scale = scaler.get_scale()
        loss = torch.stack([result.loss for result in results]).sum()
        told = torch.tensor(float(signals.received is not None), device=device)
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), torch.stack([loss, told])])
        *flat, ends = accelerator.reduce(flat / micro_steps, reduction="mean").split(
            [*(matrix.numel() for matrix in models.lora), 2]
        )
        loss, told = ends.tolist()
        for matrix, gradient in zip(models.lora, flat, strict=True):
            matrix.grad = (
                gradient.view_as(matrix) if math.isfinite(loss) else torch.full_like(matrix, math.nan)
            )
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(models.lora, options.max_grad_norm).item()
        learning_rate = options.learning_rate * schedule(progress.updates)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        is_finite = math.isfinite(grad_norm)
        if is_finite or scaler.is_enabled():  # a scaler steps only if finite, and else lowers the scale
            scaler.step(optimizer)
            scaler.update()
        if is_finite and options.lora_shrinkage:
            with torch.no_grad():  # B alone: what the LoRA adds is B A x
                torch._foreach_mul_(lora_up, 1 - options.lora_shrinkage)
        progress.step += 1
        progress.updates += is_finite
        # A float16 gradient may overflow for a few steps until its scale has found its size.
        is_overflow = scaler.is_enabled() and math.isfinite(loss) and scale > 1
        progress.nonfinite_in_a_row = 0 if is_finite or is_overflow else progress.nonfinite_in_a_row + 1
        progress.nonfinite += not (is_finite or is_overflow)
        if is_finite or is_overflow:
            progress.scaler = scaler.state_dict()
        return loss, grad_norm, learning_rate, told > 0

    # ---- loop
    phase = Phases(device)
    bar = tqdm(
        remaining, "ReFL", options.max_train_steps, initial=progress.step, unit="step",
        disable=not accelerator.is_main_process,
    )  # fmt: skip
    started, saved_step = time.perf_counter(), progress.step
    signals = StopSignals(immediate=world == 1)
    ending = None  # a Stopped or a UserError if the run ends before its last step
    try:
        if best_lora and accelerator.is_main_process:
            show_best()
        if is_validated(0) and not checkpoint:
            show_validation(0)
        for step, batches in zip(bar, one_ahead(micro_batches, remaining), strict=True):
            step_started, scale = time.perf_counter(), scaler.get_scale()
            with signals.interruptible():
                results, norms, gradients = own_gradients(batches)
            with phase("optimizer"):
                loss, grad_norm, learning_rate, is_told = update(results, gradients)

            # ---- log: one reduction and one gather for all numbers of all processes
            seconds = phase.pop() | {"total": time.perf_counter() - step_started}
            norms = [norm / scale / options.grad_scale for norm in norms]
            numbers = step_numbers(results, batches, norms, seconds, device)
            vector = torch.stack([number.float().to(device) for number in numbers.values()])
            values = dict(zip(numbers, accelerator.reduce(vector, reduction="mean").tolist(), strict=True))
            scores = torch.cat([result.scores for result in results], dim=1)
            scores = accelerator.gather(scores.T.contiguous()).T.float().cpu()  # (K, images of the step)
            total, means = models.rewards.total(scores), models.rewards.means(scores)
            values |= {
                "loss": loss,
                "reward/mean": total.mean().item(),
                "reward/std": total.std(correction=0).item(),
                "reward/min": total.min().item(),
                "reward/max": total.max().item(),
                "gradient_norm": grad_norm / options.grad_scale,
                "learning_rate": learning_rate,
                "nonfinite_steps": progress.nonfinite,
            }
            values |= {f"reward/{name}": mean for name, mean in means.items()}
            if options.reward_target is not None:
                above = values["reward/above_target"] = (total > options.reward_target).float().mean().item()
                if step == 0 and above == 1:
                    accelerator.print(
                        f"note: every image is above --reward_target {options.reward_target} (mean "
                        f"{total.mean():.2f}) and gets no gradient; raise it, or take None."
                    )
            values |= {
                f"images_per_second/{name}": len(total) / values[f"seconds/{name}"] for name in seconds
            }
            values = {tag: value for tag, value in values.items() if math.isfinite(value)}
            log(lambda writer: write_scalars(writer, values, step + 1))  # noqa: B023, called at once
            if total.isfinite().all():
                log(lambda writer: writer.add_histogram("reward/histogram", total, step + 1))  # noqa: B023
            bar.set_postfix(reward=f"{total.mean():+.3f}", loss=f"{loss:.2e}", lr=f"{learning_rate:.1e}")
            if progress.nonfinite_in_a_row:
                broken = [name for name, mean in means.items() if not math.isfinite(mean)]
                what = f"loss {loss:.2e}, gradient norm {grad_norm:.2e}" + "".join(f", {n}" for n in broken)
                accelerator.print(f"warning: step {step + 1} skipped: not finite ({what})", file=sys.stderr)
                if progress.nonfinite_in_a_row >= options.max_nonfinite_steps:
                    progress.forget_nonfinite_steps()
                    ending = UserError(
                        f"{options.max_nonfinite_steps} steps in a row had a loss or a gradient that is "
                        f"not finite. The state before them, after step {progress.step}, is kept. Go back "
                        "to an earlier checkpoint by --resume_from_checkpoint, with a lower --learning_rate "
                        "or --mixed_precision no, and --allow_changed_options."
                    )
                    break

            # ---- validate, then save, so that no validation is lost or doubled
            if is_validated(step + 1):
                show_validation(step + 1)
            is_due = options.checkpointing_steps and (step + 1) % options.checkpointing_steps == 0
            if (is_due or is_told or guard.reason) and save_checkpoint():
                saved_step = step + 1
            if guard.reason:
                accelerator.print(f"stopped early after step {step + 1}: {guard.reason}")
                break
            if is_told:
                raise Stopped(signals.received or signal.SIGTERM)
    except (Stopped, UserError) as stopped:
        ending = stopped
    except RuntimeError as error:  # what a collective raises when another process has ended
        if not isinstance(error, torch.distributed.DistBackendError) and "gloo/transport" not in str(error):
            raise
        if signals.received:
            ending = Stopped(signals.received)
        else:
            ending = UserError(
                f"another process ended, so this one stopped after step {progress.step}. The other said why, "
                "if it could; the same command goes on from here."
            )
    bar.close()

    # ---- save
    if progress.step != saved_step and save_checkpoint():
        saved_step = progress.step
    log(lambda writer: writer.close())
    if isinstance(ending, Stopped):
        again = "the same command" + " without --resume_from_checkpoint" * (
            options.resume_from_checkpoint != "latest"
        )
        accelerator.print(
            f"stopped by {ending.name} after {progress.step} steps; {again} goes on after step {saved_step}"
        )
        sys.exit(ending.exit_code)
    if ending:
        raise ending
    if accelerator.is_main_process:
        finish(best_lora or pack_lora(parts.unet, lora_metadata()))
        seconds, done = time.perf_counter() - started, progress.step - remaining.start
        best = guard.best.step if guard.best else progress.step
        which = "" if best == progress.step else f" is that of step {best}, the best,"
        print(f"{done} steps in {seconds:.0f} s; LoRA{which} in {output / LORA_FILE}")
        if progress.validation is not None:
            reached = float(np.mean(guard.best.rewards)) if which else progress.validation
            print(f"validation reward {progress.first_validation:+.3f} -> {reached:+.3f}")
    accelerator.end_training()


def memory_advice() -> str:
    """What to do when the GPU's memory does not suffice."""
    if not is_first_process():
        return "python -m refl doctor, with the same options, says what others would need."
    options = read_options(sys.argv[1:])
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    options.mixed_precision = options.mixed_precision or launched
    print("out of GPU memory; counting what other options would need ...", file=sys.stderr, flush=True)
    return doctor.memory_advice(options)


if __name__ == "__main__":
    run_as_command(main, memory_advice)

"""The data of a run: prompts, noise and gradient plan of every sample, as pure functions of the step."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from refl.model.conditioning import Conditioning, Embeds
from refl.model.folder import resolution_of
from refl.system import devices, randomness
from refl.system.prompts import prompt_index, read_prompts
from refl.system.randomness import Stream
from refl.train.captioned import read_captioned, read_square
from refl.train.models import Models
from refl.train.options import Options
from refl.train.plan import Plan, draw_plan

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm


@dataclass
class Inputs:
    """What a run reads from the user's files."""

    resolution: int  # pixels a side
    prompts: list[str]  # to train on
    validation_prompts: list[str]  # each one validation_images_per_prompt times in a row
    captioned: list[tuple[Path, str]]  # images of --pretrain_data with their captions


def read_inputs(options: Options) -> Inputs:
    """Read prompts and captions; raises `UserError` with the place of a mistake."""
    validation_prompts = read_prompts(options.validation_prompts)[: options.num_validation_images]
    return Inputs(
        resolution=resolution_of(options.pretrained_model_name_or_path, options.resolution),
        prompts=read_prompts(options.prompts),
        validation_prompts=[
            prompt for prompt in validation_prompts for _ in range(options.validation_images_per_prompt)
        ],
        captioned=read_captioned(options.pretrain_data) if options.pretrain_data else [],
    )


@dataclass
class Pretraining:
    """Noised latents of captioned images with the target of the denoising loss."""

    latents: Tensor  # (B, C, h, w), noised to `timesteps`
    timesteps: Tensor  # (B,), of training
    conditioning: Conditioning
    target: Tensor  # (B, C, h, w), what the network should predict

    def to(self, device: torch.device) -> "Pretraining":
        """The same on `device`."""
        return Pretraining(
            devices.send(self.latents, device),
            devices.send(self.timesteps, device),
            self.conditioning.to(device),
            devices.send(self.target, device),
        )


@dataclass
class MicroBatch:
    """B samples that share a gradient plan."""

    prompts: list[str]
    conditioning: Conditioning
    noise: Tensor  # (B, len(plan.timesteps), C, h, w): x_T first, then that of each step
    plan: Plan
    pretraining: Pretraining | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on `device`; a GPU copies it asynchronously."""
        return replace(
            self,
            conditioning=self.conditioning.to(device),
            noise=devices.send(self.noise, device),
            pretraining=self.pretraining and self.pretraining.to(device),
        )


class Batches:
    """This process's share of every optimizer step.

    Making it encodes all prompts that the remaining steps need, and the captioned images, and frees both
    encoders.
    """

    def __init__(
        self, options: Options, inputs: Inputs, models: Models, accelerator: Accelerator, steps: range
    ):
        self.options, self.inputs, self.models, self.steps = options, inputs, models, steps
        size, rank = options.train_batch_size, accelerator.process_index
        self.global_batch_size = size * accelerator.num_processes
        self.indices = range(rank * size, (rank + 1) * size)  # this process's samples of a micro-step
        self.noise_shape = models.base.latent_shape(inputs.resolution)
        self.embeds = self._encode_prompts(is_quiet=not accelerator.is_main_process)
        self.latents = self._encode_images(is_quiet=not accelerator.is_main_process)

    def __iter__(self) -> Iterator[tuple[int, list[MicroBatch]]]:
        """Yield each remaining optimizer step and its micro-batches, prepared one step ahead by a thread."""
        yield from zip(self.steps, _one_ahead(self.micro_batches, self.steps), strict=True)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This process's share of an optimizer step, on the CPU."""
        return [self._micro_batch(step, index) for index in range(self.options.gradient_accumulation_steps)]

    def condition(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of prompts that were encoded; with the empty prompt's where guidance is used."""
        is_guided = self.options.guidance_scale != 1 or self.options.drawn_with != 1
        empty = self.embeds[""] if is_guided else None
        return Conditioning.stack([self.embeds[prompt] for prompt in prompts], empty)

    def _micro_batch(self, step: int, micro_step: int) -> MicroBatch:
        key = (self.options.seed, step, micro_step)
        plan = draw_plan(self.options, self.models.schedule, step, micro_step)
        noise_key = (Stream.NOISE, *key)
        prompts = self._prompts(step, micro_step)
        return MicroBatch(
            prompts=prompts,
            conditioning=self.condition(prompts),
            noise=randomness.noise(noise_key, self.indices, (len(plan.timesteps), *self.noise_shape)),
            plan=plan,
            pretraining=self._pretraining(step, micro_step) if self.latents else None,
        )

    def _choose(self, step: int, micro_step: int, length: int) -> list[int]:
        """Which of `length` items each of this process's samples gets."""
        first = (step * self.options.gradient_accumulation_steps + micro_step) * self.global_batch_size
        return [prompt_index(self.options.seed, first + index, length) for index in self.indices]

    def _prompts(self, step: int, micro_step: int) -> list[str]:
        prompts = self.inputs.prompts
        return [prompts[index] for index in self._choose(step, micro_step, len(prompts))]

    def _pretraining(self, step: int, micro_step: int) -> Pretraining:
        schedule, key = self.models.schedule, (self.options.seed, step, micro_step)
        chosen = self._choose(step, micro_step, len(self.latents))
        latents = torch.stack([self.latents[index] for index in chosen])
        noise = randomness.noise((Stream.PRETRAINING, *key), self.indices, self.noise_shape)
        timesteps = randomness.timesteps(
            (Stream.TIMESTEPS, *key), self.indices, len(schedule.training_alphas_cumprod)
        )
        return Pretraining(
            latents=schedule.add_noise(latents, noise, timesteps),
            timesteps=timesteps,
            conditioning=Conditioning.stack([self.embeds[self.inputs.captioned[i][1]] for i in chosen]),
            target=schedule.training_target(latents, noise, timesteps),
        )

    def _encode_prompts(self, is_quiet: bool) -> dict[str, Embeds]:
        """Embeddings on the CPU of every prompt that this process will need; frees the text encoder."""
        base, micro_steps = self.models.base, range(self.options.gradient_accumulation_steps)
        needed, everything = set(), set(self.inputs.prompts)
        for step, micro_step in product(self.steps, micro_steps):
            if len(needed) == len(everything):  # usual in long runs
                break
            needed.update(self._prompts(step, micro_step))
        needed |= {*self.inputs.validation_prompts, *(caption for _, caption in self.inputs.captioned)}
        ordered = ["", *sorted(needed)]
        bar = tqdm(
            base.encode_prompts(ordered), "encoding prompts", len(ordered), unit="prompt", disable=is_quiet
        )
        with self.models.on_device(base.text_encoder):
            embeds = {
                prompt: {name: tensor.cpu() for name, tensor in own.items()}
                for prompt, own in zip(ordered, bar, strict=True)
            }
        base.text_encoder = None
        return embeds

    def _encode_images(self, is_quiet: bool) -> list[Tensor]:
        """Latents on the CPU of the captioned images, (C, h, w) each; frees the VAE's encoder."""
        base, files = self.models.base, [file for file, _ in self.inputs.captioned]
        bar = tqdm(files, "encoding images", unit="image", disable=is_quiet or not files)
        with self.models.on_device(base.vae):
            latents = [base.encode(read_square(file, self.inputs.resolution)).cpu() for file in bar]
        base.vae.encoder = None
        return latents


def _one_ahead(function: Callable, items: Iterable) -> Iterator:
    """Yield function(item) for each item; a thread computes the next one while one is used."""
    with ThreadPoolExecutor(1) as worker:
        waiting = None
        for item in items:
            ready, waiting = waiting, worker.submit(function, item)
            if ready:
                yield ready.result()
        if waiting:
            yield waiting.result()

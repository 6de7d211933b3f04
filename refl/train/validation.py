"""Validation: images of prompts that are not trained on, always from the same noise, scored."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from refl.report.log import Log
from refl.report.sheets import MAX_IMAGES, sheet
from refl.reward import rewards
from refl.system import randomness
from refl.system.images import saturated_share, to_pil
from refl.system.randomness import Stream
from refl.train.batches import Batches, MicroBatch
from refl.train.models import Models
from refl.train.options import Options
from refl.train.plan import to_stop
from refl.train.trajectory import Trajectory

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

Rollout = Callable[[Models, Sequence[MicroBatch]], list[Trajectory]]  # of refl_lora.py


@dataclass
class Validation:
    """N images of P prompts, those of a prompt side by side, with their scores."""

    images: Tensor  # (N, 3, H, W) uint8
    rewards: Tensor  # (N,), weighted sum of the rewards that are trained on
    held_out: Tensor | None  # (N,), weighted sum of the held-out rewards
    saturated: Tensor  # (N,), share of colour values that decode outside [0, 1]
    diversity: Tensor | None  # (P,), of each prompt's images, where the rewards can measure it
    means: dict[str, float]  # by measure: each reward, held out or not, and those above
    images_per_prompt: int

    def by_prompt(self, values: Tensor) -> list[float]:
        """Means over the images of each prompt, of values (N,)."""
        return values.unflatten(0, (-1, self.images_per_prompt)).mean(1).tolist()

    def sheet(self, prompts: list[str], title: str) -> Image.Image:
        """The first images with reward and prompt below each."""
        captions = [f"{reward:+.2f}  {p}" for reward, p in zip(self.rewards, prompts, strict=True)]
        images = [to_pil(image / 255) for image in self.images[:MAX_IMAGES]]
        return sheet(images, captions[:MAX_IMAGES], title)


class Validator:
    """Draws and scores the validation prompts; the processes share the work."""

    def __init__(
        self, options: Options, models: Models, batches: Batches, accelerator: Accelerator, rollout: Rollout
    ):
        self.options, self.batches, self.accelerator, self.rollout = options, batches, accelerator, rollout
        self.prompts = batches.inputs.validation_prompts
        self.models = replace(models, guidance=(options.drawn_with, options.drawn_with))
        self.scorers = [scorer for scorer in (models.rewards, models.held_out) if scorer]

    def is_due(self, step: int) -> bool:
        """Whether to validate after `step` optimizer steps."""
        every = self.options.validation_steps
        return every > 0 and (step % every == 0 or step == self.options.max_train_steps)

    @torch.no_grad()
    def __call__(self, step: int, log: Log) -> Validation:
        """Validate after `step` optimizer steps and log it; every process returns the whole."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        # Padded, so that every process draws as many.
        shares = range(rank, math.ceil(len(self.prompts) / world) * world, world)
        size = self.options.train_batch_size
        drawn = [self._draw(shares[start : start + size]) for start in range(0, len(shares), size)]
        images, measured = (torch.cat([tensor for pair in drawn for tensor in pair[part]]) for part in (0, 1))
        images, measured = (self.accelerator.gather(tensor) for tensor in (images, measured))
        order = torch.arange(len(shares) * world).view(world, len(shares)).T.flatten()[: len(self.prompts)]
        order = order.to(images.device)
        validation = self._summarise(images[order], measured[order].cpu())
        if log.is_open:
            log.image("validation/images", validation.sheet(self.prompts, f"step {step}"), step)
            log.scalars({f"validation/{name}": mean for name, mean in validation.means.items()}, step)
        return validation

    def _draw(self, indices: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Images, (1, 3, H, W) uint8, and measures, (1, 1 + K + H + width), of some of the prompts."""
        indices = [index % len(self.prompts) for index in indices]
        prompts = [self.prompts[index] for index in indices]
        last = len(self.models.schedule.timesteps) - 1
        noise_key = (Stream.VALIDATION, self.options.seed)
        noise = randomness.noise(noise_key, indices, (last + 1, *self.batches.noise_shape))
        batch = MicroBatch(
            prompts, self.batches.condition(prompts), noise, to_stop(self.models.schedule, last)
        )
        [trajectory] = self.rollout(self.models, [batch.to(self.accelerator.device)])
        images, measured = [], []
        modules = [module for scorer in self.scorers for module in scorer.modules()]
        with self.models.on_device(self.models.base.vae, *modules):
            for latents, prompt in zip(trajectory.state.x0, prompts, strict=True):
                image = self.models.base.decode(latents[None])
                measured.append(self._measure(image, prompt))
                images.append((image.clamp(0, 1) * 255).round().byte())
        return images, measured

    def _measure(self, image: Tensor, prompt: str) -> Tensor:
        """Saturation, every reward and, where diversity is wanted, features: (1, 1 + K + H + width)."""
        columns = [saturated_share(image)[:, None]]
        image = image.clamp(0, 1)
        with rewards.embedding_once():
            columns += [scorer(image, [prompt]).T for scorer in self.scorers]  # (1, K), (1, H)
            if self.options.validation_images_per_prompt > 1:
                features = self.models.rewards.features(image)  # (1, width), or None
                columns += [] if features is None else [features]
        return torch.cat([column.float() for column in columns], dim=1)

    def _summarise(self, images: Tensor, measured: Tensor) -> Validation:
        sizes = [1, *(len(scorer.weights) for scorer in self.scorers)]
        saturated, *scores, features = measured.split([*sizes, measured.shape[1] - sum(sizes)], dim=1)
        totals = [scorer.total(own.T) for scorer, own in zip(self.scorers, scores, strict=True)]
        features = features.unflatten(0, (-1, self.options.validation_images_per_prompt))  # (P, n, width)
        diversity = rewards.diversity(features) if features.numel() else None
        first, *others = zip(self.scorers, scores, strict=True)
        means = first[0].means(first[1].T) | {"reward": totals[0].mean().item()}
        means["saturated"] = saturated.mean().item()
        for scorer, own in others:
            means |= scorer.means(own.T)
        if diversity is not None:
            means["diversity"] = diversity.mean().item()
        return Validation(
            images=images,
            rewards=totals[0],
            held_out=totals[1] if len(totals) > 1 else None,
            saturated=saturated[:, 0],
            diversity=diversity,
            means=means,
            images_per_prompt=self.options.validation_images_per_prompt,
        )

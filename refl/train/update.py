"""The optimizer step: sum, reduce, clip, AdamW; a step that is not finite is skipped on every process."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from refl.train.models import Models
from refl.train.options import Options
from refl.train.progress import Progress, pack_optimizer, unpack_optimizer

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor


@dataclass
class Accumulated:
    """This process's gradients of one optimizer step, one for each term of each micro-batch."""

    results: list[Any]  # of each gradient, with its loss
    norms: list[Tensor]  # () each, of the scaled gradient
    gradients: list[Tensor]  # scaled, summed, one for each LoRA matrix
    scale: float  # of the gradients: the GradScaler's in float16, else 1


@dataclass
class Update:
    """One optimizer step, the same on every process."""

    loss: float  # mean over processes and gradients
    grad_norm: float  # before clipping
    learning_rate: float
    stop_requested: bool  # by a signal to any process


class Updater:
    """AdamW on the LoRA, the same on every process; gradients are scaled where the models are in float16."""

    def __init__(
        self, options: Options, models: Models, accelerator: Accelerator, progress: Progress, fp16: bool
    ):
        self.options, self.accelerator, self.progress = options, accelerator, progress
        self.lora, self.lora_up = models.lora, models.lora_up
        self.optimizer = make_optimizer(options, models.lora)
        # optimizer updates made -> factor on the learning rate
        self.schedule = get_scheduler(
            options.lr_scheduler,
            self.optimizer,
            num_warmup_steps=options.lr_warmup_steps,
            num_training_steps=options.max_train_steps,
        ).lr_lambdas[0]
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=fp16)

    def accumulate(self, results: Iterable[tuple[Any, tuple[Tensor, ...]]]) -> Accumulated:
        """Sum the gradients of (result, scaled LoRA gradients) pairs."""
        accumulated = Accumulated([], [], [torch.zeros_like(m) for m in self.lora], self.scaler.get_scale())
        for result, gradients in results:
            torch._foreach_add_(accumulated.gradients, gradients)
            accumulated.norms.append(torch.nn.utils.get_total_norm(gradients))
            accumulated.results.append(result)
        return accumulated

    def __call__(self, accumulated: Accumulated, stop_requested: bool) -> Update:
        """Reduce over processes, clip, and step; or skip, where loss or gradient is not finite."""
        loss, stop_requested = self._reduce(accumulated, stop_requested)
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.lora, self.options.max_grad_norm).item()
        learning_rate = self.options.learning_rate * self.schedule(self.progress.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        is_finite = math.isfinite(grad_norm)
        if is_finite or self.scaler.is_enabled():  # a scaler skips the step itself and lowers its scale
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if is_finite and self.options.lora_shrinkage:
            with torch.no_grad():
                torch._foreach_mul_(self.lora_up, 1 - self.options.lora_shrinkage)
        # A float16 gradient may overflow for a few steps, until the scale has come down.
        is_overflow = self.scaler.is_enabled() and math.isfinite(loss) and accumulated.scale > 1
        self.progress.record_step(is_finite, is_overflow, self.scaler.state_dict())
        return Update(loss, grad_norm, learning_rate, stop_requested)

    def pack(self) -> bytes:
        """The optimizer's state as a safetensors file."""
        return pack_optimizer(self.optimizer)

    def restore(self, content: bytes) -> None:
        """Restore the optimizer from `pack`, and the gradient scale from the run's progress."""
        unpack_optimizer(self.optimizer, content)
        if self.scaler.is_enabled() and self.progress.scaler:
            self.scaler.load_state_dict(self.progress.scaler)

    def _reduce(self, accumulated: Accumulated, stop_requested: bool) -> tuple[float, bool]:
        """Average gradients, loss and stop requests over processes in one reduction; set the gradients.

        A loss that is not finite on one process makes every process's gradient NaN.
        """
        loss = torch.stack([result.loss for result in accumulated.results]).sum()
        requested = torch.full((), float(stop_requested), device=loss.device)  # torch.tensor would wait
        flat = torch.cat([*(g.flatten() for g in accumulated.gradients), torch.stack([loss, requested])])
        flat = self.accelerator.reduce(flat / len(accumulated.results), reduction="mean")
        *gradients, ends = flat.split([*(matrix.numel() for matrix in self.lora), 2])
        loss, requested = ends.tolist()
        for matrix, gradient in zip(self.lora, gradients, strict=True):
            is_usable = math.isfinite(loss)
            matrix.grad = gradient.view_as(matrix) if is_usable else torch.full_like(matrix, math.nan)
        return loss, requested > 0


def make_optimizer(options: Options, lora: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, with its state in 8 bits for --use_8bit_adam."""
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

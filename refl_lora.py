"""Reward Feedback Learning (ReFL) with LoRA: teach Stable Diffusion human preference through a reward.

Algorithm 1 of Xu et al. 2023 (arXiv 2304.05977), reward part. For each batch of prompts c:

    x_T ~ N(0, I),  k ~ U{min_stop, ..., max_stop}
    x_T -> x_k by DDPM, without gradient                                  rollout
    eps = unet(x_k, t_k, c);  x0 = (x_k - sqrt(1 - abar_k) eps) / sqrt(abar_k)
    r = ImageReward(c, decode(x0))
    loss = grad_scale * mean(relu(reward_target - r))                     x0_gradient
    one step of AdamW on the LoRA matrices                                lora_gradient, Updater

Departures from the published code:

- Trains a float32 LoRA and keeps the model frozen. The pretraining loss, which protected weights that are
  frozen here, is optional (--pretrain_data).
- Takes the gradient in two stages: d loss / d x0 through reward and decoder, a few images at a time, then
  d x0 / d LoRA through the UNet. By the chain rule it is the same gradient, for one more UNet forward (2 % of
  a step), and the two largest graphs never exist together. The micro-batches of an optimizer step share a
  rollout.
- Trains with guidance, because people draw with it (--preset published does not).
- Makes k and all noise pure functions of (seed, step, micro-step, sample). All processes share k, so that
  none waits for another's longer rollout; none shares noise.
- Computes x0 instead of sampling it; scores in float32, on images resized with antialiasing.
- Encodes prompts once, before training.
- Goes from x_T to x_k in fewer steps (--rollout_steps) or takes the gradient through more (--plan) if asked.
- Resumes bit for bit: no random state exists, and the learning rate is a function of the updates made.

Start it with train_refl_lora.sh. `refl_lora.py --help` explains every option.
"""

from refl.system.streams import protect_streams

if __name__ == "__main__":
    protect_streams()  # before the imports, which take seconds

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

from refl.model.lean import lora_cast_once, lora_off
from refl.preflight import doctor
from refl.system import devices
from refl.system.distributed import make_accelerator, process_group
from refl.system.errors import UserError, run_as_command
from refl.system.images import saturated_share
from refl.system.ownership import locks_released
from refl.system.signals import Stopped, StopSignals
from refl.system.timing import Phases
from refl.train.batches import Batches, MicroBatch, read_inputs
from refl.train.metrics import Metrics, nonfinite
from refl.train.models import Models, load_models
from refl.train.options import read_options
from refl.train.plan import Term
from refl.train.run import Run
from refl.train.trajectory import Trajectory, chain_gradient
from refl.train.update import Updater
from refl.train.validation import Validator

import torch
from torch import Tensor
from tqdm import tqdm

Gradients = tuple[Tensor, ...]  # one for each LoRA matrix


# ---------------------------------------------------------------------------------------------- one ReFL step


@dataclass
class StepResult:
    """Detached loss, scores and metrics of one gradient of a micro-batch."""

    loss: Tensor  # (), grad_scale * mean over the micro-batch, and weighted regularisers
    scores: Tensor  # (K, B), of each reward, not weighted
    rewards: Tensor  # (B,), their weighted sum
    saturated: Tensor  # (), share of colour values that decode outside [0, 1], where the gradient is zero
    stop: int | None = None  # index of the denoising step that predicted x0
    regularisers: dict[str, Tensor] = field(default_factory=dict)  # () each, not weighted


@torch.no_grad()
def rollout(models: Models, batches: Sequence[MicroBatch]) -> list[Trajectory]:
    """x_T -> x_k without gradient; keeps the states that get a gradient.

    All batches are denoised together, which fills a GPU better; each has its own timesteps and leaves after
    the last.
    """
    trajectories = [Trajectory(batch) for batch in batches]
    longest_first = sorted(trajectories, key=len, reverse=True)
    with models.on_device(models.base.unet), lora_cast_once(models.base.unet):
        for step in range(len(longest_first[0])):
            active = [own for own in longest_first if step < len(own)]
            outputs = models.predict_together([own.inputs(step, models.guidance) for own in active])
            for own, output in zip(active, outputs, strict=True):
                x0 = models.schedule.predict_x0(own.state.latents, output, own.plan.timesteps[step])
                own.advance(models.schedule, step, x0)
    return trajectories


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
    """The micro-batch's loss, and scale(d loss / d x0), (B, C, h, w), through reward and decoder."""
    losses, scores, saturated, gradients = [], [], [], []
    for start in range(0, len(x0), decode_batch_size):
        chunk = slice(start, start + decode_batch_size)
        leaf = x0[chunk].detach().requires_grad_()
        with phase("decode"):
            images = models.base.decode_for_gradient(leaf)  # (b, 3, H, W)
        with phase("reward"):
            chunk_scores = models.rewards(images.clamp(0, 1), batch.prompts[chunk])  # (K, b)
            reward = models.rewards.total(chunk_scores)  # (b,)
            shortfall = -reward if reward_target is None else (reward_target - reward).relu()
            loss = grad_scale * shortfall.sum() / len(x0)
        with phase("backward"):
            gradients += torch.autograd.grad(scale(loss), leaf)
        losses.append(loss.detach())
        scores.append(chunk_scores.detach())
        saturated.append(saturated_share(images).mean())
        del images, chunk_scores, reward, shortfall, loss  # and with them the rest of the graph
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
    trajectory: Trajectory,
    term: Term,
    upstream: Tensor,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    phase: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
    noise_distance_weight: float = 0.0,
    pretrain_weight: float = 0.0,
) -> tuple[Gradients, dict[str, Tensor]]:
    """d loss / d LoRA = <upstream, d x0 / d LoRA> through the UNet, where `upstream` is d loss / d x0.

    Adds the scaled gradients of the regularisers that have a weight, and returns their values, not weighted.
    """
    batch, timestep = trajectory.batch, trajectory.plan.timesteps[term.step]
    latents = trajectory.states[term.step].latents.detach().requires_grad_(term.depth > 1)
    at_stop = latents, timestep, batch.conditioning, models.guidance[1]
    losses, upstreams, regularisers = [], [upstream], {}
    if noise_distance_weight:  # before the graph below exists
        with phase("grad_step"), torch.no_grad(), lora_off(models.base.unet):
            base_output = models.predict(*at_stop)
    with phase("grad_step"):
        output = models.predict(*at_stop)
        losses.append(models.schedule.predict_x0(latents, output, timestep))
    if noise_distance_weight:  # ||eps - eps_base||^2, the distance to the base model's prediction
        distance = (output - base_output).square().mean()
        losses.append(scale(noise_distance_weight * distance))
        upstreams.append(None)
        regularisers["noise_distance"] = distance.detach()
    with phase("backward"):
        inputs = [*models.lora, latents] if term.depth > 1 else models.lora
        gradients = torch.autograd.grad(losses, inputs, upstreams)
    if term.depth > 1:  # DRaFT-K: x_k depends on the LoRA, too
        with phase("chain"):
            *gradients, of_latents = gradients
            through = chain_gradient(models, trajectory, term.steps[:-1], of_latents)
            gradients = torch._foreach_add(gradients, through)
    if batch.pretraining:  # ||eps - eps(z_t, t, c)||^2, the base model's own denoising loss
        with phase("pretraining"):
            noised = batch.pretraining
            output = models.base.denoise(noised.latents, noised.timesteps, noised.conditioning.prompt)
            loss = (output - noised.target).square().mean()
            denoising = torch.autograd.grad(scale(pretrain_weight * loss), models.lora)
            gradients = torch._foreach_add(gradients, denoising)
        regularisers["pretraining"] = loss.detach()
    return tuple(gradients), regularisers


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
) -> Iterator[tuple[StepResult, Gradients]]:
    """Yield result and scaled LoRA gradients, scale(d loss / d LoRA), for each term of each batch's plan.

    About `rollout_batch_size` images are rolled out together. `scale` keeps small gradients from underflowing
    in float16; `phase` times its block. Regularisers with a weight are part of the loss.
    """
    weights = {"noise_distance": noise_distance_weight, "pretraining": pretrain_weight}
    together = max(1, rollout_batch_size // len(batches[0].prompts))
    for start in range(0, len(batches), together):
        group = [batch.to(models.lora[0].device) for batch in batches[start : start + together]]
        with phase("rollout"):
            trajectories = rollout(models, group)
        terms = [(trajectory, term) for trajectory in trajectories for term in trajectory.plan.terms]
        with models.on_device(models.base.gradient_decoder, *models.rewards.modules()):
            settings = grad_scale, reward_target, decode_batch_size, scale, phase
            scored = [
                x0_gradient(models, trajectory.batch, trajectory.states[term.step].x0, *settings)
                for trajectory, term in terms
            ]
        with models.on_device(models.base.unet):
            for (trajectory, term), (result, upstream) in zip(terms, scored, strict=True):
                gradients, regularisers = lora_gradient(
                    models, trajectory, term, upstream * term.weight, scale, phase, *weights.values()
                )
                loss = result.loss + sum(weights[name] * value for name, value in regularisers.items())
                yield replace(result, stop=term.stop, loss=loss, regularisers=regularisers), gradients


# ------------------------------------------------------------------------------------------------------- main


@process_group()
@locks_released()
def main() -> None:
    """Options, models, data, loop, save."""
    # ---- options
    options = read_options(sys.argv[1:])
    doctor.check(options, is_training=not options.check)
    inputs = read_inputs(options)
    if options.check:
        return
    accelerator = make_accelerator(options.mixed_precision)
    device, world = accelerator.device, accelerator.num_processes
    dtype = devices.weight_dtype(accelerator.mixed_precision)
    devices.set_tf32(options.allow_tf32)
    torch.backends.cudnn.benchmark = True  # few sizes repeat
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU (no GPU is visible)"
    accelerator.print(f"{world} process{'' if world == 1 else 'es'} on {name}, frozen parts in {dtype}")
    run = Run(options, inputs, accelerator)
    if run.is_finished:
        run.finish_again()
        return
    run.announce()

    # ---- models, data
    models = load_models(options, device, dtype)
    updater = Updater(options, models, accelerator, run.progress, fp16=dtype == torch.float16)
    run.restore(models, updater)
    batches = Batches(options, inputs, models, accelerator, run.remaining)
    validator = Validator(options, models, batches, accelerator, rollout)
    metrics, phase = Metrics(options, models.rewards, accelerator), Phases(device)
    log = run.open_log()
    signals = StopSignals(immediate=world == 1)
    bar = tqdm(
        total=options.max_train_steps, desc="ReFL", initial=run.progress.step, unit="step",
        disable=not accelerator.is_main_process,
    )  # fmt: skip

    # ---- loop
    started, ending = time.perf_counter(), None
    try:
        run.write_best()
        if not run.is_resumed and validator.is_due(0):
            run.record_validation(validator(0, log), models)
        for step, micro_batches in batches:
            step_started = time.perf_counter()
            with signals.interruptible():
                accumulated = updater.accumulate(
                    refl_step(
                        models,
                        micro_batches,
                        options.grad_scale,
                        options.reward_target,
                        options.decode_batch_size,
                        options.rollout_batch_size,
                        updater.scaler.scale,
                        phase,
                        options.noise_distance_weight,
                        options.pretrain_weight,
                    )
                )
            with phase("optimizer"):
                update = updater(accumulated, stop_requested=signals.received is not None)
            seconds = phase.pop() | {"total": time.perf_counter() - step_started}
            values, rewards = metrics(accumulated, update, seconds)
            values["nonfinite_steps"] = run.progress.nonfinite

            # ---- log
            log.scalars({tag: value for tag, value in values.items() if math.isfinite(value)}, step + 1)
            if rewards.isfinite().all():
                log.histogram("reward/histogram", rewards, step + 1)
            bar.update()
            bar.set_postfix(
                reward=f"{values['reward/mean']:+.3f}",
                loss=f"{update.loss:.2e}",
                lr=f"{update.learning_rate:.1e}",
            )
            if step == 0 and values.get("reward/above_target") == 1:
                accelerator.print(
                    f"note: every image is above --reward_target {options.reward_target} (mean "
                    f"{rewards.mean():.2f}) and gets no gradient; raise it, or set it to None."
                )
            if run.progress.nonfinite_in_a_row:
                text = f"warning: step {step + 1} skipped: not finite ({nonfinite(values)})"
                accelerator.print(text, file=sys.stderr)
                run.check_nonfinite_steps()

            # ---- validate, then save, so that no validation is lost or repeated
            if validator.is_due(step + 1):
                run.record_validation(validator(step + 1, log), models)
            if run.is_checkpoint_due or update.stop_requested or run.guard.reason:
                log.flush()  # its points are then as safe as the checkpoint
                run.save_checkpoint(models, updater)
            if run.guard.reason:
                accelerator.print(f"stopped early after step {step + 1}: {run.guard.reason}")
                break
            if update.stop_requested:
                raise Stopped(signals.received or signal.SIGTERM)
    except (Stopped, UserError) as error:
        ending = error
    except RuntimeError as error:
        ending = run.ending(error, signals)
    bar.close()

    # ---- save
    if run.progress.step != run.saved_step:
        log.flush()
        run.save_checkpoint(models, updater)
    log.close()
    if isinstance(ending, Stopped):
        run.report_stop(ending)
        sys.exit(ending.exit_code)
    if ending:
        raise ending
    run.finish(models, time.perf_counter() - started)


if __name__ == "__main__":
    run_as_command(main, doctor.memory_advice_for_training)

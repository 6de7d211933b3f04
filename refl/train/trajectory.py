"""A micro-batch's way from noise to x0, and the gradient through several of its steps."""

from collections.abc import Sequence
from dataclasses import dataclass

from refl.model.conditioning import Conditioning
from refl.model.noise_schedule import NoiseSchedule
from refl.train.batches import MicroBatch
from refl.train.models import Models

import torch
from torch import Tensor


@dataclass
class State:
    """Samples at one step of a rollout; tensors are (B, C, h, w)."""

    latents: Tensor  # x_t
    previous_x0: Tensor | None = None  # as predicted one step before; None at the first step
    x0: Tensor | None = None  # as predicted at this step


class Trajectory:
    """The rollout of one micro-batch, step by step as its plan says; its length is the number of steps."""

    def __init__(self, batch: MicroBatch):
        self.batch, self.plan = batch, batch.plan
        self.state = State(batch.noise[:, 0])
        self.states: dict[int, State] = {}  # by step, those that get a gradient

    def __len__(self) -> int:
        return len(self.plan.timesteps)

    def inputs(self, step: int, guidance: tuple[float, float]) -> tuple[Tensor, int, Conditioning, float]:
        """What `Models.predict` needs, with the second scale of `guidance` where a step gets a gradient."""
        scale = guidance[step in self.plan.gradient_steps]
        return self.state.latents, self.plan.timesteps[step], self.batch.conditioning, scale

    def advance(self, schedule: NoiseSchedule, step: int, x0: Tensor) -> None:
        """Go on from `step`, where `x0` was predicted, to the latents of the next step, if there is one."""
        plan, self.state.x0 = self.plan, x0
        if step in plan.gradient_steps:
            self.states[step] = self.state
        if step + 1 == len(self):
            return
        noise = self.batch.noise[:, step + 1]
        if plan.timesteps[step + 1] == plan.timesteps[step]:
            latents = schedule.renoise(self.states[plan.terms[0].step].x0, noise, plan.timesteps[step])
        else:
            latents = self.step_from(schedule, step, self.state)
        self.state = State(latents, previous_x0=x0)

    def step_from(self, schedule: NoiseSchedule, step: int, state: State) -> Tensor:
        """Latents of the sampler one step after `state`."""
        plan, noise = self.plan, self.batch.noise[:, step + 1]
        return schedule.step(
            plan.timesteps, step, state.latents, state.x0, noise, plan.sampler, state.previous_x0
        )


def chain_gradient(
    models: Models, trajectory: Trajectory, steps: Sequence[int], upstream: Tensor
) -> list[Tensor]:
    """<upstream, d x / d LoRA> for the latents x to which `steps`, which follow each other, lead.

    Recomputes the steps from the last to the first, each from its state, and passes d loss / d state on from
    one to the other: one UNet graph at a time. The state of the first step counts as a constant.
    """
    gradients = [torch.zeros_like(matrix) for matrix in models.lora]
    of_latents, of_x0 = upstream, torch.zeros_like(upstream)  # d loss / d what a step computes
    for step in reversed(steps):
        timestep, known = trajectory.plan.timesteps[step], trajectory.states[step]
        inputs = [x.detach().requires_grad_() for x in (known.latents, known.previous_x0) if x is not None]
        state = State(*inputs)
        conditioning, guidance_scale = trajectory.batch.conditioning, models.guidance[1]
        output = models.predict(state.latents, timestep, conditioning, guidance_scale)
        state.x0 = models.schedule.predict_x0(state.latents, output, timestep)
        computed = trajectory.step_from(models.schedule, step, state), state.x0
        found = torch.autograd.grad(
            computed, [*models.lora, *inputs], (of_latents, of_x0), materialize_grads=True
        )
        torch._foreach_add_(gradients, found[: len(gradients)])
        of_latents, of_x0 = [*found[len(gradients) :], None][:2]
    return gradients

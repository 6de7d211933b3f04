"""The rollout: samplers against diffusers' schedulers, grids of timesteps, and batches denoised together."""

import math

import refl_lora
from refl.model.noise_schedule import NoiseSchedule
from refl.model.samplers import SAMPLERS
from refl.train.batches import MicroBatch
from refl.train.options import Options
from refl.train.plan import Plan, draw_plan, to_stop

import diffusers.schedulers.scheduling_ddpm as scheduling_ddpm
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from test_step import PROMPTS, build


def tensors(number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(number)]


@pytest.fixture
def scheduler_config(tiny) -> dict:
    return DDPMScheduler.load_config(tiny / "stable-diffusion-v1-4", subfolder="scheduler")


# ----------------------------------------------------------------------------------- samplers, noise schedule


@pytest.mark.parametrize("num_inference_steps", [1, 4, 20, 40, 50])
def test_ddpm_is_that_of_diffusers(scheduler_config, monkeypatch, num_inference_steps):
    scheduler = DDPMScheduler.from_config(scheduler_config, clip_sample=False)
    scheduler.set_timesteps(num_inference_steps)
    schedule = NoiseSchedule(scheduler_config, num_inference_steps)
    assert list(schedule.timesteps) == scheduler.timesteps.tolist()
    latents, eps, noise = tensors(3)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: noise)
    for index, t in enumerate(schedule.timesteps):
        theirs = scheduler.step(eps, t, latents)
        x0 = schedule.predict_x0(latents, eps, t)
        torch.testing.assert_close(x0, theirs.pred_original_sample, rtol=1e-4, atol=1e-5)
        if index + 1 < num_inference_steps:  # the last step has no timestep to go to
            stepped = schedule.step(schedule.timesteps, index, latents, x0, noise)
            torch.testing.assert_close(stepped, theirs.prev_sample, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 1.0), ("ddim", 0.0)])
@pytest.mark.parametrize("num_steps", [5, 8, 20])
def test_ddim_is_that_of_diffusers(scheduler_config, sampler, eta, num_steps):
    scheduler = DDIMScheduler.from_config(scheduler_config, clip_sample=False)
    scheduler.set_timesteps(num_steps)
    timesteps, schedule = scheduler.timesteps.tolist(), NoiseSchedule(scheduler_config, 40)
    latents, eps, noise = tensors(3)
    for index, t in enumerate(timesteps[:-1]):
        theirs = scheduler.step(eps, t, latents, eta=eta, variance_noise=noise).prev_sample
        x0 = schedule.predict_x0(latents, eps, t)
        stepped = schedule.step(timesteps, index, latents, x0, noise, sampler)
        torch.testing.assert_close(stepped, theirs, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(stepped, latents, atol=0.01)


@pytest.mark.parametrize(
    ("sampler", "algorithm"), [("dpm++", "dpmsolver++"), ("dpm++sde", "sde-dpmsolver++")]
)
@pytest.mark.parametrize(("stop", "num_steps"), [(30, 8), (39, 5), (39, 20)])
def test_dpm_solver_is_that_of_diffusers(scheduler_config, sampler, algorithm, stop, num_steps):
    schedule = NoiseSchedule(scheduler_config, 40)
    timesteps, _ = schedule.path([stop], num_steps)
    scheduler = DPMSolverMultistepScheduler.from_config(
        scheduler_config, algorithm_type=algorithm, lower_order_final=False
    )
    scheduler.set_timesteps(timesteps=list(timesteps))
    assert tuple(scheduler.timesteps.tolist()) == timesteps
    latents, *others = tensors(2 * len(timesteps))
    ours = theirs = latents
    previous_x0 = None
    for index, t in enumerate(timesteps[:-1]):
        eps, noise = others[2 * index : 2 * index + 2]
        theirs = scheduler.step(eps, t, theirs, variance_noise=noise).prev_sample
        x0 = schedule.predict_x0(ours, eps, t)
        first_order = schedule.step(timesteps, index, ours, x0, noise, sampler)
        ours = schedule.step(timesteps, index, ours, x0, noise, sampler, previous_x0)
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-3, atol=1e-4)
        assert (previous_x0 is None) == torch.equal(first_order, ours)
        previous_x0 = x0


def test_every_sampler_is_an_option():
    assert Options.__annotations__["rollout_sampler"].__args__ == tuple(SAMPLERS)


def test_forty_steps_are_the_published_ones(scheduler_config):
    schedule = NoiseSchedule(scheduler_config, 40)
    assert schedule.timesteps[:2] + schedule.timesteps[-2:] == (976, 951, 26, 1)
    slopes = [schedule.x0_slope(timestep) for timestep in schedule.timesteps]  # |d x0 / d eps|
    assert [round(slopes[k], 2) for k in (30, 33, 36, 38, 39)] == [0.63, 0.46, 0.29, 0.16, 0.04]


def test_clip_sample_is_never_on(scheduler_config):
    # diffusers' default for DDPM is to clip x0 to [-1, 1], which latents are not in.
    config = {key: value for key, value in scheduler_config.items() if key != "clip_sample"}
    latents = torch.full((1, 4, 8, 8), 5.0)
    assert NoiseSchedule(config, 40).predict_x0(latents, torch.zeros_like(latents), 1).min() > 4.9
    assert not NoiseSchedule({**config, "clip_sample": True}, 40).predict_x0(latents, latents, 1).max() <= 1


def test_x0_noised_anew_is_that_of_diffusers(scheduler_config):
    schedule = NoiseSchedule(scheduler_config, 40)
    x0, noise = tensors(2)
    theirs = schedule.add_noise(x0, noise, torch.tensor([226, 226]))
    torch.testing.assert_close(schedule.renoise(x0, noise, 226), theirs, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ paths


def test_a_path_without_number_is_the_grid(scheduler_config):
    schedule = NoiseSchedule(scheduler_config, 40)
    for stop in (0, 30, 39):
        assert schedule.path([stop]) == (schedule.timesteps[: stop + 1], [stop])
        assert to_stop(schedule, stop).timesteps == schedule.timesteps[: stop + 1]
    assert schedule.path([3, 7]) == (schedule.timesteps[:8], [3, 7])


@pytest.mark.parametrize("num_steps", [1, 5, 8, 40, 999, 1000])
@pytest.mark.parametrize("stop", [0, 1, 30, 39])
def test_a_short_path_has_equal_steps_to_the_stop(scheduler_config, num_steps, stop):
    schedule = NoiseSchedule(scheduler_config, 40)
    timesteps, [place] = schedule.path([stop], num_steps)
    distance = 976 - schedule.timesteps[stop]
    assert place == len(timesteps) - 1 == math.ceil(distance * num_steps / 1000)
    assert (timesteps[0], timesteps[-1]) == (976, schedule.timesteps[stop])
    sizes = [before - after for before, after in zip(timesteps, timesteps[1:], strict=False)]
    assert all(size > 0 and abs(size - distance / len(sizes)) <= 1 for size in sizes)


def test_a_path_goes_through_every_stop(scheduler_config):
    schedule = NoiseSchedule(scheduler_config, 40)
    timesteps, places = schedule.path([30, 31, 39], 8)
    assert [timesteps[place] for place in places] == [schedule.timesteps[stop] for stop in (30, 31, 39)]
    assert timesteps == (976, 851, 726, 601, 476, 351, 226, 201, 101, 1)
    assert places == [6, 7, 9]


# ------------------------------------------------------------------------------------------ batches together


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [(1.0, 1.0), (3.0, 1.0)])
def test_batches_with_grids_of_their_own_are_rolled_out_together(parts, reward, sampler, guidance):
    models, conditioning, noise = build(parts, reward, guidance=guidance)
    options = Options(num_inference_steps=6, min_stop=0, max_stop=5, rollout_steps=4, rollout_sampler=sampler)
    plans = [draw_plan(options, models.schedule, step, 0) for step in range(5)]
    assert len({plan.timesteps for plan in plans}) > 2
    batches = [
        MicroBatch([PROMPTS[i % 3]], conditioning[i % 3 : i % 3 + 1], (i + 1) * noise[i % 3, None], plan)
        for i, plan in enumerate(plans)
    ]
    trajectories = refl_lora.rollout(models, batches)
    for batch, trajectory in zip(batches, trajectories, strict=True):
        latents, x0 = by_hand(models, batch)
        [term] = batch.plan.terms
        assert term.step == len(batch.plan.timesteps) - 1
        assert batch.plan.timesteps[-1] == models.schedule.timesteps[term.stop]
        torch.testing.assert_close(trajectory.states[term.step].latents, latents, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(trajectory.state.x0, x0, rtol=1e-10, atol=1e-10)
        assert trajectory.states.keys() == {term.step}


@torch.no_grad()
def by_hand(models, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and x0 at the last step of one batch, denoised alone."""
    timesteps, latents, previous_x0 = batch.plan.timesteps, batch.noise[:, 0], None
    for step, timestep in enumerate(timesteps):
        is_last = step + 1 == len(timesteps)
        output = models.predict(latents, timestep, batch.conditioning, models.guidance[is_last])
        x0 = models.schedule.predict_x0(latents, output, timestep)
        if is_last:
            return latents, x0
        latents = models.schedule.step(
            timesteps, step, latents, x0, batch.noise[:, step + 1], batch.plan.sampler, previous_x0
        )
        previous_x0 = x0


def test_predictions_share_a_call_where_guidance_is_the_same(parts, reward, monkeypatch):
    models, conditioning, noise = build(parts, reward, guidance=(3.0, 1.0))
    sizes = []
    denoise = models.base.denoise
    monkeypatch.setattr(
        models.base,
        "denoise",
        lambda latents, *others: sizes.append(len(latents)) or denoise(latents, *others),
    )
    plans = [to_stop(models.schedule, stop) for stop in (1, 1, 0)]
    batches = [MicroBatch(PROMPTS, conditioning, noise, plan) for plan in plans]
    refl_lora.rollout(models, batches)
    assert sizes == [2 * 6, 3, 6]  # step 0: guided, both halves; the one that stops; step 1
    assert plans[0] == Plan(models.schedule.timesteps[:2], plans[0].terms)

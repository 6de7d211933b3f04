"""Gradient plans: which steps they choose, and their gradients against plain autograd in float64."""

import refl_lora
from refl.model.noise_schedule import NoiseSchedule
from refl.preflight import memory
from refl.system.errors import UserError
from refl.train.batches import MicroBatch
from refl.train.options import Options, check_values
from refl.train.plan import PLANS, Term, draw_plan, possible_plans

import pytest
import torch
from diffusers import DDPMScheduler
from test_step import PROMPTS, STEPS, build, relative_difference

OPTIONS = {"num_inference_steps": STEPS, "min_stop": 3, "max_stop": STEPS - 1}
CASES = {  # options -> guidance
    "several stops": ({"plan": "several_stops", "num_gradient_steps": 3}, (1.0, 1.0)),
    "several stops of a short rollout, guided": (
        {"plan": "several_stops", "num_gradient_steps": 2, "rollout_steps": 4, "normalize_by_stop": True},
        (3.0, 1.0),
    ),
    "DRaFT-1": ({"plan": "draft_k"}, (1.0, 1.0)),
    "DRaFT-3": ({"plan": "draft_k", "num_gradient_steps": 3}, (1.0, 1.0)),
    "DRaFT, guided": ({"plan": "draft_k", "num_gradient_steps": 100}, (3.0, 3.0)),
    "DRaFT-2, guided by the base": (
        {"plan": "draft_k", "num_gradient_steps": 2, "lora_in_uncond": False},
        (3.0, 3.0),
    ),
    "DRaFT-3, short DDIM, guided in the gradient alone": (
        {"plan": "draft_k", "num_gradient_steps": 3, "rollout_steps": 4, "rollout_sampler": "ddim"},
        (1.0, 3.0),
    ),
    "DRaFT-4, DPM-Solver++": (
        {"plan": "draft_k", "num_gradient_steps": 4, "rollout_sampler": "dpm++"},
        (1.0, 1.0),
    ),
    "DRaFT, DPM-Solver++ SDE": (
        {"plan": "draft_k", "num_gradient_steps": 100, "rollout_sampler": "dpm++sde", "rollout_steps": 5},
        (1.0, 1.0),
    ),
    "DRaFT-LV": ({"plan": "draft_lv", "num_gradient_steps": 3}, (1.0, 1.0)),
    "DRaFT-LV, short, guided": (
        {"plan": "draft_lv", "num_gradient_steps": 2, "rollout_steps": 3, "rollout_sampler": "dpm++"},
        (3.0, 3.0),
    ),
}


def plan_of(options: dict, schedule: NoiseSchedule, step: int = 0, micro_step: int = 0):
    options = Options(**OPTIONS | options)
    check_values(options)
    return draw_plan(options, schedule, step, micro_step)


def plain_gradients(models, parts, batch: MicroBatch):
    """Losses and LoRA gradients of the plan's terms by the libraries' layers, with one graph through all
    steps of a term."""
    schedule, plan, lora = (
        models.schedule,
        batch.plan,
        [p for p in parts.unet.parameters() if p.requires_grad],
    )

    def predict_x0(latents, step, scale):
        timestep, conditioning = plan.timesteps[step], batch.conditioning
        output = parts.unet(latents, timestep, **conditioning.prompt).sample
        if scale != 1:
            unet = parts.unet if models.lora_in_uncond else parts.base
            empty = unet(latents, timestep, **conditioning.empty).sample
            output = (1 - scale) * empty + scale * output
        return schedule.predict_x0(latents, output, timestep)

    losses, gradients = [], []
    for term in plan.terms:
        first = plan.terms[0].step if plan.timesteps[-1:] * 2 == plan.timesteps[-2:] else term.step
        latents, x0, previous_x0 = batch.noise[:, 0], None, None
        for step in range(first + 1):
            has_gradient = step in term.steps
            with torch.set_grad_enabled(has_gradient):
                x0 = predict_x0(latents, step, models.guidance[step in plan.gradient_steps])
                if step < first:
                    noise = batch.noise[:, step + 1]
                    latents, previous_x0 = (
                        schedule.step(plan.timesteps, step, latents, x0, noise, plan.sampler, previous_x0),
                        x0,
                    )
        if term.step > first:  # the stop's x0, noised anew
            latents = schedule.renoise(x0.detach(), batch.noise[:, term.step], plan.timesteps[term.step])
            x0 = predict_x0(latents, term.step, models.guidance[1])
        images = parts.vae.decode(x0 / parts.vae.config.scaling_factor).sample / 2 + 0.5
        scores = models.rewards.rewards["imagereward"](images.clamp(0, 1), PROMPTS)
        losses.append(0.01 * torch.relu(2 - scores).mean())
        gradients.append(torch.autograd.grad(term.weight * losses[-1], lora))
    return losses, gradients


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_plain_autograd(parts, reward, name):
    options, guidance = CASES[name]
    lora_in_uncond = options.get("lora_in_uncond", True)
    models, conditioning, noise = build(parts, reward, guidance=guidance, lora_in_uncond=lora_in_uncond)
    plan = plan_of(options, models.schedule, step=1)
    noise = torch.cat([noise, 0.9 * noise.flip(1)], dim=1)[:, : len(plan.timesteps)]
    batch = MicroBatch(PROMPTS, conditioning, noise, plan)
    ours = list(refl_lora.refl_step(models, [batch], 0.01, 2.0, scale=lambda loss: 8 * loss))
    losses, gradients = plain_gradients(models, parts, batch)
    assert len(ours) == len(gradients) == len(plan.terms)
    for (result, own), term, loss, expected in zip(ours, plan.terms, losses, gradients, strict=True):
        assert result.stop == term.stop
        assert result.loss.item() == pytest.approx(loss.item(), rel=1e-11)
        assert relative_difference([gradient / 8 for gradient in own], expected) < 1e-9


def test_a_deeper_gradient_is_another_one(parts, reward):
    models, conditioning, noise = build(parts, reward)
    gradients = []
    for depth in (1, 2, 3):
        plan = plan_of({"plan": "draft_k", "num_gradient_steps": depth}, models.schedule, step=1)
        batch = MicroBatch(PROMPTS, conditioning, noise, plan)
        [(_, own)] = refl_lora.refl_step(models, [batch], 0.01, 2.0)
        gradients.append(own)
    assert relative_difference(gradients[0], gradients[1]) > 0.01
    assert relative_difference(gradients[1], gradients[2]) > 0.01


def test_one_unet_graph_exists_at_a_time(parts, reward):
    models, conditioning, noise = build(parts, reward, torch.float32)

    def peak(depth: int) -> int:
        plan = plan_of({"plan": "draft_k", "num_gradient_steps": depth, "min_stop": 5}, models.schedule)
        [trajectory] = refl_lora.rollout(models, [MicroBatch(PROMPTS, conditioning, noise, plan)])
        [term] = plan.terms
        upstream = torch.ones_like(trajectory.state.x0)
        return memory.peak_of(lambda: refl_lora.lora_gradient(models, trajectory, term, upstream))

    assert peak(6) < 1.1 * peak(2)


# ----------------------------------------------------------------------------------------------- steps chosen


@pytest.fixture
def schedule(tiny) -> NoiseSchedule:
    config = DDPMScheduler.load_config(tiny / "stable-diffusion-v1-4", subfolder="scheduler")
    return NoiseSchedule(config, STEPS)


def test_late_step_is_the_grid_to_a_drawn_stop(schedule):
    plans = [plan_of({}, schedule, step) for step in range(20)]
    stops = {term.stop for plan in plans for term in plan.terms}
    assert stops == {3, 4, 5}
    for plan in plans:
        [term] = plan.terms
        assert plan.timesteps == schedule.timesteps[: term.stop + 1] and term == Term(term.stop, term.stop)
    assert plans[0] == plan_of({}, schedule, 0)


def test_several_stops_differ_and_rise(schedule):
    options = {"plan": "several_stops", "num_gradient_steps": 2}
    drawn = {tuple(t.stop for t in plan_of(options, schedule, s, m).terms) for s in range(9) for m in (0, 1)}
    assert drawn == {(3, 4), (3, 5), (4, 5)}
    options |= {"num_gradient_steps": 3}
    assert [term.stop for term in plan_of(options, schedule).terms] == [3, 4, 5]
    with pytest.raises(UserError, match="be at most 3, the number of stops"):
        plan_of(options | {"num_gradient_steps": 4}, schedule)


def test_draft_k_is_not_deeper_than_the_rollout(schedule):
    options = {"plan": "draft_k", "rollout_steps": 2}
    for depth in (1, 2, 50):
        plan = plan_of(options | {"num_gradient_steps": depth}, schedule)
        [term] = plan.terms
        assert term.depth == min(depth, len(plan.timesteps)) and term.step == len(plan.timesteps) - 1
        assert plan.gradient_steps == {*term.steps}


def test_draft_lv_returns_to_the_stop(schedule):
    plain = plan_of({}, schedule)
    plan = plan_of({"plan": "draft_lv", "num_gradient_steps": 3}, schedule)
    assert plan.timesteps == plain.timesteps + 2 * plain.timesteps[-1:]
    [first] = plain.terms
    assert plan.terms == tuple(Term(first.step + i, first.stop) for i in range(3))


def test_weights_make_stops_equal(schedule):
    options = {"plan": "several_stops", "num_gradient_steps": 3, "normalize_by_stop": True}
    terms = plan_of(options, schedule).terms
    weighted = [term.weight * schedule.x0_slope(schedule.timesteps[term.stop]) for term in terms]
    assert weighted == pytest.approx([weighted[0]] * 3) and terms[0].weight < 1 < terms[2].weight


@pytest.mark.parametrize(
    "options",
    [{}, {"plan": "several_stops", "num_gradient_steps": 2}, {"plan": "draft_lv", "rollout_steps": 4}],
)
def test_the_possible_plans_are_those_drawn(schedule, options):
    possible = set(possible_plans(Options(**OPTIONS | options), schedule))
    assert possible == {plan_of(options, schedule, step) for step in range(40)}
    assert len(possible) == 3


def test_every_plan_is_an_option():
    assert Options.__annotations__["plan"].__args__ == tuple(PLANS)

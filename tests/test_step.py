"""The gradient of one ReFL step, against plain autograd through the whole chain and against finite
differences."""

import copy
import math
from types import SimpleNamespace

import refl_lora
from refl.model.conditioning import Conditioning
from refl.model.lean import make_lean
from refl.model.lora import add_lora
from refl.model.noise_schedule import NoiseSchedule
from refl.model.stable_diffusion import load_stable_diffusion
from refl.reward.rewards import WeightedRewards
from refl.reward.rewards import load as load_rewards
from refl.system import randomness
from refl.train.batches import MicroBatch, Pretraining
from refl.train.models import Models
from refl.train.plan import Plan, Term, to_stop

import diffusers.schedulers.scheduling_ddpm as scheduling_ddpm
import pytest
import torch
from diffusers import DDPMScheduler

PROMPTS = ["a red cat", "three green apples", "a hill at night, very dark"]
STEPS, STOP = 6, 4


def build(
    parts, reward, dtype=torch.float64, guidance=(1.0, 1.0), lora_in_uncond=True
) -> tuple[Models, Conditioning, torch.Tensor]:
    """Models in `dtype` with a LoRA that is not zero, conditioning, noise. `parts` stay as the libraries
    made them, with the same LoRA; `parts.base` has none."""
    parts.base = copy.deepcopy(parts.unet).to(dtype)
    lora = add_lora(parts.unet, rank=2, alpha=3, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for matrix in lora:
            matrix.copy_(torch.randn(matrix.shape, generator=generator) * 0.3)
    for part in (parts.unet, parts.vae, parts.text_encoder, reward):
        part.to(dtype)
    rewards = WeightedRewards({"imagereward": reward}, {"imagereward": 1.0})
    base = copy.copy(parts)
    base.unet, base.vae = copy.deepcopy(parts.unet), copy.deepcopy(parts.vae)
    for model in (base.unet, base.vae):
        make_lean(model)
    lora = [matrix for matrix in base.unet.parameters() if matrix.requires_grad]
    schedule = NoiseSchedule(parts.scheduler_config, STEPS)
    models = Models(base, lora, rewards, schedule, guidance, lora_in_uncond)
    empty, *embeds = parts.encode_prompts(["", *PROMPTS])
    conditioning = Conditioning.stack(embeds, None if guidance == (1, 1) else empty)
    noise = randomness.noise((9, 9), range(len(PROMPTS)), (STEPS, 4, 8, 8)).to(dtype)
    return models, conditioning, noise


def refl_step(
    models, conditioning, noise, stop, grad_scale, target, pretraining=None, **options
) -> SimpleNamespace:
    """The step for one micro-batch."""
    batch = MicroBatch(PROMPTS, conditioning, noise, to_stop(models.schedule, stop), pretraining)
    [(result, gradients)] = refl_lora.refl_step(models, [batch], grad_scale, target, **options)
    return SimpleNamespace(**vars(result), gradients=gradients)


def plain_chain(
    models, parts, conditioning, noise, stop, grad_scale, target, monkeypatch, distance=0.0, pretraining=None
):
    """Loss and LoRA gradients by the libraries' own layers and scheduler and one graph from UNet to loss."""
    scheduler = DDPMScheduler.from_config(parts.scheduler_config, clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(STEPS)

    def predict(latents, t, guidance, unet=parts.unet):
        text = unet(latents, t, **conditioning.prompt).sample
        if conditioning.empty is None:
            return text
        uncond = unet if models.lora_in_uncond else parts.base
        empty = uncond(latents, t, **conditioning.empty).sample
        return (1 - guidance) * empty + guidance * text

    latents = noise[:, 0]
    for index, t in enumerate(scheduler.timesteps[:stop]):
        monkeypatch.setattr(
            scheduling_ddpm, "randn_tensor", lambda *_, index=index, **__: noise[:, index + 1]
        )
        with torch.no_grad():
            latents = scheduler.step(predict(latents, t, models.guidance[0]), t, latents).prev_sample
    t = scheduler.timesteps[stop]
    eps = predict(latents, t, models.guidance[1])
    x0 = scheduler.step(eps, t, latents).pred_original_sample
    images = (parts.vae.decode(x0 / parts.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    rewards = models.rewards.rewards["imagereward"](images, PROMPTS)
    loss = grad_scale * (-rewards if target is None else torch.relu(target - rewards)).mean()
    loss = loss + distance * (eps - predict(latents, t, models.guidance[1], parts.base)).pow(2).mean()
    if pretraining:
        predicted = parts.unet(
            pretraining.latents, pretraining.timesteps, **pretraining.conditioning.prompt
        ).sample
        loss = loss + 0.7 * torch.nn.functional.mse_loss(predicted, pretraining.target)
    lora = [matrix for matrix in parts.unet.parameters() if matrix.requires_grad]
    return loss, rewards, torch.autograd.grad(loss, lora)


def relative_difference(ours, reference) -> float:
    ours, reference = (
        torch.cat([tensor.flatten().double() for tensor in tensors]) for tensors in (ours, reference)
    )
    assert reference.norm() > 0
    return ((ours - reference).norm() / reference.norm()).item()


GUIDANCE = [(1.0, 1.0), (3.0, 3.0), (3.0, 1.0), (1.0, 3.0)]


# Every pair of guidance, lora_in_uncond, and stop with target.
PAIRS = [
    (guidance, (i + j) % 2 == 0, stop, target)
    for i, guidance in enumerate(GUIDANCE)
    for j, (stop, target) in enumerate([(0, None), (STOP, 2.0), (STEPS - 1, 2.0)])
]


@pytest.mark.parametrize(("guidance", "lora_in_uncond", "stop", "target"), PAIRS)
def test_gradient_is_that_of_the_plain_chain(
    parts, reward, monkeypatch, guidance, lora_in_uncond, stop, target
):
    models, conditioning, noise = build(parts, reward, guidance=guidance, lora_in_uncond=lora_in_uncond)
    result = refl_step(models, conditioning, noise, stop, 0.01, target)
    loss, rewards, gradients = plain_chain(
        models, parts, conditioning, noise, stop, 0.01, target, monkeypatch
    )
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(result.rewards, rewards.detach(), rtol=1e-12, atol=0)
    assert relative_difference(result.gradients, gradients) < 1e-10


@pytest.mark.parametrize("guidance", [(1.0, 1.0), (3.0, 3.0)])
def test_regularisers_are_part_of_the_gradient(parts, reward, monkeypatch, guidance):
    models, conditioning, noise = build(parts, reward, guidance=guidance, lora_in_uncond=False)
    pretraining = Pretraining(noise[:, 1], torch.tensor([1, 500, 999]), conditioning, noise[:, 2])
    arguments = models, conditioning, noise, STOP, 0.01, 2.0
    result = refl_step(
        *arguments, pretraining, noise_distance_weight=0.3, pretrain_weight=0.7, scale=lambda loss: 8 * loss
    )
    loss, _, gradients = plain_chain(models, parts, *arguments[1:], monkeypatch, 0.3, pretraining)
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert relative_difference([gradient / 8 for gradient in result.gradients], gradients) < 1e-10
    assert set(result.regularisers) == {"noise_distance", "pretraining"}
    plain = refl_step(*arguments)
    added = (
        0.3 * result.regularisers["noise_distance"].item() + 0.7 * result.regularisers["pretraining"].item()
    )
    assert result.loss.item() == pytest.approx(plain.loss.item() + added, rel=1e-12)


def test_a_gradient_can_be_weighted_by_its_stop(parts, reward):
    models, conditioning, noise = build(parts, reward)
    plain = refl_step(models, conditioning, noise, STOP, 0.01, 2.0)
    plan = Plan(models.schedule.timesteps[: STOP + 1], (Term(STOP, STOP, weight=3.0),))
    batch = MicroBatch(PROMPTS, conditioning, noise, plan)
    [(result, gradients)] = refl_lora.refl_step(models, [batch], 0.01, 2.0)
    assert result.loss.item() == plain.loss.item()
    assert relative_difference(gradients, [3 * gradient for gradient in plain.gradients]) < 1e-12
    eps = torch.zeros((), dtype=torch.float64, requires_grad=True)
    timestep = models.schedule.timesteps[STOP]
    x0 = models.schedule.predict_x0(torch.ones((), dtype=torch.float64), eps, timestep)
    assert models.schedule.x0_slope(timestep) == pytest.approx(
        -torch.autograd.grad(x0, eps)[0].item(), rel=1e-12
    )


def test_gradient_is_that_of_finite_differences(parts, reward):
    # At stop 0 nothing is rolled out, so the loss depends on the LoRA through the gradient step alone.
    models, conditioning, noise = build(parts, reward)

    def step():
        return refl_step(models, conditioning, noise, 0, 1.0, 2.0)

    gradients = step().gradients
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        direction = [torch.randn(m.shape, generator=generator, dtype=m.dtype) for m in models.lora]
        slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)).item()
        losses = []
        for move in (1e-5, -2e-5):
            with torch.no_grad():
                torch._foreach_add_(models.lora, direction, alpha=move)
            losses.append(step().loss.item())
        with torch.no_grad():
            torch._foreach_add_(models.lora, direction, alpha=1e-5)
        assert slope == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4)


def test_gradient_does_not_depend_on_how_it_is_computed(parts, reward):
    models, conditioning, noise = build(parts, reward)
    arguments = (models, conditioning, noise, STOP, 0.01, 2.0)
    together = refl_step(*arguments, decode_batch_size=3)
    one_by_one = refl_step(*arguments, decode_batch_size=1)
    scaled = refl_step(*arguments, scale=lambda loss: 1024 * loss)
    models.base.unet.enable_gradient_checkpointing()
    recomputed = refl_step(*arguments)
    assert relative_difference(one_by_one.gradients, together.gradients) < 1e-10
    assert relative_difference([g / 1024 for g in scaled.gradients], together.gradients) < 1e-10
    assert relative_difference(recomputed.gradients, together.gradients) < 1e-10
    assert scaled.loss.item() == pytest.approx(together.loss.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("guidance", "together"), [*((guidance, 2) for guidance in GUIDANCE), ((3.0, 1.0), 1), ((3.0, 1.0), 100)]
)
def test_micro_batches_are_rolled_out_together_as_alone(parts, reward, guidance, together):
    models, conditioning, noise = build(parts, reward, guidance=guidance)
    batches = [
        MicroBatch(
            [PROMPTS[i % 3]],
            conditioning[i % 3 : i % 3 + 1],
            (i + 1) * noise[i % 3, None],
            to_stop(models.schedule, stop),
        )
        for i, stop in enumerate([3, 5, 0, 3, 4])
    ]
    together = list(refl_lora.refl_step(models, batches, 0.01, 2.0, rollout_batch_size=together))
    assert len(together) == len(batches)
    for batch, (result, gradients) in zip(batches, together, strict=True):
        [(alone, own)] = refl_lora.refl_step(models, [batch], 0.01, 2.0)
        torch.testing.assert_close(result.rewards, alone.rewards, rtol=1e-11, atol=1e-12)
        assert relative_difference(gradients, own) < 1e-10


def test_gradient_of_a_sum_is_the_sum_of_gradients(parts, reward):
    models, conditioning, noise = build(parts, reward)
    both = {"imagereward": reward, "red": lambda images, prompts: images[:, 0].mean((1, 2))}
    found = {}
    for name, weights in (("imagereward", (1, 0)), ("red", (0, 1)), ("sum", (0.5, -2.0))):
        models.rewards = WeightedRewards(both, dict(zip(both, weights, strict=True)))
        found[name] = refl_step(models, conditioning, noise, STOP, 0.01, None)
    expected = [
        0.5 * a - 2 * b for a, b in zip(found["imagereward"].gradients, found["red"].gradients, strict=True)
    ]
    assert relative_difference(found["sum"].gradients, expected) < 1e-10
    assert found["sum"].scores.shape == (2, len(PROMPTS))
    torch.testing.assert_close(
        found["sum"].rewards, 0.5 * found["imagereward"].rewards - 2 * found["red"].rewards
    )


def test_images_above_the_target_give_no_gradient(parts, reward):
    models, conditioning, noise = build(parts, reward)
    result = refl_step(models, conditioning, noise, STOP, 0.01, -100.0)
    assert result.loss.item() == 0
    assert all(gradient.abs().max() == 0 for gradient in result.gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision_keeps_the_lora_in_float32(parts, reward, tiny, dtype):
    exact_models, exact_embeds, noise = build(parts, reward)
    exact = refl_step(exact_models, exact_embeds, noise, STOP, 0.01, 2.0)
    half_parts = load_stable_diffusion(tiny / "stable-diffusion-v1-4", dtype, "cpu")
    lora = add_lora(half_parts.unet, rank=2, alpha=3, seed=0)
    with torch.no_grad():
        for matrix, value in zip(lora, exact_models.lora, strict=True):
            matrix.copy_(value)
    assert {matrix.dtype for matrix in lora} == {torch.float32}
    assert {p.dtype for p in half_parts.unet.parameters() if not p.requires_grad} == {dtype}
    rewards = load_rewards("imagereward", tiny, torch.device("cpu"), dtype)
    for model in (half_parts.unet, half_parts.vae):
        make_lean(model)
    models = Models(half_parts, lora, rewards, exact_models.schedule)
    half_embeds = {name: value.to(dtype) for name, value in exact_embeds.prompt.items()}
    half = refl_step(models, Conditioning(half_embeds), noise.float(), STOP, 0.01, 2.0)
    assert half.rewards.dtype == torch.float32
    assert {gradient.dtype for gradient in half.gradients} == {torch.float32}
    # Half precision has 8 bits: the direction of the gradient is that of float64 to a few per cent.
    ours, reference = (torch.cat([g.flatten().double() for g in r.gradients]) for r in (half, exact))
    assert torch.cosine_similarity(ours, reference, dim=0) > 0.98
    torch.testing.assert_close(half.rewards.double(), exact.rewards, atol=0.02, rtol=0)


def test_saturated_share_is_counted(parts, reward):
    models, conditioning, noise = build(parts, reward)
    with torch.no_grad():
        batch = MicroBatch(PROMPTS, conditioning, noise, to_stop(models.schedule, STOP))
        [trajectory] = refl_lora.rollout(models, [batch])
        latents, x0 = trajectory.states[STOP].latents, trajectory.states[STOP].x0
        timestep = models.schedule.timesteps[STOP]
        eps = models.predict(latents, timestep, conditioning, 1.0)
        assert torch.equal(x0, models.schedule.predict_x0(latents, eps, timestep))
        images = models.base.decode(x0)
    share = ((images < 0) | (images > 1)).double().mean().item()
    result = refl_step(models, conditioning, noise, STOP, 0.01, 2.0)
    assert result.saturated.item() == pytest.approx(share, abs=1e-6)
    assert not math.isnan(share)

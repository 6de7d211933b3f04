"""FLOPs counted beforehand are those of the step as it really runs."""

from dataclasses import replace

import refl_lora
from refl.model.conditioning import Conditioning
from refl.preflight import cost, doctor
from refl.system import randomness
from refl.train.batches import MicroBatch, Pretraining
from refl.train.models import load_models
from refl.train.options import Options
from refl.train.plan import draw_plan, to_stop

import pytest
import torch
from diffusers import AutoencoderTiny

PROMPTS = ["a red cat", "three green apples"]
GUIDED = {"guidance_scale": 3.0}
CASES = {
    "as published": {},
    "short rollout": {"rollout_steps": 3, "rollout_sampler": "dpm++"},
    "guided": GUIDED,
    "guided in the rollout alone, by the base": GUIDED | {"guidance_in": "rollout", "lora_in_uncond": False},
    "guided in the gradient alone": GUIDED | {"guidance_in": "gradient"},
    "guided by the base": GUIDED | {"lora_in_uncond": False},
    "several stops": {"plan": "several_stops", "num_gradient_steps": 2, "min_stop": 3} | GUIDED,
    "DRaFT-3": {"plan": "draft_k", "num_gradient_steps": 3},
    "DRaFT-2, guided": {"plan": "draft_k", "num_gradient_steps": 2} | GUIDED,
    "DRaFT-2, guided by the base": {"plan": "draft_k", "num_gradient_steps": 2, "lora_in_uncond": False}
    | GUIDED,
    "DRaFT-LV": {
        "plan": "draft_lv",
        "num_gradient_steps": 3,
        "guidance_scale": 3.0,
        "guidance_in": "rollout",
    },
    "regularised": {"noise_distance_weight": 0.1, "pretrain_data": "here"} | GUIDED,
    "decoded smaller": {"decode_resolution": 32},
    "tiny decoder": {"tiny_decoder_path": "tiny_decoder"},
    "recomputed": {"gradient_checkpointing": True},
}


@pytest.fixture
def options(tiny) -> Options:
    return Options(
        pretrained_model_name_or_path=str(tiny / "stable-diffusion-v1-4"),
        reward_path=str(tiny),
        num_inference_steps=6,
        min_stop=4,
        max_stop=4,
        guidance_scale=1.0,
        max_train_steps=100,
    )


@pytest.mark.parametrize("name", CASES)
def test_the_count_is_that_of_the_step(options, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    AutoencoderTiny(decoder_block_out_channels=(8,) * 4).save_pretrained("tiny_decoder")
    options = replace(options, **CASES[name])
    models = load_models(options, torch.device("cpu"), torch.float32)
    plan = draw_plan(options, models.schedule, 0, 0)
    noise = randomness.noise((0,), range(2), (len(plan.timesteps), 4, 8, 8))
    empty, *embeds = models.base.encode_prompts(["", *PROMPTS])
    conditioning = Conditioning.stack(embeds, empty if options.guidance_scale != 1 else None)
    batch = MicroBatch(PROMPTS, conditioning, noise, plan)
    if options.pretrain_data:
        batch.pretraining = Pretraining(noise[:, 0], torch.tensor([1, 500]), conditioning, noise[:, 1])

    def step() -> None:
        list(
            refl_lora.refl_step(
                models, [batch], 1.0, 2.0, noise_distance_weight=options.noise_distance_weight
            )
        )

    step()  # the reward looks at its first gradient
    with cost.flop_counter() as counter:
        step()
    counted = cost.per_image(options, cost.count_parts(options, torch.float32, 64))
    share = 2 * sum(counted.values()) * 1e12 / counter.get_total_flops()
    if options.lora_in_uncond and not options.noise_distance_weight:
        assert share == pytest.approx(1, rel=1e-9)
    else:  # counts the LoRA where it is off as well, some per cent of the tiny UNet
        assert 1 < share < 1.05


def test_a_validation_is_counted(options):
    options = replace(options, draw_guidance_scale=3.0)
    models = load_models(options, torch.device("cpu"), torch.float32)
    empty, own = models.base.encode_prompts(["", PROMPTS[0]])
    noise = randomness.noise((0,), range(1), (6, 4, 8, 8))
    batch = MicroBatch(PROMPTS[:1], Conditioning.stack([own], empty), noise, to_stop(models.schedule, 5))
    models.guidance = options.drawn_with, options.drawn_with
    with torch.no_grad(), cost.flop_counter() as counter:
        [trajectory] = refl_lora.rollout(models, [batch])
        models.rewards(models.base.decode(trajectory.state.x0).clamp(0, 1), PROMPTS[:1])
    image = cost.validation_image(options, cost.count_parts(options, torch.float32, 64))
    assert image * 1e12 == pytest.approx(counter.get_total_flops(), rel=1e-9)


@pytest.mark.parametrize(("every", "last", "validations"), [(0, 10, 0), (5, 10, 3), (4, 10, 4), (20, 10, 2)])
def test_a_run_is_its_images_and_its_validations(options, every, last, validations):
    parts = cost.Parts(unet=1, gradient=2, chain=3, decode=4, decode_gradient=5, reward=6, reward_gradient=7)
    options = replace(options, max_train_steps=last, validation_steps=every, validation_images_per_prompt=2)
    training, validation = cost.of_run(options, parts)
    assert training == last * 8 * (5 * 1 + 5 + 7 + 2)
    assert validation == validations * 4 * 2 * (6 * 1 + 4 + 6)


def test_costs_are_means_over_stops(options):
    parts = cost.Parts(unet=1, gradient=0, chain=0, decode=0, decode_gradient=0, reward=0, reward_gradient=0)
    published = replace(options, num_inference_steps=40, min_stop=30, max_stop=39)
    assert cost.per_image(published, parts)["rollout"] == 35.5
    # From 976 to 226, 201, ..., 1 by 125: 6, 7 five times, 8 four times; and the step that predicts x0.
    assert cost.per_image(replace(published, rollout_steps=8), parts)["rollout"] == pytest.approx(8.3)


@pytest.mark.parametrize(
    ("gpu", "rate"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H100 PCIe", 756),
        ("Tesla V100-SXM2-32GB", 125),
        ("Tesla T4", 65),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA RTX A6000", 155),
        ("", None),
    ],
)
def test_rates_of_gpus(gpu, rate):
    assert cost.published_rate(gpu) == rate


def test_the_doctor_tells_minutes(options, monkeypatch):
    parts = cost.Parts(unet=1, gradient=2, chain=3, decode=4, decode_gradient=5, reward=6, reward_gradient=7)
    monkeypatch.setattr(cost, "count_parts", lambda *_: parts)
    monkeypatch.setattr(cost, "of_run", lambda *_: (312_000.0, 500.0))  # TFLOP
    assert "minutes" not in doctor.check_cost(options)
    assert "312 PFLOP of training per process; 0.5 PFLOP of validation" in doctor.check_cost(options)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: "NVIDIA A100-SXM4-80GB")
    options = doctor.Options(**vars(options) | {"mixed_precision": "no"})
    assert "minutes" not in doctor.check_cost(options)  # rates are those of half precision
    options.mixed_precision = "bf16"
    assert "about 42 minutes of training on NVIDIA A100-SXM4-80GB, assuming 40%" in doctor.check_cost(options)
    options.tflops = 260.0
    assert "20 minutes of training at 260 TFLOP/s, as given" in doctor.check_cost(options)

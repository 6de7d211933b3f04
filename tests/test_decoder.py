"""Cheaper decoders for the gradient: smaller images, and a tiny decoder."""

import shutil
from dataclasses import replace

import refl_lora
from refl.model.conditioning import Conditioning
from refl.model.lean import make_lean
from refl.model.stable_diffusion import decode
from refl.model.tiny_decoder import load_tiny_decoder
from refl.preflight import memory
from refl.system import randomness
from refl.system.errors import UserError
from refl.train.batches import MicroBatch
from refl.train.models import load_models
from refl.train.options import Options
from refl.train.plan import to_stop

import pytest
import torch
import torch.nn.functional as F
from conftest import LORA, ROOT, events, run_command, run_in_process
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from test_step import PROMPTS, STOP, build

DEMO = ROOT / "demo/checkpoint"


@pytest.fixture(scope="module")
def tiny_decoder(shared):
    """The folder of a tiny decoder with random weights."""

    def make(folder):
        torch.manual_seed(0)
        blocks = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
        AutoencoderTiny(**blocks, num_decoder_blocks=(1, 1, 1, 1)).save_pretrained(folder)

    return shared("tiny_decoder", make)


def at_stop(models, conditioning, noise) -> tuple[MicroBatch, torch.Tensor]:
    """A micro-batch and its x0 at `STOP`."""
    batch = MicroBatch(PROMPTS, conditioning, noise, to_stop(models.schedule, STOP))
    [trajectory] = refl_lora.rollout(models, [batch])
    return batch, trajectory.state.x0


def test_the_gradient_at_a_smaller_size_is_that_of_smaller_latents(parts, reward):
    models, conditioning, noise = build(parts, reward)
    batch, x0 = at_stop(models, conditioning, noise)
    models.base.decode_side = 4
    result, gradient = refl_lora.x0_gradient(models, batch, x0, 0.01, None)
    x0.requires_grad_()
    images = decode(parts.vae, F.interpolate(x0, (4, 4), mode="bicubic", antialias=True))
    assert images.shape == (3, 3, 32, 32)
    scores = models.rewards.rewards["imagereward"](images.clamp(0, 1), PROMPTS)
    torch.testing.assert_close(result.rewards, scores.detach(), rtol=1e-9, atol=0)
    [expected] = torch.autograd.grad(-0.01 * scores.mean(), x0)
    assert ((gradient - expected).norm() / expected.norm()).item() < 1e-10


def test_the_gradient_by_a_tiny_decoder_is_that_of_diffusers(parts, reward, tiny_decoder):
    models, conditioning, noise = build(parts, reward)
    batch, x0 = at_stop(models, conditioning, noise)
    models.base.tiny_decoder = load_tiny_decoder(tiny_decoder, torch.float64, "cpu")
    make_lean(models.base.tiny_decoder)
    _, gradient = refl_lora.x0_gradient(models, batch, x0, 0.01, None, decode_batch_size=3)
    x0.requires_grad_()
    images = AutoencoderTiny.from_pretrained(tiny_decoder).double().decode(x0).sample / 2 + 0.5
    scores = models.rewards.rewards["imagereward"](images.clamp(0, 1), PROMPTS)
    [expected] = torch.autograd.grad(-0.01 * scores.mean(), x0)
    assert ((gradient - expected).norm() / expected.norm()).item() < 1e-10


def test_a_smaller_decode_points_the_same_way_in_the_demo_world():
    options = Options(
        pretrained_model_name_or_path=str(DEMO / "stable-diffusion-v1-4"), reward_path=str(DEMO),
        num_inference_steps=20, guidance_scale=1.0,
    )  # fmt: skip
    models = load_models(options, torch.device("cpu"), torch.float32)
    prompts = (ROOT / "demo/prompts/train.txt").read_text().splitlines()[:4]
    conditioning = Conditioning.stack(list(models.base.encode_prompts(prompts)))
    noise = randomness.noise((1,), range(4), (15, 4, 8, 8))
    batch = MicroBatch(prompts, conditioning, noise, to_stop(models.schedule, 14))
    [trajectory] = refl_lora.rollout(models, [batch])
    gradients = {}
    for side in (8, 7, 6, 4):
        models.base.decode_side = side
        _, gradients[side] = refl_lora.x0_gradient(models, batch, trajectory.state.x0, 1.0, None, 4)
    cosines = {
        8 * side: F.cosine_similarity(gradients[8].flatten(1), own.flatten(1)).mean().item()
        for side, own in gradients.items()
    }
    print(f"cosine of d reward / d x0 with the exact one, by pixels decoded: {cosines}")
    assert cosines[64] == pytest.approx(1, abs=1e-5) and cosines[48] > 0.05


def test_validation_decodes_exactly(training_options, tiny_decoder, tmp_path, monkeypatch):
    sheets = {}
    for name, options in {
        "exact": [],
        "cheap": [f"--tiny_decoder_path={tiny_decoder}", "--decode_resolution=32", "--low_memory"],
    }.items():
        output = tmp_path / name
        run_in_process(refl_lora, monkeypatch, *training_options, *options, f"--output_dir={output}")
        images = events(output / "logs").Images("validation/images")
        sheets[name] = images[0].encoded_image_string, (output / LORA).read_bytes()
    assert sheets["exact"][0] == sheets["cheap"][0]  # before training
    assert sheets["exact"][1] != sheets["cheap"][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--decode_resolution=36"],
            "--decode_resolution 36: must be a multiple of 8 pixels, and at most 64",
        ),
        (["--decode_resolution=72"], "--decode_resolution 72: must be"),
        (["--tiny_decoder_path=nowhere"], "madebyollin/taesd"),
        (
            ["--tiny_decoder_path={other}"],
            "of 4 channels for images 8 times as wide; this is AutoencoderTiny, 16 channels, 8 times",
        ),
    ],
)
def test_what_does_not_fit_is_refused(training_options, tmp_path, monkeypatch, capsys, options, message):
    AutoencoderTiny(latent_channels=16).save_pretrained(tmp_path / "other")
    options = [option.format(other=tmp_path / "other") for option in options]
    run = run_command(refl_lora, monkeypatch, capsys, *training_options, *options, "--check")
    assert run.returncode == 2 and message in run.stderr


def test_weights_that_are_missing_are_refused(tiny_decoder, tmp_path):
    shutil.copytree(tiny_decoder, tmp_path / "part")
    file = tmp_path / "part/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["decoder.layers.0.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing, such as decoder.layers.0.weight"):
        load_tiny_decoder(tmp_path / "part", torch.float32, "cpu")
    file.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tiny_decoder(tmp_path / "part", torch.float32, "cpu")


def test_less_memory_is_counted(tiny, tiny_decoder):
    options = Options(
        pretrained_model_name_or_path=str(tiny / "stable-diffusion-v1-4"), reward_path=str(tiny)
    )

    def others(**changes) -> float:
        counted = memory.count(replace(options, **changes), torch.float32, 256)
        return counted["decoder and reward"][1]

    exact = others()
    assert others(decode_resolution=128) < 0.5 * exact
    assert others(tiny_decoder_path=str(tiny_decoder)) < exact

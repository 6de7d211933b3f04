"""The model, and LoRA files against diffusers' own pipeline."""

import copy
import json
import shutil

from refl.model.conditioning import Conditioning
from refl.model.lora import LORA_FILE, add_lora, read_metadata
from refl.model.noise_schedule import NoiseSchedule
from refl.model.pipeline import SAMPLERS, generate, load_lora, load_pipeline
from refl.model.stable_diffusion import decode, load_stable_diffusion
from refl.system.errors import UserError

import pytest
import torch
from conftest import save_lora
from diffusers import DDIMScheduler, StableDiffusionPipeline
from random_checkpoint import SIZES, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

PROMPTS = ["a red cat", "a blue dog"]


def move_lora(lora, scale=0.5):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for matrix in lora:
            matrix.copy_(torch.randn(matrix.shape, generator=generator) * scale)


def test_other_predictions_are_refused(parts):
    with pytest.raises(UserError, match="v_prediction"):
        NoiseSchedule({**parts.scheduler_config, "prediction_type": "v_prediction"}, 40)


def test_zero_lora_is_the_base_bit_for_bit(parts):
    latents, t = torch.randn(2, 4, 8, 8), 500
    embeds = Conditioning.stack(list(parts.encode_prompts(PROMPTS))).prompt["encoder_hidden_states"]
    base = parts.unet(latents, t, embeds).sample
    lora = add_lora(parts.unet, rank=4, alpha=4, seed=0)
    assert torch.equal(parts.unet(latents, t, embeds).sample, base)
    move_lora(lora)
    assert not torch.equal(parts.unet(latents, t, embeds).sample, base)
    parts.unet.disable_adapters()
    assert torch.equal(parts.unet(latents, t, embeds).sample, base)


def test_lora_sits_in_every_attention_layer_and_is_seeded(parts, tiny):
    lora = add_lora(parts.unet, rank=4, alpha=4, seed=7)
    attentions = sum(name.endswith(("attn1", "attn2")) for name, _ in parts.unet.named_modules())
    assert len(lora) == attentions * 4 * 2  # q, k, v, out; two matrices each
    again = load_stable_diffusion(tiny / "stable-diffusion-v1-4", torch.float32, "cpu")
    for ours, theirs in zip(lora, add_lora(again.unet, 4, 4, seed=7), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("alpha", [4, 1.5])
def test_saved_lora_draws_the_same_images_in_diffusers(parts, tiny, tmp_path, alpha):
    model = tiny / "stable-diffusion-v1-4"
    lora = add_lora(parts.unet, rank=4, alpha=alpha, seed=0)
    move_lora(lora)
    file = save_lora(parts.unet, tmp_path, {"rank": 4, "step": 10})
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]

    plain = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    plain.load_lora_weights(str(tmp_path))
    latents, t = torch.randn(2, 4, 8, 8), 500
    embeds = Conditioning.stack(list(parts.encode_prompts(PROMPTS))).prompt["encoder_hidden_states"]
    with torch.no_grad():
        ours, theirs = (unet(latents, t, embeds).sample for unet in (parts.unet, plain.unet))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    pipeline = load_pipeline(model, "pndm", torch.float32, "cpu")
    base = generate(pipeline, PROMPTS, [3, 4], 4, 2.0)
    load_lora(pipeline, file, 1.0)
    drawn = generate(pipeline, PROMPTS, [3, 4], 4, 2.0)
    assert not torch.allclose(drawn, base, atol=1e-3)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    theirs = plain(
        PROMPTS, num_inference_steps=4, guidance_scale=2.0, generator=generators, output_type="pt"
    ).images
    torch.testing.assert_close(drawn, theirs, rtol=0, atol=1e-4)
    pipeline.disable_lora()
    assert torch.equal(generate(pipeline, PROMPTS, [3, 4], 4, 2.0), base)
    pipeline.enable_lora()
    pipeline.set_adapters("default", 0.0)
    torch.testing.assert_close(generate(pipeline, PROMPTS, [3, 4], 4, 2.0), base, rtol=0, atol=1e-5)


def test_guidance_can_take_the_empty_prompt_from_the_base(parts, tiny, tmp_path):
    base = copy.deepcopy(parts.unet)
    move_lora(add_lora(parts.unet, rank=4, alpha=4, seed=0))
    file = save_lora(parts.unet, tmp_path, {})
    pipeline = load_pipeline(tiny / "stable-diffusion-v1-4", "ddim", torch.float32, "cpu")
    load_lora(pipeline, file, 1.0, in_uncond=False)
    drawn = generate(pipeline, PROMPTS, [3, 4], 4, 3.0)
    no_guidance = generate(pipeline, PROMPTS, [3, 4], 4, 1.0)

    # By hand, with one UNet for each half.
    scheduler = DDIMScheduler.from_config(parts.scheduler_config, clip_sample=False)
    scheduler.set_timesteps(4)
    conditioning = Conditioning.stack(list(parts.encode_prompts(["", "", *PROMPTS])))
    embeds = conditioning.prompt["encoder_hidden_states"]
    for guidance, expected in ((3.0, drawn), (1.0, no_guidance)):
        latents = torch.cat(
            [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (3, 4)]
        )
        with torch.no_grad():
            for t in scheduler.timesteps:
                empty, text = (
                    unet(latents, t, own).sample
                    for unet, own in zip((base, parts.unet), embeds.split(2), strict=True)
                )
                eps = text + (guidance - 1) * (text - empty)
                latents = scheduler.step(eps, t, latents).prev_sample
            images = decode(parts.vae, latents).clamp(0, 1)
        torch.testing.assert_close(expected, images, rtol=0, atol=1e-4)

    load_lora(pipeline, file, 1.0)  # again, for both: nothing is left of the other way
    both = generate(pipeline, PROMPTS, [3, 4], 4, 3.0)
    fresh = load_pipeline(tiny / "stable-diffusion-v1-4", "ddim", torch.float32, "cpu")
    load_lora(fresh, file, 1.0)
    assert torch.equal(both, generate(fresh, PROMPTS, [3, 4], 4, 3.0))
    assert not torch.allclose(both, drawn, atol=1e-3)


def test_metadata_describes_the_lora(parts, tmp_path):
    add_lora(parts.unet, rank=4, alpha=8, seed=0)
    file = save_lora(parts.unet, tmp_path, {"rank": 4, "step": 10})
    assert read_metadata(tmp_path) == read_metadata(file) == {"rank": 4, "step": 10}
    with safe_open(file, "pt") as tensors:
        adapter = json.loads(tensors.metadata()["lora_adapter_metadata"])
        assert all(tensors.get_tensor(key).dtype == torch.float32 for key in tensors.keys())  # noqa: SIM118
    assert (adapter["unet.r"], adapter["unet.lora_alpha"]) == (4, 8)


def test_a_failed_save_keeps_the_old_file(parts, tmp_path, monkeypatch):
    add_lora(parts.unet, rank=4, alpha=8, seed=0)
    content = save_lora(parts.unet, tmp_path, {"step": 1}).read_bytes()

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        save_lora(parts.unet, tmp_path, {"step": 2})
    assert (tmp_path / LORA_FILE).read_bytes() == content


def test_lora_of_another_architecture_is_refused(parts, tmp_path, monkeypatch):
    add_lora(parts.unet, rank=4, alpha=4, seed=0)
    file = save_lora(parts.unet, tmp_path, {})
    wider = SIZES["tiny"] | {"unet": SIZES["tiny"]["unet"] | {"block_out_channels": (16, 16, 16, 16)}}
    monkeypatch.setitem(SIZES, "wider", wider)
    model = write_checkpoint(tmp_path / "wider", "wider") / "stable-diffusion-v1-4"
    pipeline = load_pipeline(model, "ddpm", torch.float32, "cpu")
    with pytest.raises(UserError, match="another architecture"):
        load_lora(pipeline, file, 1.0)


def test_a_seed_is_a_image_in_any_batch(tiny):
    pipeline = load_pipeline(tiny / "stable-diffusion-v1-4", "ddpm", torch.float32, "cpu")
    together = generate(pipeline, [*PROMPTS, "x"], [5, 6, 7], 3, 2.0)
    alone = generate(pipeline, PROMPTS[1:], [6], 3, 2.0)
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-5)
    assert together.shape == (3, 3, 64, 64) and together.min() >= 0 and together.max() <= 1
    assert generate(pipeline, PROMPTS, [5, 6], 2, 1.0, resolution=128).shape == (2, 3, 128, 128)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws(tiny, sampler):
    pipeline = load_pipeline(tiny / "stable-diffusion-v1-4", sampler, torch.float32, "cpu")
    assert generate(pipeline, PROMPTS, [5, 6], 4, 2.0).isfinite().all()


def test_vae_decodes_in_float32_when_the_rest_is_float16(tiny):
    parts = load_stable_diffusion(tiny / "stable-diffusion-v1-4", torch.float16, "cpu")
    assert parts.unet.dtype == torch.float16 and parts.vae.dtype == torch.float32
    assert decode(parts.vae, torch.randn(1, 4, 8, 8).half()).dtype == torch.float32


def test_an_empty_tokenizer_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path, "tiny") / "stable-diffusion-v1-4"
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="tokenizer"):
        load_stable_diffusion(folder, torch.float32, "cpu")


def test_truncated_model_files_are_named(tmp_path):
    folder = write_checkpoint(tmp_path, "tiny") / "stable-diffusion-v1-4"
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded|can be loaded"):
        load_stable_diffusion(folder, torch.float32, "cpu")


def test_weights_load_under_the_names_they_were_published_with(tiny, tmp_path):
    # SD-1.4's files name the VAE's attention and prefix CLIP's weights as libraries did in 2022.
    shutil.copytree(tiny / "stable-diffusion-v1-4", tmp_path / "model")
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    file = tmp_path / "model/vae/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for ours, published in names.items():
        weights = {name.replace(ours, published): value for name, value in weights.items()}
    assert any(".proj_attn." in name for name in weights)
    save_file(weights, file, metadata={"format": "pt"})
    file = tmp_path / "model/text_encoder/model.safetensors"
    weights = {
        f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()
    }
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(weights, file, metadata={"format": "pt"})

    then = load_stable_diffusion(tmp_path / "model", torch.float32, "cpu")
    now = load_stable_diffusion(tiny / "stable-diffusion-v1-4", torch.float32, "cpu")
    for part in ("vae", "text_encoder"):
        then_weights, now_weights = (getattr(parts, part).state_dict() for parts in (then, now))
        assert all(torch.equal(then_weights[name], value) for name, value in now_weights.items())

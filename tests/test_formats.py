"""The LoRA in other people's programs: diffusers' and kohya's formats, and merged into a model."""

import json

import refl_lora
from refl.model import merge
from refl.model.lora import (
    ADAPTER_SETTINGS,
    KOHYA_FILE,
    LORA_FILE,
    add_lora,
    export_lora,
    read_metadata,
    to_kohya,
)
from refl.system.errors import UserError

import pytest
import torch
from conftest import run_in_process, run_script, save_lora
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file


@pytest.fixture
def lora_file(parts, tmp_path):
    """A LoRA of rank 2 and alpha 3 that does something."""
    lora = add_lora(parts.unet, 2, 3, 0)
    with torch.no_grad():
        for matrix in lora:
            matrix.copy_(torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    (tmp_path / "lora").mkdir()
    return save_lora(parts.unet, tmp_path / "lora", {"step": 7})


def image(model, lora=None, scale=1.0):
    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    if lora:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="own")
        pipeline.set_adapters("own", scale)
    pipeline.set_progress_bar_config(disable=True)
    return torch.tensor(
        pipeline("a fox", num_inference_steps=3, generator=torch.manual_seed(0), output_type="np").images
    )


def test_kohyas_format_draws_the_same_images(lora_file, tiny, tmp_path):
    model, kohya = tiny / "stable-diffusion-v1-4", tmp_path / "kohya.safetensors"
    kohya.write_bytes(to_kohya(lora_file.read_bytes(), "run"))
    ours, theirs, base = image(model, lora_file), image(model, kohya), image(model)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert (ours - base).abs().max() > 0.01
    weights = load_file(kohya)
    assert {value.item() for key, value in weights.items() if key.endswith(".alpha")} == {3.0}
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"
    assert weights[key].shape == (2, 8)
    assert len(weights) == 3 * len(load_file(lora_file)) / 2
    with safe_open(kohya, "pt") as file:
        about = file.metadata()
    assert (about["ss_network_dim"], about["ss_network_alpha"]) == ("2", "3.0")
    assert about["ss_output_name"] == "run"
    assert read_metadata(kohya) == {"step": 7}


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_merged_model_draws_what_the_lora_drew(lora_file, tiny, tmp_path, scale):
    model, output = tiny / "stable-diffusion-v1-4", tmp_path / "merged"
    merge.merge(merge.Options(str(model), str(lora_file), scale, str(output)))
    assert {path.name for path in output.iterdir()} == {path.name for path in model.iterdir()}
    weights = load_file(output / "unet/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}  # as the model's
    wanted, base = image(model, lora_file, scale), image(model)
    merged = image(output)
    assert (merged - wanted).abs().max() < 0.1 * (wanted - base).abs().max()  # float16 rounds the weights
    with pytest.raises(UserError, match="exists; name a new folder"):
        merge.merge(merge.Options(str(model), str(lora_file), scale, str(output)))


def test_a_merge_that_cannot_be(lora_file, tiny, tmp_path, monkeypatch):
    model = str(tiny / "stable-diffusion-v1-4")
    with pytest.raises(UserError, match="no LoRA at"):
        merge.merge(merge.Options(model, str(tmp_path / "none"), 1.0, str(tmp_path / "merged")))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge.shutil, "copytree", full)
    with pytest.raises(UserError, match="merged cannot be written: .*No space"):
        merge.merge(merge.Options(model, str(lora_file), 1.0, str(tmp_path / "merged")))
    assert not list(tmp_path.glob("merged*"))


def test_a_merge_that_is_not_finite(lora_file, tiny, tmp_path):
    """The model is in float16, whose numbers end at 65,504."""
    model, output = str(tiny / "stable-diffusion-v1-4"), tmp_path / "merged"
    with pytest.raises(UserError, match="the merged UNet: .* are not finite .*lower --lora_scale"):
        merge.merge(merge.Options(model, str(lora_file), 1e8, str(output)))
    assert not output.exists()


def adapter_of(file):
    with safe_open(file, "pt") as tensors:
        return json.loads(tensors.metadata()["lora_adapter_metadata"])


def test_an_exported_lora_needs_no_metadata(lora_file, tiny):
    """Its alpha is its rank, and it draws the same as before, from which it differs in B alone."""
    exported = lora_file.with_name("exported.safetensors")
    exported.write_bytes(export_lora(lora_file.read_bytes()))
    before, after = load_file(lora_file), load_file(exported)
    for key, value in before.items():
        assert torch.equal(after[key], value * 1.5 if ".lora.up." in key else value), key
    assert {key.removeprefix("unet.") for key in adapter_of(exported)} == set(ADAPTER_SETTINGS)
    assert adapter_of(exported) | {"unet.lora_alpha": 3} == adapter_of(lora_file)
    assert adapter_of(exported)["unet.lora_alpha"] == adapter_of(exported)["unet.r"] == 2
    assert read_metadata(exported) == read_metadata(lora_file)
    model = tiny / "stable-diffusion-v1-4"
    torch.testing.assert_close(image(model, exported), image(model, lora_file), rtol=0, atol=1e-5)
    again = export_lora(exported.read_bytes())
    assert again == exported.read_bytes()


def test_a_run_exports_its_result_and_keeps_what_it_trained(training_options, tmp_path, monkeypatch):
    run_in_process(refl_lora, monkeypatch, *training_options, "--lora_alpha=6")
    out = tmp_path / "out"
    checkpoint = (out / "checkpoint-2" / LORA_FILE).read_bytes()
    assert adapter_of(out / "checkpoint-2" / LORA_FILE)["unet.lora_alpha"] == 6
    assert (out / LORA_FILE).read_bytes() == export_lora(checkpoint) != checkpoint
    assert (out / KOHYA_FILE).read_bytes() == to_kohya((out / LORA_FILE).read_bytes(), "out")
    # A finished run writes or leaves out kohya's file as asked.
    for option, is_there in (("--no_also_kohya", False), ("--also_kohya", True)):
        (out / "README.md").unlink()
        run_in_process(refl_lora, monkeypatch, *training_options, "--lora_alpha=6", option)
        assert (out / KOHYA_FILE).exists() == is_there


@pytest.mark.slow
def test_other_versions_of_diffusers_draw_the_same():
    ran = run_script("bash", "tests/clients/run.sh")
    if ran.returncode == 77:
        pytest.skip(ran.stdout.splitlines()[-1])
    assert ran.returncode == 0, ran.stdout + ran.stderr

"""One training step at the real sizes: SD-1.4's and ImageReward's architectures, random weights, the user's
files."""

import shutil
import sys
from pathlib import Path

from refl.model.lora import add_lora
from refl.model.stable_diffusion import load_stable_diffusion
from refl.reward import imagereward

import pytest
import torch
from conftest import run_script, weight_options
from diffusers import StableDiffusionPipeline
from random_checkpoint import write_checkpoint
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    yield write_checkpoint(folder, "full")
    shutil.rmtree(folder)


def test_the_architectures_are_the_published_ones(full):
    parts = load_stable_diffusion(full / "stable-diffusion-v1-4", torch.float16, "cpu")
    sizes = {
        name: sum(p.numel() for p in getattr(parts, name).parameters())
        for name in ("unet", "vae", "text_encoder")
    }
    assert sizes == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
    lora = add_lora(parts.unet, rank=4, alpha=4, seed=0)
    assert sum(matrix.numel() for matrix in lora) == 797_184  # 3 MB in float32
    weights = imagereward.read_weights(full / "ImageReward.pt")
    assert len(weights) == 620  # the published 625 but for five that the score does not use
    assert sum(value.numel() for value in weights.values()) == 446_206_689


def test_one_step_trains_and_the_lora_reloads(full, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a lighthouse on a cliff\na bowl of cherries\n")
    run = run_script(
        "bash", "train_refl_lora.sh", *weight_options(full),
        f"--prompts={prompts}", f"--validation_prompts={prompts}",
        "--output_dir", tmp_path / "out",
        *"--resolution 64 --num_inference_steps 2 --min_stop 1 --max_stop 1 --train_batch_size 1".split(),
        *"--gradient_accumulation_steps 1 --max_train_steps 1 --num_validation_images 1".split(),
        *"--gradient_checkpointing --learning_rate 1e-3".split(),
        NUM_PROCESSES="1", OMP_NUM_THREADS="2",
    )  # fmt: skip
    print(run.stdout, run.stderr[-2000:], file=sys.stderr)
    assert run.returncode == 0
    weights = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert len(weights) == 256 and all(value.isfinite().all() for value in weights.values())
    assert sum(value.abs().max() > 0 for name, value in weights.items() if ".lora.up." in name) == 128

    pipeline = StableDiffusionPipeline.from_pretrained(
        full / "stable-diffusion-v1-4", torch_dtype=torch.float32
    )
    draw = lambda: pipeline(  # noqa: E731
        "a bowl of cherries", num_inference_steps=2, height=64, width=64, output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    base = draw()
    pipeline.load_lora_weights(tmp_path / "out")
    assert abs(draw() - base).max() > 0

"""Fixtures: a tiny checkpoint with random weights in the user's layout, and the bundled demo world."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
torch.set_num_threads(1)  # tiny models: a second thread costs more than it brings

from refl.model.lora import (
    LORA_FILE,
    pack_lora,
)
from refl.model.stable_diffusion import (
    StableDiffusion,
    load_stable_diffusion,
)
from refl.reward import imagereward
from refl.system.files import write_whole

from random_checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """`checkpoint/` of tiny models with random weights."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), "tiny")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its settings for the life of the process; each test starts without any."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def parts(tiny) -> StableDiffusion:
    return load_stable_diffusion(tiny / "stable-diffusion-v1-4", torch.float32, "cpu")


@pytest.fixture
def reward(tiny) -> imagereward.ImageReward:
    return imagereward.load(tiny)


@pytest.fixture
def prompts_file(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red cat\na blue dog\nthree green apples\na hill at night\n")
    return path


def save_lora(unet, folder: Path, metadata: dict) -> Path:
    """The LoRA of `unet` where training puts it in `folder`."""
    path = folder / LORA_FILE
    write_whole(path, pack_lora(unet, metadata))
    return path


def weight_options(checkpoint: Path) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={checkpoint / 'stable-diffusion-v1-4'}",
        f"--reward_path={checkpoint}",
    ]


@pytest.fixture
def training_options(tiny, prompts_file, tmp_path) -> list[str]:
    """Options of a run that takes seconds; it writes to tmp_path / "out"."""
    return [
        *weight_options(tiny),
        f"--prompts={prompts_file}",
        f"--validation_prompts={prompts_file}",
        f"--output_dir={tmp_path / 'out'}",
        *"--num_inference_steps 4 --min_stop 2 --max_stop 3 --max_train_steps 2".split(),
        *"--gradient_accumulation_steps 2 --num_validation_images 3".split(),
    ]


def run_script(*command: str | Path, **environment: str) -> subprocess.CompletedProcess:
    """A script as a user runs it, from the repository's root."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=900,
    )

"""The demo as a newcomer runs it, only shorter: it must learn, and say so."""

import json
import shutil
import sys

import pytest
from conftest import ROOT, run_script
from PIL import Image

STEPS = 80


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project elsewhere: the demo writes where it is, and a run of another length is in a user's way."""
    folder = tmp_path_factory.mktemp("copy") / "project"
    ours = shutil.ignore_patterns(".*", "result", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=ours)
    return folder


def test_the_demo_learns_and_shows_it(copy):
    demo, steps = copy / "demo/run.sh", str(STEPS)
    run = run_script("bash", demo, "--max_train_steps", steps, PYTHON=sys.executable, OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stderr
    assert "192 held-out prompts" in run.stdout and "difference" in run.stdout
    summary = json.loads((copy / "result/demo/summary.json").read_text())
    assert summary.keys() == {
        "base", "lora", "num_prompts", "guidance_scale", "seconds_training", "seconds_total", "options",
    }  # fmt: skip
    for side in ("base", "lora"):
        assert summary[side].keys() == {"reward_mean", "all_right", "colour", "shape", "background"}
    assert summary["num_prompts"] == 192 and summary["options"]["max_train_steps"] == STEPS
    assert summary["seconds_total"] > summary["seconds_training"] > 0
    assert 0.25 <= summary["base"]["all_right"] <= 0.5  # crisp, and with something left to learn
    assert abs(summary["base"]["reward_mean"]) < 0.3  # standardised on the base model's pictures
    assert summary["lora"]["reward_mean"] > summary["base"]["reward_mean"] + 0.15
    assert summary["lora"]["all_right"] > summary["base"]["all_right"]
    picture = Image.open(copy / "result/demo/before_after.png")
    assert picture.width > 1000 and picture.height > 800


def test_another_length_is_refused_in_one_message(copy):
    run = run_script("bash", copy / "demo/run.sh", PYTHON=sys.executable, OMP_NUM_THREADS="1")
    assert run.returncode == 2 and "max_train_steps: 80 -> 300" in run.stderr
    assert run.stderr.strip().endswith("or go on all the same with --allow_changed_options.")

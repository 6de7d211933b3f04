"""The demo as a newcomer runs it, only shorter: it must learn, and say so."""

import json

from conftest import ROOT, run_script
from PIL import Image

STEPS = 80


def test_the_demo_learns_and_shows_it():
    run = run_script(
        "bash",
        "demo/run.sh",
        "--max_train_steps",
        str(STEPS),
        "--resume_from_checkpoint",
        "none",
        OMP_NUM_THREADS="1",
    )
    assert run.returncode == 0, run.stderr
    assert "192 held-out prompts" in run.stdout and "difference" in run.stdout
    summary = json.loads((ROOT / "result/demo/summary.json").read_text())
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
    picture = Image.open(ROOT / "result/demo/before_after.png")
    assert picture.width > 1000 and picture.height > 800

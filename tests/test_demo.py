"""The demo as a newcomer runs it, only shorter: it must learn, and say so."""

import json
import shutil

import pytest
from conftest import ROOT, run_script
from PIL import Image

pytestmark = pytest.mark.slow

STEPS = 80


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project elsewhere: the demo writes where it is, and a run of another length is in a user's way."""
    folder = tmp_path_factory.mktemp("copy") / "project"
    ours = shutil.ignore_patterns(".*", "result", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=ours)
    return folder


def test_the_demo_learns_shows_it_and_refuses_another_length(copy):
    demo, steps = copy / "demo/run.sh", str(STEPS)
    run = run_script("bash", demo, "--max_train_steps", steps)
    assert run.returncode == 0, run.stderr
    assert "192 prompts, 2 of each" in run.stdout and "judge.all_right" in run.stdout
    evaluation = json.loads((copy / "result/demo/evaluation/evaluation.json").read_text())
    base, *_, lora = evaluation["cases"]
    assert (evaluation["num_prompts"], lora["step"], lora["guidance_scale"]) == (192, STEPS, 1)
    before, after = (
        {measure: found["mean"] for measure, found in case["means"].items()} for case in (base, lora)
    )
    assert before.keys() == {
        "reward", "saturated", "diversity",
        "judge.all_right", "judge.colour", "judge.shape", "judge.background",
    }  # fmt: skip
    assert 0.25 <= before["judge.all_right"] <= 0.5  # crisp, and with something left to learn
    assert abs(before["reward"]) < 0.3  # standardised on the base model's images
    assert after["reward"] > before["reward"] + 0.15 and lora["against_base"]["reward"]["low"] > 0
    assert after["judge.all_right"] > before["judge.all_right"]
    image = Image.open(copy / "result/demo/evaluation/grid.png")
    assert image.width > 1000 and image.height > 800
    assert (copy / "result/demo/evaluation/report.html").stat().st_size < 10e6
    card = (copy / "result/demo/refl_lora/README.md").read_text()
    assert "## Evaluation" in card and "before_after.png" in card

    # The same folder, another length: one message, and nothing is lost.
    again = run_script("bash", demo)
    assert again.returncode == 2 and f"max_train_steps: {STEPS} -> 300" in again.stderr
    assert again.stderr.strip().endswith("or resume anyway with --allow_changed_options.")

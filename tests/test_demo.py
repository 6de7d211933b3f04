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
    run = run_script("bash", demo, "--max_train_steps", steps, GUIDANCES="5,7.5")
    assert run.returncode == 0, run.stderr
    assert "192 prompts, 2 of each" in run.stdout and "judge.all_right" in run.stdout
    evaluation = json.loads((copy / "result/demo/evaluation/evaluation.json").read_text())
    best = evaluation["best_against_best"]
    base, lora = evaluation["cases"][best["base"]], evaluation["cases"][best["loras"][0]["case"]]
    assert best["criterion"] == "judge.all_right"
    assert (evaluation["num_prompts"], lora["step"]) == (192, STEPS)
    before, after = (
        {measure: found["mean"] for measure, found in case["means"].items()} for case in (base, lora)
    )
    judged = {f"judge.{name}" for name in ("all_right", "clean", "colour", "shape", "background")}
    assert before.keys() == {"reward", "saturated", "diversity", *judged}
    assert 0.3 <= before["judge.all_right"] <= 0.6  # something to learn, and something to build on
    assert after["judge.all_right"] > before["judge.all_right"] + 0.15
    differences = best["loras"][0]["against_best_base"]
    assert differences["reward"]["low"] > 0 and differences["judge.all_right"]["low"] > 0
    verdicts = json.loads((copy / "result/demo/evaluation/verdicts.json").read_text())
    assert verdicts[lora["name"]]["errors_left"] < 0.8 and verdicts[lora["name"]]["lost"]["any"] < 0.15
    image = Image.open(copy / "result/demo/evaluation/grid.png")
    assert image.width > 1000 and image.height > 800
    assert (copy / "result/demo/evaluation/report.html").stat().st_size < 10e6
    card = (copy / "result/demo/refl_lora/README.md").read_text()
    assert "## Evaluation" in card and "before_after.png" in card

    # The same folder, another length: one message, and nothing is lost.
    again = run_script("bash", demo)
    assert again.returncode == 2 and f"max_train_steps: {STEPS} -> 200" in again.stderr
    assert again.stderr.strip().endswith("or resume anyway with --allow_changed_options.")

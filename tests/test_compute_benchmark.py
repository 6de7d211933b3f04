"""benchmarks/compute.py: what a training costs, and what becomes of its results."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import compute

TRIALS = [
    {"learning rate": rate, "batch": batch, "fully right": right}
    for rate, batch, right in (("1e-3", 16, 0.5), ("2e-3", 8, 0.75), ("4e-3", 16, 0.25))
]


@pytest.fixture
def folder(tmp_path):
    trials = {"published": TRIALS, "short": TRIALS[::2]}
    (tmp_path / "tuning.json").write_text(json.dumps(trials))
    return tmp_path


def trainings() -> dict[str, compute.Training]:
    return {name: training for own in compute.FAMILIES.values() for name, training in own.items()}


def test_each_rollout_gets_the_settings_of_its_best_trial(folder, tiny):
    half = trainings()["published, half"]
    options = compute.all_options(half, folder, str(tiny)).split()
    assert options[options.index("--learning_rate") + 1] == "2e-3"
    assert options[options.index("--train_batch_size") + 1] == "8"
    assert options[options.index("--max_train_steps") + 1] == str(compute.IMAGES // 2 // 8)
    assert compute.tuned(folder, "short") == ("1e-3", 16)


def test_estimators_cost_as_much_as_the_training_they_are_compared_with(tiny):
    equal = trainings()[compute.EQUAL]
    expected = compute.price(equal, str(tiny)) * compute.IMAGES / 2
    estimators = compute.FAMILIES["estimator"].values()
    costs = [compute.price(t, str(tiny)) * compute.num_images(t, str(tiny)) for t in estimators]
    assert costs == pytest.approx([expected] * len(costs), rel=1e-2)
    assert len({compute.num_images(t, str(tiny)) for t in estimators}) == len(costs)


def test_the_price_is_that_of_the_published_grid(tiny):
    """A rollout to the last step of 40 costs more than one to stops 30 to 39; the demo's own has 20 steps."""
    of_last = compute.Training("published", "--min_stop 19 --max_stop 19")
    names = "published", "12 steps, half", "8 steps", "8 steps, half, guided gradient only"
    prices = {name: compute.price(trainings()[name], str(tiny)) for name in names}
    prices["last"] = compute.price(of_last, str(tiny))
    assert prices["last"] > prices["published"] > prices["12 steps, half"] > prices["8 steps"]
    assert prices["8 steps"] > prices["8 steps, half, guided gradient only"]
    parts = compute.sd14_parts(str(tiny), None)
    assert prices["last"] - prices["published"] == pytest.approx(2 * 4.5 * parts.unet, rel=1e-6)


def test_results_become_a_table_and_a_plot(folder, tiny):
    scores = {compute.run_folder(folder, name, seed): {
        "judge.all_right": 0.5 + seed / 10, "reward": 1.0, "diversity": 0.1,
    } for name in ("published", "8 steps") for seed in (0, 1)}  # fmt: skip
    for run in scores:
        run.with_name(f"{run.name}.seconds").write_text("10.5\n2\n")
    found = list(compute.rows(folder, (0, 1, 2), scores, str(tiny)))
    assert [row["training"] for row in found] == ["published", "8 steps"]
    assert found[0]["CPU seconds"] == {0: 12.5, 1: 12.5}
    content = {"rows": found, "base": {"judge.all_right": 0.4, "reward": 0.5, "diversity": 0.2}}
    first = compute.table(content).splitlines()[3]
    assert "| 100.0% | 12 | **0.550** (0.500, 0.600) | 0.75 | **1.00** |" in first
    compute.plot(content, folder / "plot.png")
    assert (folder / "plot.png").stat().st_size > 1000


def test_the_chosen_trials_are_bold():
    table = compute.tuning_table({"published": TRIALS, "short": TRIALS})
    assert [line for line in table.splitlines() if "**" in line] == ["| 2e-3 | 8 | **0.750** | **0.750** |"]

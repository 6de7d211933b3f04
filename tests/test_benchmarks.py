"""What is compared by benchmarks/step.py is the same step."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import step

pytestmark = pytest.mark.slow

OPTIONS = step.Options(num_inference_steps=4, min_stop=1, max_stop=3, gradient_accumulation_steps=3)
OTHERS = ("baseline", "no_lean", "no_channels_last", "no_batched_rollout", "peft_lora", "fused_adamw")


@pytest.fixture(scope="module")
def entries() -> dict[str, dict]:
    """One optimizer step of each variant in the demo world, its LoRA kept."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for variant in ("ours", *OTHERS):
            one = step.Step(variant, OPTIONS, step.Case(0, 2, "fp32"))
            found[variant] = one() | {"gradients": [matrix.grad for matrix in one.lora]}
    return found


@pytest.mark.parametrize("variant", OTHERS)
def test_variants_take_the_same_step(entries, variant):
    ours, other = entries["ours"], entries[variant]
    assert other["loss"] == pytest.approx(ours["loss"], rel=1e-4)
    distance = sum((a - b).square().sum() for a, b in zip(ours["gradients"], other["gradients"], strict=True))
    size = sum(a.square().sum() for a in ours["gradients"])
    assert size > 0 and distance < 1e-6 * size


def test_flops_are_counted_by_phase(entries):
    ours, baseline = entries["ours"]["flops"], entries["baseline"]["flops"]
    for phase in ("rollout", "grad_step", "decode", "reward", "backward"):
        assert ours[phase] > 0 and baseline[phase] > 0
    assert baseline["text"] > 0 == ours.get("text", 0)
    assert ours["decode"] == baseline["decode"]
    # One UNet forward more for each image, which gives x0.
    assert 1.2 < ours["rollout"] / baseline["rollout"] < 2


def test_results_become_a_table(entries, tmp_path):
    rounds = {name: [entries[name] | {"matmul": 1e11}] * 3 for name in ("ours", "baseline")} | {
        "torch_compile": [{"error": "out of memory"}]
    }
    result = {"resolution": 0, "batch_size": 2, "precision": "fp32", "variants": step.summarise(rounds)}
    ours, baseline, broken = step.table([result]).splitlines()[2:]
    assert "| ours | " in ours and "| 1.00 (1.00 to 1.00) |" in ours
    assert "| baseline | " in baseline and "torch_compile | out of memory" in broken
    assert json.dumps(result)
    step.plot([result], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000

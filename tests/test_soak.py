"""The soak in short: a few kills of the demo world's training."""

import json
import sys

import pytest
from conftest import ROOT, run_script

pytestmark = pytest.mark.slow


def soak(root, output, kills):
    return run_script(
        sys.executable, root / "benchmarks/soak.py", "--kills", str(kills), "--output_dir", output
    )


def test_a_short_soak_loses_nothing(tmp_path):
    run = soak(ROOT, tmp_path, 4)
    assert run.returncode == 0, run.stdout + run.stderr
    counts = json.loads((tmp_path / "soak.json").read_text())
    assert sum(counts["kills"].values()) == 4 and counts["starts"] >= 4
    assert counts["checkpoints_lost"] == counts["mismatches"] == counts["failures"] == 0
    assert "| kills | 4 (" in run.stdout
    assert soak(ROOT, tmp_path, 4).returncode == 0  # nothing left to do

"""benchmarks/gpu.sh with tiny models on the CPU: tasks, their failures, and what is left to commit."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_script

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu
import gpu_tasks


@pytest.mark.slow
def test_the_command_checks_and_reports(tmp_path):
    run = run_script(
        "bash", "benchmarks/gpu.sh", "--size", "tiny", "--seconds", "900", "--only", "gradients_fp32",
        "--work_dir", tmp_path / "work", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {name: result["status"] for name, result in report["results"].items()} == {
        "weights": "measured",
        "reference": "measured",
        "gradients_fp32": "passed",
    }
    assert report["machine"].startswith("CPU") and report["command"].startswith(
        "bash benchmarks/gpu.sh --size"
    )
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| gradients_fp32 | passed |" in table and table.startswith(report["date"])
    assert {"log.txt", "plot.png"} <= {file.name for file in (tmp_path / "out").iterdir()}


def test_a_task_that_hangs_is_ended(tmp_path):
    options = gpu.Options(size="tiny", work_dir=str(tmp_path))
    result = gpu.run_task("weights", options, 0.2, tmp_path / "log.txt")
    assert (result["status"], result["detail"]) == ("timeout", "not finished after 0.2 s")


def test_a_task_that_breaks_says_why(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'RuntimeError: no more memory'\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(python))
    result = gpu.run_task("weights", gpu.Options(work_dir=str(tmp_path)), 60, tmp_path / "log.txt")
    assert (result["status"], result["detail"]) == ("error", "exit code 3: RuntimeError: no more memory")


def test_a_task_for_a_gpu_is_skipped_without_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    gpu_tasks.require_gpus(1)
    with pytest.raises(gpu_tasks.Skip, match="needs 2 GPUs, 1 visible"):
        gpu_tasks.require_gpus(2)


@pytest.mark.parametrize("status", ["passed", "failed", "timeout"])
def test_the_exit_code_tells_whether_all_checks_passed(tmp_path, monkeypatch, status):
    result = {"status": status, "detail": "made up", "numbers": {}, "seconds": 1.0}
    monkeypatch.setattr(
        gpu, "run_task", lambda name, *_: result if name == "memory" else result | {"status": "measured"}
    )
    command = f"gpu.py --only memory settings --work_dir {tmp_path / 'work'} --output_dir {tmp_path / 'out'}"
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == (status != "passed")


def test_tasks_after_the_time_limit_are_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "run_task", lambda *_: pytest.fail("there was no time"))
    command = f"gpu.py --seconds 5 --work_dir {tmp_path / 'work'} --output_dir {tmp_path / 'out'}"
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(SystemExit):
        gpu.main()
    assert capsys.readouterr().out.count("no time left") == len(gpu.TASKS)


def test_every_task_has_a_time_limit():
    assert set(gpu.TASKS) == set(gpu_tasks.TASKS)


@pytest.mark.parametrize(("factor", "status"), [(1.0, "passed"), (1.01, "failed"), (float("nan"), "failed")])
def test_a_wrong_gradient_fails(tmp_path, monkeypatch, factor, status):
    made = {"000": torch.ones(3), "001": torch.ones(2), "loss": torch.tensor(0.5)}
    options = SimpleNamespace(work_dir=str(tmp_path))
    monkeypatch.setattr(gpu_tasks, "gradients_of", lambda *_: dict(made))
    gpu_tasks.reference(options)
    made["001"] = factor * made["001"]
    assert gpu_tasks.gradients(options, "fp32").status == status


def test_measurements_become_bars(tmp_path):
    own = {"seconds_to_first": [0.9, 1.0, 1.2], "peak_gib": 3.0}
    results = {
        "settings": {"numbers": {"ours": own, "cudnn_benchmark": own, "broken": {"error": "out of memory"}}}
    }
    gpu.plot(results, tmp_path / "bars.png")
    gpu.plot({}, tmp_path / "empty.png")
    assert (tmp_path / "bars.png").stat().st_size > (tmp_path / "empty.png").stat().st_size > 1000

"""Checks of training on a GPU, and measurements, in one command of at most eight minutes: benchmarks/gpu.sh.

bash benchmarks/gpu.sh                          # SD-1.4's and ImageReward's architectures, random weights
bash benchmarks/gpu.sh --size tiny              # tiny models: a minute or two, also on the CPU
bash benchmarks/gpu.sh --only gradients_bf16    # some of the tasks of gpu_tasks.py

Each task runs in a process of its own with a time limit, so that one that fails leaves the others' results.
The exit code is 1 if a check failed or did not end. Nothing is downloaded. --output_dir gets results.json,
table.md, plot.png and log.txt, rewritten after each task.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from refl.system.files import write_whole

import tyro
from matplotlib.figure import Figure

CHECKS = {  # name of the task -> its time limit, seconds
    "gradients_fp32": 60,
    "gradients_bf16": 60,
    "gradients_fp16": 60,
    "host_syncs": 60,
    "memory": 90,
    "offloading": 60,
    "resume": 100,
    "low_memory": 60,
    "two_processes": 60,
}
MEASUREMENTS = {
    "settings": 90,
    "baseline": 90,
    "torch_compile": 150,
    "cuda_graphs": 150,
    "fp16": 60,
    "fp32": 90,
}
PREPARATION = {"weights": 150, "reference": 90}
TASKS = PREPARATION | CHECKS | MEASUREMENTS  # in this order
SHORTEST = 10  # seconds; a task that would get less is skipped


@dataclass
class Options:
    """Check and measure training on a GPU."""

    size: Literal["full", "tiny"] = "full"
    """full: SD-1.4's and ImageReward's architectures; tiny: models for a quick look. Weights are random."""
    seconds: float = 470
    """Time limit of the whole command; tasks that do not fit any more are skipped."""
    only: tuple[Literal[tuple(CHECKS | MEASUREMENTS)], ...] = ()
    """Tasks to run; all if none is named."""
    work_dir: str = "result/benchmarks/gpu"
    """Weights and intermediate files; weights are written there on the first run (4 GB at full size)."""
    output_dir: str = "benchmarks/results/gpu"
    """Where results.json, table.md, plot.png and log.txt go."""


# --------------------------------------------------------------------------------------------------- one task


def run_task(name: str, options: Options, limit: float, log: Path) -> dict[str, Any]:
    """Run a task in a process of its own for `limit` seconds at most; returns its result."""
    file = Path(options.work_dir) / f"{name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "benchmarks/gpu_tasks.py", name, f"--size={options.size}"]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if name == "reference" else {})
    started = time.perf_counter()
    with log.open("a") as output:
        output.write(f"\n==== {name}\n")
        output.flush()
        process = subprocess.Popen(
            [*command, f"--work_dir={options.work_dir}"], cwd=ROOT, env=environment,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # and with it the processes that it started
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code == 0 and file.exists():
        return json.loads(file.read_text())
    if code is None:
        status, detail = "timeout", f"not finished after {limit:.3g} s"
    else:
        status, detail = "error", f"exit code {code}: {last_line(log)}"
    return {"status": status, "detail": detail, "numbers": {}, "seconds": time.perf_counter() - started}


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200]


# ---------------------------------------------------------------------------------------------------- results


def table(results: dict[str, dict[str, Any]]) -> str:
    """Outcomes as Markdown: checks, then measurements."""
    lines = []
    for title, names in (("Checks", CHECKS), ("Measurements", MEASUREMENTS)):
        lines += [f"## {title}", "", "| task | outcome | seconds | detail |", "|---|---|---|---|"]
        for name, result in results.items():
            if name in names:
                detail = result["detail"].replace("|", "/")
                lines.append(f"| {name} | {result['status']} | {result['seconds']:.0f} | {detail} |")
        lines.append("")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Time relative to `ours`, and peak memory, of each variant that was measured."""
    bars = {}
    for task in MEASUREMENTS:
        for name, own in results.get(task, {}).get("numbers", {}).items():
            if "seconds_to_first" in own:
                label = f"{name}, {task}" if task in ("fp16", "fp32") else name
                bars.setdefault(label, (own["seconds_to_first"], own["peak_gib"]))
    figure = Figure(figsize=(11, 1 + 0.35 * max(len(bars), 4)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for row, (low_middle_high, peak) in enumerate(bars.values()):
        low, middle, high = low_middle_high
        axes[0].barh(row, middle, xerr=[[middle - low], [high - middle]], color="tab:blue", capsize=3)
        axes[1].barh(row, peak, color="tab:orange")
    axes[0].set_yticks(range(len(bars)), list(bars))
    axes[0].invert_yaxis()
    axes[0].set_title("seconds of an optimizer step, ours = 1")
    axes[1].set_title("peak memory, GiB")
    for axis in axes:
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def write_results(options: Options, results: dict[str, dict[str, Any]]) -> None:
    """Everything so far, whole."""
    output, about = Path(options.output_dir), results.get("weights", {}).get("numbers", {})
    command = " ".join(["bash benchmarks/gpu.sh", *sys.argv[1:]])
    report = {"date": date.today().isoformat(), "command": command} | about | {"results": results}
    write_whole(output / "results.json", json.dumps(report, indent=1) + "\n")
    heading = f"{report['date']}, {about.get('machine', 'unknown machine')}: `{command}`"
    write_whole(output / "table.md", f"{heading}\n\n{table(results)}")
    plot(results, output / "plot.png")


def main() -> None:
    """Each task within the time that is left; results; exit code."""
    options, started = tyro.cli(Options, use_underscores=True), time.perf_counter()
    os.chdir(ROOT)
    output, results = Path(options.output_dir), {}
    for folder in (output, Path(options.work_dir)):
        folder.mkdir(parents=True, exist_ok=True)
    log = output / "log.txt"
    log.write_text("")
    needs_reference = not options.only or any(name.startswith("gradients") for name in options.only)
    wanted = ["weights", *["reference"] * needs_reference, *(options.only or CHECKS | MEASUREMENTS)]
    for name in wanted:
        left = options.seconds - (time.perf_counter() - started)
        if left < SHORTEST:
            result = {"status": "skipped", "detail": "no time left", "numbers": {}, "seconds": 0.0}
        else:
            result = run_task(name, options, min(TASKS[name], left), log)
        results[name] = result
        print(f"{name:>15}  {result['status']:<8} {result['seconds']:5.0f} s  {result['detail']}", flush=True)
        write_results(options, results)
    outcomes = {name: result["status"] for name, result in results.items() if name not in MEASUREMENTS}
    failed = [name for name, status in outcomes.items() if status in ("failed", "error", "timeout")]
    skipped = [name for name, status in outcomes.items() if status == "skipped"]
    passed = sum(status == "passed" for status in outcomes.values())
    print(f"checks: {passed} passed, {len(skipped)} skipped, failed: {', '.join(failed) or 'none'}")
    print(f"results in {output}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

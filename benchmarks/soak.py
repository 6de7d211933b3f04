"""Soak test: train the demo world, kill it at random, resume it, and count what was lost.

python benchmarks/soak.py --kills 200
python benchmarks/soak.py --kills 50 --processes 2

The reference is one uninterrupted run. The same run is then started, killed and resumed by the same command
until it is finished, its LoRA, optimizer and curves are compared with the reference byte for byte, and the
next run begins. Kills hit a process while it starts, trains or saves, which it does after every step. Counts
are written to --output_dir/soak.json after every kill, and the same command resumes from there.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from refl.model.lora import LORA_FILE
from refl.system import checkpoints
from refl.system.files import write_whole

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

TIMINGS = ("seconds", "images_per_second", "memory")  # curves that differ between equal runs
OPTIONS = """--num_inference_steps 6 --min_stop 3 --max_stop 5 --train_batch_size 2 --max_train_steps 60
    --gradient_accumulation_steps 2 --lr_scheduler cosine --lr_warmup_steps 3 --learning_rate 2e-3
    --checkpointing_steps 1 --checkpoints_total_limit 2 --validation_steps 20
    --num_validation_images 2""".split()
SIGNALS = {"SIGKILL": 6, "SIGTERM": 3, "SIGINT": 1}  # weights of the random choice
START_KILLS = 0.1  # share of kills within 8 s after the start; others follow a new checkpoint


@dataclass
class Options:
    """Kill training at random, resume it, and count what is lost."""

    kills: int = 1000
    """Kills in total, including those of earlier starts."""
    processes: int = 1
    """Training processes; more than one are started by train_refl_lora.sh and killed together."""
    seed: int = 0
    """Seed of the times of the kills."""
    output_dir: str = "result/soak"
    """Where the runs, the counts and the table go."""


@dataclass
class Counts:
    """Counts of kills, starts and faults."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIGNALS, 0))
    kills_in_start: int = 0
    starts: int = 0
    runs_finished: int = 0
    checkpoints_lost: int = 0
    mismatches: int = 0
    failures: int = 0
    seconds: float = 0.0


def start(output: Path, processes: int) -> subprocess.Popen:
    """Start the training command in its own process group."""
    command = ["bash", "train_refl_lora.sh"] if processes > 1 else [sys.executable, "refl_lora.py"]
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "NUM_PROCESSES": str(processes)}
    demo = [
        "--pretrained_model_name_or_path=demo/checkpoint/stable-diffusion-v1-4",
        "--reward_path=demo/checkpoint",
    ]
    prompts = ["--prompts=demo/prompts/train.txt", "--validation_prompts=demo/prompts/held_out.txt"]
    with open(output.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [*command, *demo, *prompts, *OPTIONS, f"--output_dir={output}"],
            cwd=ROOT,
            env={**os.environ, **environment, "PYTHON": sys.executable},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def newest_step(output: Path) -> int:
    """Return the step of the newest checkpoint, 0 if there is none; raises `ValueError` if it is damaged."""
    step = max(checkpoints.steps(output), default=0)
    if step:
        checkpoints.read(output / f"checkpoint-{step}")
    return step


def artifacts(output: Path) -> dict[str, bytes | list]:
    """Files and curves of a finished run that must be equal in every run, by name."""
    last = output / f"checkpoint-{newest_step(output)}"
    files = [output / LORA_FILE, *(last / name for name in (LORA_FILE, "optimizer.safetensors"))]
    board = EventAccumulator(str(output / "logs"), size_guidance={"scalars": 0}).Reload()
    curves = {
        tag: [(point.step, point.value) for point in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
        if tag.split("/")[0] not in TIMINGS
    }
    return {str(path.relative_to(output)): path.read_bytes() for path in files} | curves


def wait_for_kill_time(process: subprocess.Popen, output: Path, before: int, chance: random.Random) -> None:
    """Wait up to 8 s from the start or, more often, up to 4 s from a checkpoint newer than step `before`.

    Returns earlier if the process ends, and after 300 s without a new checkpoint.
    """
    is_timed = chance.random() < START_KILLS
    deadline = time.monotonic() + (chance.uniform(0, 8) if is_timed else 300)
    while time.monotonic() < deadline and process.poll() is None:
        if not is_timed and max(checkpoints.steps(output), default=0) > before:
            is_timed, deadline = True, time.monotonic() + chance.uniform(0, 4)
        time.sleep(0.002)


def kill_once(output: Path, processes: int, chance: random.Random, counts: Counts) -> bool:
    """Start or resume the run and kill it at a random time; return whether it finished first."""
    before = newest_step(output)
    process = start(output, processes)
    counts.starts += 1
    wait_for_kill_time(process, output, before, chance)
    if process.poll() is not None:
        counts.failures += process.returncode != 0
        return process.returncode == 0
    name = chance.choices(list(SIGNALS), list(SIGNALS.values()))[0]
    os.killpg(process.pid, signal.Signals[name])
    try:
        process.wait(timeout=600)
    except subprocess.TimeoutExpired:
        counts.failures += 1
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    after = newest_step(output)
    counts.kills[name] += 1
    counts.kills_in_start += after == before
    counts.checkpoints_lost += after < before
    return False


def table(counts: Counts, options: Options) -> str:
    """Format the counts as a Markdown table."""
    kills = ", ".join(f"{number} {name}" for name, number in counts.kills.items())
    rows = {
        "training processes": options.processes,
        "kills": f"{sum(counts.kills.values())} ({kills})",
        "kills before the first new checkpoint": counts.kills_in_start,
        "starts": counts.starts,
        "runs finished and compared": counts.runs_finished,
        "checkpoints lost or damaged": counts.checkpoints_lost,
        "finished runs that differ from the uninterrupted one": counts.mismatches,
        "processes that failed or hung": counts.failures,
        "hours": f"{counts.seconds / 3600:.2f}",
    }
    return "| event | count |\n|---|---|\n" + "".join(
        f"| {event} | {count} |\n" for event, count in rows.items()
    )


def main() -> None:
    """Kill and resume until --kills is reached; exit code 1 if anything was lost, differed or failed."""
    options = tyro.cli(Options, use_underscores=True)
    folder = Path(options.output_dir).resolve()
    reference, run, file = folder / "straight", folder / "run", folder / "soak.json"
    counts = Counts(**json.loads(file.read_text())) if file.exists() else Counts()
    reference.parent.mkdir(parents=True, exist_ok=True)
    if start(reference, options.processes).wait() != 0:
        sys.exit(f"error: the uninterrupted run failed; see {reference.with_suffix('.log')}")
    expected = artifacts(reference)

    with tqdm(total=options.kills, initial=sum(counts.kills.values()), desc="soak", unit="kill") as bar:
        while (done := sum(counts.kills.values())) < options.kills:
            started = time.monotonic()
            try:
                is_finished = kill_once(
                    run, options.processes, random.Random(f"{options.seed} {counts.starts}"), counts
                )
            except ValueError as error:
                bar.write(str(error))
                counts.checkpoints_lost += 1
                is_finished = False
            if is_finished:
                counts.runs_finished += 1
                counts.mismatches += artifacts(run) != expected
                shutil.rmtree(run)
            counts.seconds += time.monotonic() - started
            write_whole(file, json.dumps(asdict(counts), indent=2) + "\n")
            bar.update(sum(counts.kills.values()) - done)
    print(table(counts, options))
    sys.exit(bool(counts.checkpoints_lost or counts.mismatches or counts.failures))


if __name__ == "__main__":
    main()

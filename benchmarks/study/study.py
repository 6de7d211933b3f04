"""Ablations of ReFL in the demo world, over seeds: guidance, steps, learning rate, rank, stop window, ...

python benchmarks/study/study.py guidance                 # train, evaluate, write results/guidance.*
python benchmarks/study/study.py guidance --runs 5 none   # only these runs
python benchmarks/study/study.py settings steps guard regularisers --jobs 2
python benchmarks/study/study.py guidance --judge_only    # evaluate the finished trainings only

Each training is a run of refl_lora.py with the options given here. evaluate.py then scores all LoRAs of a
study on the 192 held-out prompts, with the same noises each, by the reward and by the oracle, which reads
pixels and so cannot be over-optimised. The study of guidance compares best with best: the base model and each
LoRA at the guidance at which most of its images are right. The same command resumes; nothing is computed
twice.
"""

import json
import os
import platform
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Literal, NamedTuple

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from refl.system.files import write_whole

import world

WORLD = "--pretrained_model_name_or_path demo/checkpoint/stable-diffusion-v1-4 --reward_path demo/checkpoint"
# The demo's settings with one process instead of two, so that two cores can run two trainings.
DEMO = f"""{WORLD} --prompts demo/prompts/train.txt --validation_prompts demo/prompts/held_out.txt
    --num_inference_steps 20 --min_stop 8 --max_stop 17 --train_batch_size 16 --decode_batch_size 16
    --rollout_batch_size 16 --gradient_accumulation_steps 1 --rank 8 --learning_rate 2e-3
    --lr_scheduler cosine --max_train_steps 200 --validation_steps 0
    --checkpointing_steps 50 --checkpoints_total_limit 1"""
# Far too long, with a constant learning rate, and validated often.
LONG = """--max_train_steps 1000 --lr_scheduler constant --checkpointing_steps 100
    --checkpoints_total_limit 10 --validation_steps 50 --num_validation_images 64
    --validation_images_per_prompt 2 --held_out_reward judge:all_right"""
HELD_OUT = "demo/prompts/held_out.txt"
IMAGES = "result/study/images"  # drawn by the world itself, for the pretraining loss

STUDIES = {
    "guidance": {  # in training; "none" is the published setting
        "none": "--guidance_scale 1",
        "2": "--guidance_scale 2",
        "3": "--guidance_scale 3",
        "5": "",
        "7.5": "--guidance_scale 7.5",
        "5, rollout only": "--guidance_in rollout",
        "5, gradient only": "--guidance_in gradient",
        "5, base uncond": "--no_lora_in_uncond",
    },
    "settings": {  # half the demo's batch, to save time
        name: f"--train_batch_size 8 --decode_batch_size 8 --rollout_batch_size 8 {options}"
        for name, options in {
            "half the demo's batch": "",
            "learning rate 5e-4": "--learning_rate 5e-4",
            "learning rate 5e-3": "--learning_rate 5e-3",
            "rank 2": "--rank 2",
            "rank 32": "--rank 32",
            "stops 15 to 19": "--min_stop 15 --max_stop 19",
            "stops 4 to 13": "--min_stop 4 --max_stop 13",
            "no reward target": "--reward_target None",
            "weighted by stop": "--normalize_by_stop",
            "grad_scale 1": "--grad_scale 1",
        }.items()
    },
    "steps": {"learning rate 2e-3": LONG},
    "guard": {
        "held-out reward": f"{LONG} --max_train_steps 600 --early_stop",
        "no held-out reward": f"{LONG} --max_train_steps 600 --early_stop --held_out_reward None",
    },
    "regularisers": {  # without validation, evaluated half as often
        name: f"""{LONG} --max_train_steps 600 --checkpointing_steps 200 --validation_steps 0
            --held_out_reward None {options}"""
        for name, options in {
            "noise distance 0.1": "--noise_distance_weight 0.1",
            "shrinkage 0.01": "--lora_shrinkage 0.01",
            "images, weight 1": f"--pretrain_data {IMAGES} --pretrain_weight 1",
        }.items()
    },
}
# Options of the evaluation of all LoRAs of a study.
EVALUATIONS = {name: "--guidance_scale 7.5 --num_images_per_prompt 3" for name in STUDIES}
EVALUATIONS["guidance"] = "--sweep_guidance 1,2,3,5,7.5 --num_images_per_prompt 2"
LORA = "pytorch_lora_weights.safetensors"
BASE = "base model"
MEASURES = {
    "judge.all_right": "fully right", "judge.clean": "clean", "reward": "reward", "diversity": "diversity",
}  # fmt: skip


class Setting(NamedTuple):
    """Row of a study's table."""

    run: str
    guidance: float
    step: int | None


Scores = dict[Setting, dict[int, dict[str, float]]]  # by setting and seed: mean of each measure


@dataclass
class Options:
    """Train and evaluate in the demo world, over several seeds."""

    studies: tyro.conf.Positional[tuple[Literal[tuple(STUDIES)], ...]]
    """Studies to run; default: all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trainings."""
    runs: tuple[str, ...] = ()
    """Train only these runs of the studies; default: all."""
    jobs: int = 1
    """Number of trainings, or of processes of an evaluation, at a time."""
    judge_only: bool = False
    """Evaluate the finished trainings without training."""
    output_dir: str = "result/study"
    """Folder of LoRAs and images."""


def write_images(folder: Path, num_per_spec: int = 8) -> None:
    """Write captioned drawings of all scenes of the world that are not held out."""
    rng = np.random.default_rng(0)
    specs = [spec for spec in world.SPECS if not spec.held_out for _ in range(num_per_spec)]
    indices = np.array([spec.indices for spec in specs])
    images = world.draw(indices, world.random_geometry(rng, len(specs)))
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (spec, image) in enumerate(zip(specs, images, strict=True)):
        Image.fromarray(image).save(folder / f"{number}.png")
        caption = spec.caption(rng.integers(len(world.TEMPLATES)))
        lines.append(json.dumps({"file_name": f"{number}.png", "text": caption}) + "\n")
    write_whole(folder / "metadata.jsonl", "".join(lines))


def train(folder: Path, options: str, seed: int) -> None:
    """Run or resume one training; its output goes to `folder`.log."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    is_finished = (folder / "options.json").exists()
    command = [sys.executable, "refl_lora.py", *DEMO.split(), *options.split(), f"--seed={seed}"]
    with open(f"{folder}.log", "w") as log:
        process = subprocess.Popen([*command, f"--output_dir={folder}"], stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(
            f"training {folder} failed with exit code {os.waitstatus_to_exitcode(status)}; see {folder}.log"
        )
    if not is_finished:
        with open(f"{folder}.seconds", "a") as file:
            print(usage.ru_utime + usage.ru_stime, file=file)


def run(command: Sequence[str]) -> None:
    """Run a command, and exit if it fails."""
    if status := subprocess.run(command).returncode:
        sys.exit(f"{command[1]} failed with exit code {status}")


def find_loras(study: str, runs: dict[Path, tuple]) -> list[Path]:
    """List the existing LoRAs to evaluate: all checkpoints of long runs, otherwise the runs' results."""
    if study in ("guidance", "settings", "guard"):
        loras = [run for run in runs if (run / "options.json").exists()]
    else:
        loras = sorted(file.parent for run in runs for file in run.glob(f"checkpoint-*/{LORA}"))
    return loras or sys.exit(f"{study}: no LoRA found; train first, without --judge_only")


def evaluate(
    loras: Sequence[Path], options: str, folder: Path, jobs: int, prompts: str | Path = HELD_OUT
) -> dict:
    """Run evaluate.py on LoRAs with further options and return its evaluation.json."""
    launcher = f"-m refl launch --multi_gpu --num_processes {jobs} --main_process_port 0" if jobs > 1 else ""
    command = [sys.executable, *launcher.split(), "evaluate.py", *WORLD.split()]
    command += "--sampler ddpm --num_inference_steps 20 --batch_size 64 --base_guidance_scale None".split()
    command += [*options.split(), f"--prompts={prompts}", f"--output_dir={folder / 'judged'}"]
    command += ["--held_out_reward=judge:all_right,judge:clean,judge:colour,judge:shape,judge:background"]
    run([*command, "--lora_paths", *map(str, loras)])
    return json.loads((folder / "judged/evaluation.json").read_text())


def gather(study: str, evaluation: dict, loras: Sequence[Path]) -> Scores:
    """Collect the means of each setting and seed.

    The step is None for the result of a run, which may come from different steps for different seeds; its
    means also have "step", the result's step, and "ended", the last step of the run. Two runs may have the
    same LoRA as result, which is then evaluated once.
    """
    scores, cases = defaultdict(dict), defaultdict(list)
    for case in evaluation["cases"]:
        cases[case["lora_sha256"]].append(case)
    for case in cases[None]:
        scores[Setting(BASE, case["guidance_scale"], 0)][0] = means_of(case)
    for path in loras:
        run, seed, step = identify(study, path)
        for case in cases[sha256((path / LORA).read_bytes()).hexdigest()]:
            steps = {"step": case["step"], "ended": last_step(path)} if step is None else {}
            scores[Setting(run, case["guidance_scale"], step)][seed] = means_of(case) | steps
    order = [BASE, *STUDIES[study]]
    return dict(sorted(scores.items(), key=lambda item: (order.index(item[0].run), item[0].step or 0)))


def best_table(study: str, evaluation: dict, loras: Sequence[Path]) -> str:
    """Format the comparison of each LoRA at its best guidance with the base model at its own as Markdown."""
    best, cases = evaluation["best_against_best"], evaluation["cases"]
    if not best:
        return ""
    base, criterion = cases[best["base"]], best["criterion"]
    right = base["means"][criterion]["mean"]
    num_images = evaluation["num_prompts"] * evaluation["num_images_per_prompt"]
    by_digest = {cases[own["case"]]["lora_sha256"]: own for own in best["loras"]}
    lines = [
        f"The base model is best at guidance {base['guidance_scale']:g}: {right:.3f} fully right, reward "
        f"{base['means']['reward']['mean']:.2f}. Each LoRA at its best guidance, paired with it:",
        "",
        "| trained with guidance | seed | best drawn at | fully right | difference, 95 % interval "
        "| errors left | win / loss | reward | its difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for path in loras:
        run, seed, _ = identify(study, path)
        own = by_digest[sha256((path / LORA).read_bytes()).hexdigest()]
        case, differences = cases[own["case"]], own["against_best_base"]
        oracle, reward = differences[criterion], differences["reward"]
        value, shares = case["means"][criterion]["mean"], [oracle[k] / num_images for k in ("win", "loss")]
        lines.append(
            f"| {run} | {seed} | {case['guidance_scale']:g} | {value:.3f} "
            f"| {oracle['difference']:+.3f} ({oracle['low']:+.3f} to {oracle['high']:+.3f}) "
            f"| {(1 - value) / (1 - right):.2f} | {shares[0]:.0%} / {shares[1]:.0%} "
            f"| {case['means']['reward']['mean']:.2f} "
            f"| {reward['difference']:+.2f} ({reward['low']:+.2f} to {reward['high']:+.2f}) |"
        )
    return "\n".join(lines) + "\n\n"


def means_of(case: dict) -> dict[str, float]:
    """Mean of each measure of a case of an evaluation."""
    return {measure: entry["mean"] for measure, entry in case["means"].items()}


def identify(study: str, lora: Path) -> tuple[str, int, int | None]:
    """Run, seed and step of the folder of a LoRA; step None for the result of a run."""
    is_checkpoint = lora.name.startswith("checkpoint-")
    folder, _, seed = (lora.parent if is_checkpoint else lora).name.rpartition("-seed")
    run = next(name for name in STUDIES[study] if slug(name) == folder)
    return run, int(seed), step_of(lora) if is_checkpoint else None


def step_of(checkpoint: Path) -> int:
    """Step in the name of a checkpoint."""
    return int(checkpoint.name.partition("-")[2])


def last_step(run: Path) -> int:
    """Step of the last checkpoint of a run."""
    return max(map(step_of, run.glob("checkpoint-*")))


def read_plain(folder: Path) -> Scores:
    """Read the results of the study `steps` as the run "plain ReFL", for comparison."""
    try:
        rows = json.loads((folder / "steps.json").read_text())["rows"]
    except FileNotFoundError:
        sys.exit("compares with the study `steps`; run that first")
    return {
        Setting("plain ReFL", row["guidance"], row["step"]): {
            int(seed): means for seed, means in row["seeds"].items()
        }
        for row in sorted(rows, key=lambda row: row["step"])
        if row["run"] != BASE
    }


def table(scores: Scores) -> str:
    """Format the mean over seeds and the value of each seed as a Markdown table."""
    lines = [
        f"| run | drawn with guidance | step | {' | '.join(MEASURES.values())} |",
        "|---|---|---|" + "---|" * len(MEASURES),
    ]
    for (run, guidance, step), seeds in scores.items():
        cells = []
        for measure in MEASURES:
            values = [seeds[seed][measure] for seed in sorted(seeds)]
            each = ", ".join(f"{value:.3f}" for value in values)
            cells.append(f"**{mean(values):.3f}**" + (f" ({each})" if len(values) > 1 else ""))
        if step is None:
            steps = [(means["step"], means["ended"]) for _, means in sorted(seeds.items())]
            steps = [f"{result} of {ended}" if result != ended else f"{result}" for result, ended in steps]
            step = ", ".join(steps if len(set(steps)) > 1 else steps[:1])
        lines.append(f"| {run} | {guidance:g} | {step} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot_bars(scores: Scores, path: Path) -> None:
    """Plot fully right and reward of each run: the mean over seeds, and a dot for each seed."""
    figure = Figure(figsize=(10, 0.6 + 0.32 * len(scores)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, measure in zip(axes, ("judge.all_right", "reward"), strict=True):
        for place, seeds in enumerate(scores.values()):
            values = [means[measure] for means in seeds.values()]
            axis.barh(place, mean(values), color="0.75" if len(values) == 1 else "C0", alpha=0.6)
            axis.plot(values, [place] * len(values), "o", ms=3, color="0.2")
        axis.set_title(MEASURES[measure])
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(scores)), [setting.run for setting in scores], fontsize=8)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)


def plot_sweep(scores: Scores, path: Path) -> None:
    """Plot fully right and reward by the guidance of drawing: a line for each run, a dot for each seed."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    runs = list(dict.fromkeys(setting.run for setting in scores))
    for axis, measure in zip(figure.subplots(1, 2), ("judge.all_right", "reward"), strict=True):
        for number, run in enumerate(runs):
            by_guidance = {s.guidance: seeds for s, seeds in scores.items() if s.run == run}
            colour = "0.3" if run == BASE else f"C{number - 1}"
            means = [mean(m[measure] for m in by_guidance[g].values()) for g in sorted(by_guidance)]
            label = run if run == BASE else f"trained with guidance {run}"
            axis.plot(sorted(by_guidance), means, "--" if run == BASE else "-", color=colour, label=label)
            for guidance, seeds in by_guidance.items():
                values = [m[measure] for m in seeds.values()]
                axis.plot([guidance] * len(values), values, "o", ms=3, color=colour)
        axis.set(title=MEASURES[measure], xlabel="guidance of drawing")
        axis.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  fontsize=9, frameon=False)  # fmt: skip
    figure.savefig(path, dpi=110)


def plot_curves(scores: Scores, path: Path) -> None:
    """Plot each measure by training step, one colour for each run."""
    runs = list(dict.fromkeys(setting.run for setting in scores if setting.run != BASE))
    base = next(seeds[0] for setting, seeds in scores.items() if setting.run == BASE)
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    for axis, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True):
        for number, run in enumerate(runs):
            by_step = {setting.step: seeds for setting, seeds in scores.items() if setting.run == run}
            if None in by_step:
                plot_results(axis, by_step[None], measure, run, number)
            else:
                plot_curve(axis, by_step, base, measure, run, number)
        axis.set(title=MEASURES[measure], xlabel="optimizer steps")
        axis.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs),
                  fontsize=9, frameon=False)  # fmt: skip
    figure.savefig(path, dpi=110)


def plot_curve(axis: Axes, by_step: dict, base: dict, measure: str, run: str, number: int) -> None:
    """Plot a thin line for each seed and a thick one for their mean, from the base model on."""
    steps = sorted(by_step)
    for seed in sorted(set().union(*by_step.values())):
        points = {0: base[measure]} | {s: by_step[s][seed][measure] for s in steps if seed in by_step[s]}
        axis.plot(list(points), list(points.values()), lw=0.8, alpha=0.4, color=f"C{number}")
    means = [base[measure], *(mean(m[measure] for m in by_step[step].values()) for step in steps)]
    axis.plot([0, *steps], means, "o-", ms=3, color=f"C{number}", label=run)


def plot_results(axis: Axes, seeds: dict, measure: str, run: str, number: int) -> None:
    """Plot a mark for the result of each seed, at its step."""
    steps = [means["step"] for means in seeds.values()]
    values = [means[measure] for means in seeds.values()]
    marker = "sD^"[number % 3]
    axis.plot(steps, values, marker, ms=7, mec="k", color=f"C{number}", label=run, zorder=3)


def report(study: str, evaluation: dict, loras: Sequence[Path], folder: Path) -> None:
    """Write the JSON, table and plot of a study."""
    scores = gather(study, evaluation, loras)
    folder.mkdir(exist_ok=True)
    if study in ("guard", "regularisers"):
        base = {setting: seeds for setting, seeds in scores.items() if setting.run == BASE}
        scores = base | read_plain(folder) | scores
    num_images = evaluation["num_prompts"] * evaluation["num_images_per_prompt"]
    rows = [setting._asdict() | {"seeds": seeds} for setting, seeds in scores.items()]
    best = evaluation["best_against_best"]
    content = about("benchmarks/study/study.py") | {
        "num_images": num_images,
        "rows": rows,
        "best_against_best": best,
    }
    write_whole(folder / f"{study}.json", json.dumps(content, indent=1))
    heading = f"{content['date']}, {content['machine']}: `{content['command']}`"
    tables = best_table(study, evaluation, loras) + table(scores)
    write_whole(folder / f"{study}.md", f"{heading}\n\n{num_images} held-out images each.\n\n{tables}")
    is_long = len({setting.step for setting in scores}) > 3
    (plot_sweep if best else plot_curves if is_long else plot_bars)(scores, folder / f"{study}.png")
    print(tables)


def about(script: str) -> dict[str, str]:
    """Date, machine and command of a measurement."""
    return {
        "date": date.today().isoformat(),
        "machine": f"CPU, {os.cpu_count()} cores ({platform.machine()}), torch {version('torch')}",
        "command": f"python {script} {' '.join(sys.argv[1:])}".strip(),
    }


def slug(name: str) -> str:
    """Convert a name to a folder name."""
    return re.sub(r"[^\w.-]+", "_", name)


def prepare_environment() -> None:
    """Set the environment of all child processes."""
    # Tiny models are fastest with one thread. PYTHONPATH: the oracle is demo/judge.py.
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "demo"}


def main() -> None:
    """Train what is missing, evaluate, report."""
    os.chdir(ROOT)
    prepare_environment()
    options = tyro.cli(Options, use_underscores=True)
    options.studies = options.studies or tuple(STUDIES)
    if "regularisers" in options.studies and not options.judge_only:
        write_images(Path(IMAGES))
    for study in options.studies:
        folder = Path(options.output_dir, study)
        runs = {
            folder / f"{slug(name)}-seed{seed}": (training, seed)
            for seed in options.seeds
            for name, training in STUDIES[study].items()
            if not options.runs or name in options.runs
        }
        if not options.judge_only:
            with ThreadPoolExecutor(options.jobs) as pool:
                done = pool.map(train, runs, *zip(*runs.values(), strict=True))
                list(tqdm(done, f"training: {study}", len(runs), unit="run"))
        loras = find_loras(study, runs)
        evaluation = evaluate(loras, EVALUATIONS[study], folder, options.jobs)
        report(study, evaluation, loras, Path(__file__).parent / "results")


if __name__ == "__main__":
    main()

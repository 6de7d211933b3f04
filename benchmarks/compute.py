"""Gain against compute: what trainings in the demo world reach, and what they would cost at SD-1.4's size.

python benchmarks/compute.py --jobs 2                 # tune, train, judge -> benchmarks/results/compute.*
python benchmarks/compute.py --judge_only             # judge the finished trainings only
python benchmarks/compute.py --families length        # only these families of trainings

First the published rollout and the short one are tuned: the same trials for each, at the same number of
images, chosen by the oracle on prompts of the training set. Then every training runs over several seeds at
the settings that its rollout was tuned to, and evaluate.py judges it on the held-out prompts. A training
costs its images times the FLOPs of an image, which benchmarks/count.py counts at SD-1.4's size and 512x512,
on the published grid of 40 steps with stops from 30 to 39. The same command resumes; nothing is computed
twice.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from statistics import mean
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [
    str(ROOT),
    *(str(ROOT / name) for name in ("benchmarks/study", "benchmarks", "tests", "demo")),
]

from refl.preflight import cost
from refl.system.files import write_whole

import count
import study
import torch
import tyro
from matplotlib.figure import Figure
from random_checkpoint import write_checkpoint
from tqdm import tqdm

IMAGES = 3200  # of a training of full length
ROLLOUTS = {"published": "", "short": "--rollout_steps 8"}  # each is tuned
TRIALS = [(rate, batch) for batch in (16, 8) for rate in ("1e-3", "2e-3", "4e-3")]
TRIAL_SEED = 10
TINY_DECODER = "result/compute/tiny_decoder"


class Training(NamedTuple):
    """One setting of training."""

    rollout: str  # whose tuned settings it takes
    options: str = ""  # besides
    length: float = 1.0  # images, as a share of `IMAGES`; None: as many as cost the same as `EQUAL`


EQUAL = "8 steps, half"  # what the estimators' cost is made equal to
FAMILIES: dict[str, dict[str, Training]] = {
    "length": {
        "published": Training("published"),
        "8 steps": Training("short"),
        "published, half": Training("published", length=1 / 2),
        "8 steps, half": Training("short", length=1 / 2),
        "published, quarter": Training("published", length=1 / 4),
        "8 steps, quarter": Training("short", length=1 / 4),
    },
    "steps": {
        "5 steps, half": Training("short", "--rollout_steps 5", 1 / 2),
        "12 steps, half": Training("short", "--rollout_steps 12", 1 / 2),
    },
    "guidance": {
        "8 steps, half, guided gradient only": Training("short", "--guidance_in gradient", 1 / 2),
    },
    "sampler": {
        "DDIM 8, half": Training("short", "--rollout_sampler ddim", 1 / 2),
        "DPM-Solver++ 8, half": Training("short", "--rollout_sampler dpm++", 1 / 2),
        "SDE-DPM-Solver++ 8, half": Training("short", "--rollout_sampler dpm++sde", 1 / 2),
    },
    "decoder": {
        "8 steps, half, tiny decoder": Training("short", f"--tiny_decoder_path {TINY_DECODER}", 1 / 2),
    },
    "estimator": {
        "DRaFT-2": Training("short", "--plan draft_k --num_gradient_steps 2", None),
        "DRaFT-4, last step": Training(
            "short", "--plan draft_k --num_gradient_steps 4 --min_stop 19 --max_stop 19", None
        ),
        "DRaFT-LV 2": Training("short", "--plan draft_lv --num_gradient_steps 2", None),
        "2 stops": Training("short", "--plan several_stops --num_gradient_steps 2", None),
    },
}
# The price is that of the published grid: stops 30 to 39 of 40, or its last step.
GRID = "--num_inference_steps 40 --min_stop 30 --max_stop 39"
LAST = "--min_stop 19 --max_stop 19", "--min_stop 39 --max_stop 39"
GUIDANCE = 7.5  # of drawing: the best for the base model and for LoRAs trained with 5 (study `guidance`)
FIGURES = {"judge.all_right": "fully right", "reward": "reward", "diversity": "diversity"}


@dataclass
class Options:
    """Measure gain against compute in the demo world, over several seeds."""

    families: tuple[Literal[tuple(FAMILIES)], ...] = tuple(FAMILIES)
    """Families of trainings to run; the table has all that are finished."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trainings."""
    jobs: int = 1
    """Number of trainings, or of processes of an evaluation, at a time."""
    judge_only: bool = False
    """Judge the finished trainings without training."""
    output_dir: str = "result/compute"
    """Folder of LoRAs and images."""
    checkpoint: str = "result/benchmarks/sd14"
    """Weights of SD-1.4's size and any content, for the price; random ones are written if there are none."""


# --------------------------------------------------------------------------------------------------- settings


def batch_options(batch: int, rate: str) -> str:
    """Options of a batch size and a learning rate."""
    sizes = " ".join(f"--{part}_batch_size {batch}" for part in ("train", "decode", "rollout"))
    return f"{sizes} --learning_rate {rate}"


def tuned(folder: Path, rollout: str) -> tuple[str, int]:
    """Learning rate and batch size of a rollout's best trial."""
    trials = json.loads((folder / "tuning.json").read_text())[rollout]
    best = max(trials, key=lambda trial: trial["fully right"])
    return best["learning rate"], best["batch"]


def num_images(training: Training, checkpoint: str) -> int:
    """Images of a training, before rounding to whole batches."""
    if training.length is not None:
        return round(IMAGES * training.length)
    equal = FAMILIES["length"][EQUAL]
    return round(num_images(equal, checkpoint) * price(equal, checkpoint) / price(training, checkpoint))


def all_options(training: Training, folder: Path, checkpoint: str) -> str:
    """Options of a training, as refl_lora.py takes them after the demo's."""
    rate, batch = tuned(folder, training.rollout)
    steps = round(num_images(training, checkpoint) / batch)
    own = f"{ROLLOUTS[training.rollout]} {training.options}"
    return f"{batch_options(batch, rate)} --max_train_steps {steps} {own}"


@cache
def price(training: Training, checkpoint: str) -> float:
    """TFLOP of one image of a training at SD-1.4's size, 512x512."""
    if not Path(checkpoint, "ImageReward.pt").exists():
        write_checkpoint(checkpoint, "full")
    own = f"{GRID} {ROLLOUTS[training.rollout]} {training.options}".replace(*LAST)
    if TINY_DECODER in own:
        Path(checkpoint, "tiny_decoder").mkdir(exist_ok=True)
        count.AutoencoderTiny().save_config(f"{checkpoint}/tiny_decoder")
        own = own.replace(TINY_DECODER, f"{checkpoint}/tiny_decoder")
    own = (
        f"--pretrained_model_name_or_path {checkpoint}/stable-diffusion-v1-4 --reward_path {checkpoint} {own}"
    )
    options = tyro.cli(count.TrainingOptions, args=own.split(), use_underscores=True)
    parts = sd14_parts(checkpoint, options.tiny_decoder_path)
    return sum(cost.per_image(options, parts).values())


@cache
def sd14_parts(checkpoint: str, tiny_decoder: str | None) -> cost.Parts:
    """Parts of a step at SD-1.4's size."""
    options = count.training_options(
        (f"{checkpoint}/stable-diffusion-v1-4", checkpoint), tiny_decoder_path=tiny_decoder
    )
    return cost.count_parts(options, torch.float32, 512)


# ------------------------------------------------------------------------------------------ training, judging


def train_all(runs: dict[Path, tuple[str, int]], jobs: int, what: str) -> None:
    """Run or resume trainings, `jobs` at a time."""
    options, seeds = zip(*runs.values(), strict=True)
    with ThreadPoolExecutor(jobs) as pool:
        list(tqdm(pool.map(study.train, runs, options, seeds), what, len(runs), unit="run"))


def judge(loras: Sequence[Path], prompts: Path, num_images: int, folder: Path, jobs: int) -> dict[Path, dict]:
    """Mean scores of the base model (key: the empty path) and of each LoRA, drawn with `GUIDANCE`."""
    options = f"--guidance_scale {GUIDANCE:g} --num_images_per_prompt {num_images}"
    evaluation = study.evaluate(loras, options, folder, jobs, prompts)
    means = {case["lora_sha256"]: study.means_of(case) for case in evaluation["cases"]}
    return {Path(): means[None]} | {
        lora: means[sha256((lora / study.LORA).read_bytes()).hexdigest()] for lora in loras
    }


def tune(folder: Path, jobs: int) -> None:
    """Train the trials of each rollout, judge them on prompts of the training set, write tuning.json."""
    if (folder / "tuning.json").exists():
        return
    runs = {
        folder / f"trial-{rollout}-{batch}-{rate}": (rollout, rate, batch)
        for rollout in ROLLOUTS
        for rate, batch in TRIALS
    }
    options = {
        run: (
            f"{batch_options(batch, rate)} --max_train_steps {IMAGES // batch} {ROLLOUTS[rollout]}",
            TRIAL_SEED,
        )
        for run, (rollout, rate, batch) in runs.items()
    }
    train_all(options, jobs, "tuning")
    prompts = folder / "choosing.txt"
    write_whole(prompts, "\n".join(Path("demo/prompts/train.txt").read_text().splitlines()[::3]) + "\n")
    scores = judge(list(runs), prompts, 1, folder / "chosen", jobs)
    trials = {rollout: [] for rollout in ROLLOUTS}
    for run, (rollout, rate, batch) in runs.items():
        own = {name: scores[run][measure] for measure, name in FIGURES.items() if measure in scores[run]}
        trials[rollout].append({"learning rate": rate, "batch": batch} | own)
    write_whole(folder / "tuning.json", json.dumps(trials, indent=1))


def cpu_seconds(run: Path) -> float:
    """Processor seconds of a training, that of an interrupted one included."""
    return sum(map(float, Path(f"{run}.seconds").read_text().split()))


# ----------------------------------------------------------------------------------------------------- report


def rows(folder: Path, seeds: Sequence[int], scores: dict[Path, dict], checkpoint: str) -> Iterator[dict]:
    """Yield the rows of the table: a training, its price and what each seed reached."""
    for family, trainings in FAMILIES.items():
        for name, training in trainings.items():
            own = {seed: run for seed in seeds if (run := run_folder(folder, name, seed)) in scores}
            if not own:
                continue
            rate, batch = tuned(folder, training.rollout)
            images = round(num_images(training, checkpoint) / batch) * batch
            yield {
                "family": family, "training": name, "options": training.options, "learning rate": rate,
                "batch": batch, "images": images, "TFLOP per image": price(training, checkpoint),
                "PFLOP": images * price(training, checkpoint) / 1000,
                "CPU seconds": {seed: cpu_seconds(run) for seed, run in own.items()},
                "seeds": {seed: {name: scores[run][name] for name in FIGURES} for seed, run in own.items()},
            }  # fmt: skip


def run_folder(folder: Path, name: str, seed: int) -> Path:
    """Folder of a training."""
    return folder / f"{study.slug(name)}-seed{seed}"


def table(content: dict) -> str:
    """Format the rows as Markdown; costs are also given as shares of the first row's."""
    first, base = content["rows"][0], content["base"]
    lines = [
        "| training | images | rate, batch | TFLOP per image | PFLOP | of published | CPU seconds "
        "| fully right | errors left | reward | diversity |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        f"| base model | | | | | | | {base['judge.all_right']:.3f} | 1 | {base['reward']:.2f} "
        f"| {base['diversity']:.3f} |",
    ]
    for row in content["rows"]:
        cells = []
        for measure, digits in (("judge.all_right", 3), ("reward", 2), ("diversity", 3)):
            values = [means[measure] for means in row["seeds"].values()]
            each = (
                f" ({', '.join(f'{v:.{digits}f}' for v in values)})" if measure == "judge.all_right" else ""
            )
            cells.append(f"**{mean(values):.{digits}f}**{each}")
        errors = mean(1 - means["judge.all_right"] for means in row["seeds"].values())
        cells.insert(1, f"{errors / (1 - base['judge.all_right']):.2f}")
        lines.append(
            f"| {row['training']} | {row['images']:,} | {row['learning rate']}, {row['batch']} "
            f"| {row['TFLOP per image']:.1f} | {row['PFLOP']:.0f} | {row['PFLOP'] / first['PFLOP']:.1%} "
            f"| {mean(row['CPU seconds'].values()):.0f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def tuning_table(trials: dict[str, list[dict]]) -> str:
    """Format the trials as Markdown; the chosen ones are bold."""
    lines = ["| learning rate | batch | " + " | ".join(trials) + " |", "|---|---|" + "---|" * len(trials)]
    for own in zip(*trials.values(), strict=True):
        cells = []
        for trial, rollout in zip(own, trials, strict=True):
            best = max(t["fully right"] for t in trials[rollout])
            cell = f"{trial['fully right']:.3f}"
            cells.append(f"**{cell}**" if trial["fully right"] == best else cell)
        lines.append(f"| {own[0]['learning rate']} | {own[0]['batch']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(content: dict, path: Path) -> None:
    """Plot gain by price and by processor time: a dot for each seed, a mark for their mean."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key in zip(axes, ("PFLOP", "CPU seconds"), strict=True):
        frontier = []
        for number, row in enumerate(content["rows"]):
            values = [means["judge.all_right"] for means in row["seeds"].values()]
            x = row[key] if key == "PFLOP" else mean(row[key].values())
            own = dict(color=f"C{number % 10}", marker="osD^vP*X"[number // 10 + number % 7])
            axis.plot([x] * len(values), values, ".", ms=4, color=own["color"], alpha=0.5)
            axis.plot(x, mean(values), ls="", ms=8, mec="k", label=row["training"], **own)
            frontier.append((x, mean(values)))
        best, steps = -1.0, []
        for x, y in sorted(frontier):
            if y > best:
                best = y
                steps.append((x, y))
        axis.plot(*zip(*steps, strict=True), color="0.6", lw=1, zorder=0)
        axis.axhline(content["base"]["judge.all_right"], color="0.4", ls="--", lw=1)
        axis.set(
            xscale="log", xlabel="PFLOP at SD-1.4's size, 512x512" if key == "PFLOP" else "CPU seconds, demo"
        )
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("fully right")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Tune, train what is missing, judge, report."""
    os.chdir(ROOT)
    study.prepare_environment()
    options = tyro.cli(Options, use_underscores=True)
    folder = Path(options.output_dir)
    chosen = {name: t for family in options.families for name, t in FAMILIES[family].items()}
    if not options.judge_only:
        tune(folder, options.jobs)
        if "decoder" in options.families and not Path(TINY_DECODER).exists():
            study.run([sys.executable, "benchmarks/decoders.py", "--tiny_decoder_path", TINY_DECODER])
        runs = {
            run_folder(folder, name, seed): (all_options(training, folder, options.checkpoint), seed)
            for seed in options.seeds
            for name, training in chosen.items()
        }
        train_all(runs, options.jobs, "training")
    trainings = [name for own in FAMILIES.values() for name in own]
    loras = [run_folder(folder, name, seed) for name in trainings for seed in options.seeds]
    loras = [lora for lora in loras if (lora / "options.json").exists()]
    scores = judge(loras, Path("demo/prompts/held_out.txt"), 2, folder, options.jobs)
    content = study.about("benchmarks/compute.py") | {
        "guidance": GUIDANCE,
        "tuning": json.loads((folder / "tuning.json").read_text()),
        "base": scores[Path()],
        "rows": list(rows(folder, options.seeds, scores, options.checkpoint)),
    }
    results = Path("benchmarks/results")
    write_whole(results / "compute.json", json.dumps(content, indent=1))
    tables = f"{tuning_table(content['tuning'])}\n{table(content)}"
    heading = f"{content['date']}, {content['machine']}: `{content['command']}`"
    write_whole(results / "compute.md", f"{heading}\n\nDrawn with guidance {GUIDANCE:g}.\n\n{tables}")
    plot(content, results / "compute.png")
    print(tables)


if __name__ == "__main__":
    main()

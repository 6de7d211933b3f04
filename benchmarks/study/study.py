"""What guidance, steps, learning rate, rank, stop window and the rest do in the demo world, over seeds.

python benchmarks/study/study.py guidance                 # trains, judges, writes results/guidance.*
python benchmarks/study/study.py settings steps guard regularisers --jobs 2
python benchmarks/study/study.py guidance --judge_only    # of the trainings that are finished

Each training is a run of refl_lora.py with options given here; all LoRAs of a study are then judged by
evaluate.py on the 192 held-out prompts, three noises each, the same for all, by the reward and by the oracle,
which reads pixels and cannot be flattered. Nothing is done twice: the same command goes on where it was
stopped.
"""

import json
import os
import platform
import re
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Literal

import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from refl.files import write_whole  # noqa: E402

WORLD = "--pretrained_model_name_or_path demo/checkpoint/stable-diffusion-v1-4 --reward_path demo/checkpoint"
# The demo's settings, but one process, which on two cores leaves room for another training.
DEMO = f"""{WORLD} --prompts demo/prompts/train.txt --validation_prompts demo/prompts/held_out.txt
    --num_inference_steps 20 --min_stop 8 --max_stop 17 --train_batch_size 16 --decode_batch_size 16
    --rollout_batch_size 16 --gradient_accumulation_steps 1 --rank 8 --learning_rate 2e-3
    --lr_scheduler cosine --max_train_steps 200 --validation_steps 0
    --checkpointing_steps 50 --checkpoints_total_limit 1"""
# Too long, at a rate that does not fall, and watched.
LONG = """--max_train_steps 1000 --lr_scheduler constant --checkpointing_steps 100
    --checkpoints_total_limit 10 --validation_steps 50 --num_validation_images 64
    --validation_images_per_prompt 2 --held_out_reward judge:all_right"""

STUDIES = {
    "guidance": {
        "none": "",
        "rollout": "--guidance_scale 3 --guidance_in rollout",
        "gradient": "--guidance_scale 3 --guidance_in gradient",
        "both": "--guidance_scale 3",
        "rollout, base uncond": "--guidance_scale 3 --guidance_in rollout --no_lora_in_uncond",
        "gradient, base uncond": "--guidance_scale 3 --guidance_in gradient --no_lora_in_uncond",
        "both, base uncond": "--guidance_scale 3 --no_lora_in_uncond",
    },
    "settings": {  # half the batch, so that there is time for all of them
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
        "held-out reward": f"{LONG} --early_stop",
        "no held-out reward": f"{LONG} --early_stop --held_out_reward None",
    },
    "regularisers": {
        "noise distance 0.03": f"{LONG} --noise_distance_weight 0.03",
        "noise distance 0.3": f"{LONG} --noise_distance_weight 0.3",
        "shrinkage 0.01": f"{LONG} --lora_shrinkage 0.01",
    },
}
# How they are judged. Each is an evaluation of all LoRAs of the study.
JUDGED = {name: {"": "--guidance_scale 1 --num_images_per_prompt 3"} for name in STUDIES}
JUDGED["guidance"] = {
    "": "--sweep_guidance 1,3 --num_images_per_prompt 2",
    "base uncond": "--guidance_scale 3 --no_lora_in_uncond --num_images_per_prompt 2",
}
MEASURES = {"judge.all_right": "fully right", "reward": "reward", "diversity": "diversity"}


@dataclass
class Options:
    """Train and judge in the demo world, over several seeds."""

    studies: tyro.conf.Positional[tuple[Literal[tuple(STUDIES)], ...]]
    """Which."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the trainings."""
    jobs: int = 1
    """Trainings at a time."""
    judge_only: bool = False
    """Train nothing."""
    output_dir: str = "result/study"
    """Where LoRAs and pictures go."""


def train(folder: Path, options: str, seed: int) -> None:
    """One training, or the rest of it; its words go to `folder`.log."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "refl_lora.py", *DEMO.split(), *options.split(), f"--seed={seed}"]
    with open(f"{folder}.log", "w") as log:
        status = subprocess.run([*command, f"--output_dir={folder}"], stdout=log, stderr=log).returncode
    if status:
        sys.exit(f"{folder} ended with {status}; see {folder}.log")


def judge(study: str, name: str, own: str, runs: dict[Path, tuple], folder: Path) -> dict:
    """What evaluate.py finds of a study's LoRAs, at every checkpoint of long runs."""
    loras = sorted(file.parent for run in runs for file in run.glob("checkpoint-*/pytorch_lora_weights.*"))
    if study in ("guidance", "settings", "guard"):
        loras = [run for run in runs if (run / "options.json").exists()]
    if not loras:
        sys.exit(f"{study}: nothing is trained yet")
    output = folder / slug(f"judged {name}".strip())
    command = [sys.executable, "evaluate.py", *WORLD.split(), "--prompts=demo/prompts/held_out.txt"]
    command += "--sampler ddpm --num_inference_steps 20 --batch_size 48".split() + own.split()
    command += ["--held_out_reward=judge:all_right,judge:colour,judge:shape,judge:background"]
    command += [f"--output_dir={output}", "--lora_paths", *map(str, loras)]
    if status := subprocess.run(command).returncode:
        sys.exit(f"evaluate.py ended with {status}")
    return json.loads((output / "evaluation.json").read_text())


def gather(study: str, evaluations: dict[str, dict]) -> dict[tuple, dict[int, dict[str, float]]]:
    """Means of each seed, by (run, guidance, what the empty prompt is predicted by, step)."""
    found = defaultdict(dict)
    for name, evaluation in evaluations.items():
        for case in evaluation["cases"]:
            means = {measure: mean["mean"] for measure, mean in case["means"].items()}
            uncond = "" if case["guidance_scale"] == 1 else "base" if name else "LoRA"
            if case["lora_path"] is None:
                if not name:
                    found["base model", case["guidance_scale"], "", 0][0] = means
                continue
            path = Path(case["lora_path"])
            step = int(path.name.partition("-")[2]) if path.name.startswith("checkpoint-") else case["step"]
            run = path.parent.name if path.name.startswith("checkpoint-") else path.name
            run, _, seed = run.rpartition("-seed")
            title = next(title for title in STUDIES[study] if slug(title) == run)
            found[title, case["guidance_scale"], uncond, step][int(seed)] = means
    return dict(found)


def table(found: dict[tuple, dict[int, dict[str, float]]]) -> str:
    """Means over seeds, and of each, as Markdown."""
    lines = [
        f"| run | guidance | empty prompt by | step | {' | '.join(MEASURES.values())} |",
        "|---|---|---|---|" + "---|" * len(MEASURES),
    ]
    for (run, guidance, uncond, step), seeds in found.items():
        cells = []
        for measure in MEASURES:
            values = [seeds[seed][measure] for seed in sorted(seeds)]
            each = ", ".join(f"{value:.3f}" for value in values)
            cells.append(f"**{mean(values):.3f}**" + f" ({each})" * (len(values) > 1))
        lines.append(f"| {run} | {guidance:g} | {uncond} | {step} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot_bars(found: dict, path: Path) -> None:
    """Fully right and reward of each run: the mean over seeds, and a dot for each."""
    is_swept = len({guidance for _, guidance, *_ in found}) > 1
    labels = [
        run + f", guidance {guidance:g}" * is_swept + f", {uncond} uncond" * bool(uncond and is_swept)
        for run, guidance, uncond, _ in found
    ]
    figure = Figure(figsize=(10, 0.6 + 0.32 * len(labels)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, measure in zip(axes, ("judge.all_right", "reward"), strict=True):
        for place, seeds in enumerate(found.values()):
            values = [own[measure] for own in seeds.values()]
            axis.barh(place, mean(values), color="0.75" if len(values) == 1 else "C0", alpha=0.6)
            axis.plot(values, [place] * len(values), "o", ms=3, color="0.2")
        axis.set_title(MEASURES[measure])
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(labels)), labels, fontsize=8)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)


def plot_curves(found: dict, path: Path) -> None:
    """Each measure against steps, a thin line for each seed, a thick one for their mean."""
    runs = sorted({run for run, *_ in found if run != "base model"})
    base = next(seeds[0] for (run, *_), seeds in found.items() if run == "base model")
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axis, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True):
        for number, name in enumerate(runs):
            points = defaultdict(dict)  # seed -> step -> value
            for (run, _, _, step), seeds in found.items():
                for seed, means in seeds.items() if run == name else ():
                    points[seed][step] = means[measure]
            steps = sorted(set.intersection(*(set(own) for own in points.values())))
            for own in points.values():
                axis.plot([0, *sorted(own)], [base[measure], *(own[s] for s in sorted(own))], lw=0.8,
                          alpha=0.4, color=f"C{number}")  # fmt: skip
            means = [mean(own[step] for own in points.values()) for step in steps]
            axis.plot([0, *steps], [base[measure], *means], "o-", ms=3, color=f"C{number}", label=name)
        axis.set(title=MEASURES[measure], xlabel="optimizer steps")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def report(study: str, evaluations: dict[str, dict], folder: Path) -> None:
    """The study's JSON, table and plot."""
    found = gather(study, evaluations)
    folder.mkdir(exist_ok=True)
    about = {
        "date": date.today().isoformat(),
        "machine": f"CPU, {os.cpu_count()} cores ({platform.machine()}), torch {version('torch')}",
        "command": f"python benchmarks/study/study.py {' '.join(sys.argv[1:])}",
    }
    first = next(iter(evaluations.values()))
    number = first["num_prompts"] * first["num_images_per_prompt"]
    rows = [
        dict(zip(("run", "guidance", "uncond", "step"), key, strict=True)) | {"seeds": seeds}
        for key, seeds in found.items()
    ]
    write_whole(
        folder / f"{study}.json", json.dumps(about | {"num_pictures": number, "rows": rows}, indent=1)
    )
    head = (
        f"{about['date']}, {about['machine']}: `{about['command']}`\n\n{number} held-out pictures each.\n\n"
    )
    write_whole(folder / f"{study}.md", head + table(found))
    plot = plot_curves if len({key[3] for key in found}) > 4 else plot_bars
    plot(found, folder / f"{study}.png")
    print(table(found))


def slug(name: str) -> str:
    """A folder's name."""
    return re.sub(r"[^\w.-]+", "_", name)


def main() -> None:
    """Train what is missing, judge, report."""
    os.chdir(ROOT)
    # Tiny models: a second thread costs more than it brings. The oracle is found in demo/.
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "demo"}
    options = tyro.cli(Options, use_underscores=True)
    for study in options.studies:
        folder = Path(options.output_dir, study)
        runs = {
            folder / f"{slug(name)}-seed{seed}": (own, seed)
            for seed in options.seeds
            for name, own in STUDIES[study].items()
        }
        if not options.judge_only:
            with ThreadPoolExecutor(options.jobs) as pool:
                done = pool.map(lambda item: train(item[0], *item[1]), runs.items())
                list(tqdm(done, f"training: {study}", len(runs), unit="run"))
        evaluations = {name: judge(study, name, own, runs, folder) for name, own in JUDGED[study].items()}
        report(study, evaluations, Path(__file__).parent / "results")


if __name__ == "__main__":
    main()

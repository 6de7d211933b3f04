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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Literal

import numpy as np
import tyro
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from refl.system.files import write_whole

import world

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
IMAGES = "result/study/images"  # of the world itself, for the loss that the model was pretrained with

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
        "held-out reward": f"{LONG} --max_train_steps 600 --early_stop",
        "no held-out reward": f"{LONG} --max_train_steps 600 --early_stop --held_out_reward None",
    },
    "regularisers": {  # not watched, and judged half as often
        name: f"""{LONG} --max_train_steps 600 --checkpointing_steps 200 --validation_steps 0
            --held_out_reward None {options}"""
        for name, options in {
            "noise distance 0.1": "--noise_distance_weight 0.1",
            "shrinkage 0.01": "--lora_shrinkage 0.01",
            "images, weight 1": f"--pretrain_data {IMAGES} --pretrain_weight 1",
        }.items()
    },
}
# How they are judged. Each is an evaluation of all LoRAs of the study.
JUDGED = {name: {"": "--guidance_scale 1 --num_images_per_prompt 3"} for name in STUDIES}
JUDGED["guidance"] = {
    "": "--sweep_guidance 1,3 --num_images_per_prompt 2",
    "base uncond": "--guidance_scale 3 --no_lora_in_uncond --num_images_per_prompt 2",
}
LORA = "pytorch_lora_weights.safetensors"
Found = dict[tuple[str, float, str, int | None], dict[int, dict[str, float]]]
BASE = "base model"
MEASURES = {"judge.all_right": "fully right", "reward": "reward", "diversity": "diversity"}


@dataclass
class Options:
    """Train and judge in the demo world, over several seeds."""

    studies: tyro.conf.Positional[tuple[Literal[tuple(STUDIES)], ...]]
    """Which; all, if none is named."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the trainings."""
    jobs: int = 1
    """Trainings at a time."""
    judge_only: bool = False
    """Train nothing."""
    output_dir: str = "result/study"
    """Where LoRAs and images go."""


def write_images(folder: Path, of_each: int = 8) -> None:
    """Images that the world draws of what is not held out, with captions."""
    rng = np.random.default_rng(0)
    specs = [spec for spec in world.SPECS if not spec.held_out for _ in range(of_each)]
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
    """One training, or the rest of it; its words go to `folder`.log."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "refl_lora.py", *DEMO.split(), *options.split(), f"--seed={seed}"]
    with open(f"{folder}.log", "w") as log:
        status = subprocess.run([*command, f"--output_dir={folder}"], stdout=log, stderr=log).returncode
    if status:
        sys.exit(f"{folder} ended with {status}; see {folder}.log")


def find_loras(study: str, runs: dict[Path, tuple]) -> list[Path]:
    """What is judged of a study: every checkpoint of long runs, else results; of those that are there."""
    if study in ("guidance", "settings", "guard"):
        loras = [run for run in runs if (run / "options.json").exists()]
    else:
        loras = sorted(file.parent for run in runs for file in run.glob(f"checkpoint-*/{LORA}"))
    return loras or sys.exit(f"{study}: nothing is trained yet")


def judge(name: str, own: str, loras: Sequence[Path], folder: Path) -> dict:
    """What evaluate.py finds of LoRAs."""
    output = folder / slug(f"judged {name}".strip())
    command = [sys.executable, "evaluate.py", *WORLD.split(), "--prompts=demo/prompts/held_out.txt"]
    command += "--sampler ddpm --num_inference_steps 20 --batch_size 48".split() + own.split()
    command += ["--held_out_reward=judge:all_right,judge:colour,judge:shape,judge:background"]
    command += [f"--output_dir={output}", "--lora_paths", *map(str, loras)]
    if status := subprocess.run(command).returncode:
        sys.exit(f"evaluate.py ended with {status}")
    return json.loads((output / "evaluation.json").read_text())


def gather(study: str, evaluations: dict[str, dict], loras: Sequence[Path]) -> Found:
    """Means of each seed, by (run, guidance, what the empty prompt is predicted by, step).

    The step is None for a run's result, whose steps may differ from seed to seed: "step", its own, and
    "ended", where training ended, are then among the means. Two runs may have ended with the same LoRA, which
    is then evaluated once.
    """
    found = defaultdict(dict)
    for name, evaluation in evaluations.items():
        cases = defaultdict(list)
        for case in evaluation["cases"]:
            cases[case["lora_sha256"]].append(case)
        for path in (None, *loras):
            for case in cases[path and sha256((path / LORA).read_bytes()).hexdigest()]:
                means = {measure: mean["mean"] for measure, mean in case["means"].items()}
                uncond = "" if case["guidance_scale"] == 1 else "base" if name else "LoRA"
                if path is None:
                    if not name:
                        found[BASE, case["guidance_scale"], "", 0][0] = means
                    continue
                folder, step = path, None
                if path.name.startswith("checkpoint-"):
                    folder, step = path.parent, step_of(path)
                else:
                    means |= {"step": case["step"], "ended": max(map(step_of, path.glob("checkpoint-*")))}
                run, _, seed = folder.name.rpartition("-seed")
                title = next(title for title in STUDIES[study] if slug(title) == run)
                found[title, case["guidance_scale"], uncond, step][int(seed)] = means
    order = [BASE, *STUDIES[study]]
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][3] or 0)))


def step_of(checkpoint: Path) -> int:
    """The number in a checkpoint's name."""
    return int(checkpoint.name.partition("-")[2])


def plain(folder: Path) -> Found:
    """The study `steps`, to be compared with."""
    try:
        rows = json.loads((folder / "steps.json").read_text())["rows"]
    except FileNotFoundError:
        sys.exit("compared with the study `steps`, which has to be judged first")
    return {
        ("plain ReFL", row["guidance"], row["uncond"], row["step"]): {
            int(seed): means for seed, means in row["seeds"].items()
        }
        for row in sorted(rows, key=lambda row: row["step"])
        if row["run"] != BASE
    }


def table(found: Found) -> str:
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
        if step is None:
            steps = [(own["step"], own["ended"]) for _, own in sorted(seeds.items())]
            steps = [f"{own} of {ended}" if own != ended else f"{own}" for own, ended in steps]
            step = ", ".join(steps if len(set(steps)) > 1 else steps[:1])
        lines.append(f"| {run} | {guidance:g} | {uncond} | {step} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot_bars(found: Found, path: Path) -> None:
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


def plot_curves(found: Found, path: Path) -> None:
    """Each measure against steps: a thin line for each seed, a thick one for their mean; for runs of which
    the result alone was judged, a mark for each seed."""
    runs = list(dict.fromkeys(run for run, *_ in found if run != BASE))
    base = next(seeds[0] for (run, *_), seeds in found.items() if run == BASE)
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    for axis, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True):
        for number, name in enumerate(runs):
            colour = f"C{number}"
            own = {step: seeds for (run, _, _, step), seeds in found.items() if run == name}
            if None in own:
                at = [means["step"] for means in own[None].values()]
                values = [means[measure] for means in own[None].values()]
                axis.plot(at, values, "sD^"[number % 3], ms=7, mec="k", color=colour, label=name, zorder=3)
                continue
            steps = sorted(own)
            for seed in sorted(set().union(*own.values())):
                points = {0: base[measure]} | {s: own[s][seed][measure] for s in steps if seed in own[s]}
                axis.plot(list(points), list(points.values()), lw=0.8, alpha=0.4, color=colour)
            means = [base[measure], *(mean(m[measure] for m in own[step].values()) for step in steps)]
            axis.plot([0, *steps], means, "o-", ms=3, color=colour, label=name)
        axis.set(title=MEASURES[measure], xlabel="optimizer steps")
        axis.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs),
                  fontsize=9, frameon=False)  # fmt: skip
    figure.savefig(path, dpi=110)


def report(study: str, evaluations: dict[str, dict], loras: Sequence[Path], folder: Path) -> None:
    """The study's JSON, table and plot."""
    found = gather(study, evaluations, loras)
    folder.mkdir(exist_ok=True)
    if study in ("guard", "regularisers"):
        found = {key: seeds for key, seeds in found.items() if key[0] == BASE} | plain(folder) | found
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
    write_whole(folder / f"{study}.json", json.dumps(about | {"num_images": number, "rows": rows}, indent=1))
    head = f"{about['date']}, {about['machine']}: `{about['command']}`\n\n{number} held-out images each.\n\n"
    write_whole(folder / f"{study}.md", head + table(found))
    plot = plot_curves if len({key[3] for key in found}) > 3 else plot_bars
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
    options.studies = options.studies or tuple(STUDIES)
    if "regularisers" in options.studies and not options.judge_only:
        write_images(Path(IMAGES))
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
        loras = find_loras(study, runs)
        evaluations = {name: judge(name, own, loras, folder) for name, own in JUDGED[study].items()}
        report(study, evaluations, loras, Path(__file__).parent / "results")


if __name__ == "__main__":
    main()

"""Base model against LoRAs on prompts, several images of each, from the same noise: what became better,
what worse, and how sure that is.

python evaluate.py                                      -> result/evaluation/report.html, evaluation.json, ...
python evaluate.py --lora_paths checkpoint/refl_lora checkpoint/refl_lora/checkpoint-*
python evaluate.py --sweep_lora_scale 0,0.5,1,1.5 --sweep_guidance 1,3,7.5
python -m refl launch --multi_gpu --num_processes 2 evaluate.py     each process draws its share, on one disk

The same command again goes on: images that are there are not drawn again. Other LoRAs, scales, guidances,
more prompts and more images of each may be added in the same way. Scores are always taken anew: that costs
a hundredth of the drawing, and a reward of one's own may have been edited.
"""

import csv
import io
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from hashlib import sha256
from itertools import groupby
from pathlib import Path

from refl.model import drawing
from refl.model.folder import resolution_of
from refl.model.lora import LORA_FILE, lora_file, read_metadata
from refl.model.pipeline import load_lora, unload_lora
from refl.preflight import doctor
from refl.report import card, page, statistics
from refl.report.sheets import pairs
from refl.reward import rewards
from refl.system import devices
from refl.system.errors import UserError, is_first_process, run_as_command
from refl.system.files import fingerprint, write_whole
from refl.system.images import save_image, to_tensor
from refl.system.prompts import read_prompts

import numpy as np
import torch
import tyro
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import StableDiffusionPipeline
from PIL import Image
from tqdm import tqdm

REWARD, SATURATED, DIVERSITY = "reward", "saturated", "diversity"  # measures besides the rewards' own names
SETTINGS = "settings.json"  # what decides the images in an output folder
FEW_PROMPTS = 10  # fewer make intervals too narrow
SHOWN_PAIRS = 8  # in each part of the report
GRID_PAIRS, GRID_COLUMNS = 12, 6
MAX_WAIT = timedelta(days=7)  # for a slower process; one that has ended is noticed at once


@dataclass
class Options(drawing.LoraOptions, drawing.ImageOptions):
    """Compare the model with and without LoRAs, image by image from the same noise, and report it."""

    lora_paths: tuple[str, ...] = ("checkpoint/refl_lora",)
    """LoRAs for this model, files or folders; the report shows images of the first."""
    prompts: str = "data/held_out_prompts.txt"
    """Prompts, best those that training never saw: a .txt, .json, .jsonl or .csv file."""
    num_prompts: int | None = None
    """How many of them, from the first on; None: all."""
    num_images_per_prompt: int = 4
    """Images of each prompt, by each model."""
    seed: int = 0
    """What all noise follows from, for each prompt and image anew, the same for every model."""
    reward: str = "imagereward"
    """The reward, as in training: one or a weighted sum."""
    held_out_reward: str | None = None
    """Rewards that training did not see, in the same syntax; each counts by itself."""
    reward_path: str = "checkpoint"
    """Folder of ImageReward.pt (or .safetensors), med_config.json and bert-base-uncased/."""
    sweep_lora_scale: str | None = None
    """Scales such as 0,0.5,1,1.5 in place of --lora_scale."""
    sweep_guidance: str | None = None
    """Guidances such as 1,3,7.5 in place of --guidance_scale."""
    tie_margin: float = 0.01
    """Scores of two images that differ by no more than this are a tie."""
    output_dir: str = "result/evaluation"
    """Where report.html, evaluation.json, images.csv, prompts.csv, grid.png and images/ go."""


@dataclass(frozen=True)
class Lora:
    """One of `--lora_paths`."""

    path: str
    name: str
    digest: str  # SHA-256 of the file
    step: int | None  # of training


@dataclass(frozen=True)
class Case:
    """A way to draw the images: the base model, or a LoRA at a scale."""

    name: str
    folder: str  # in images/; what decides its images is in its name
    lora: Lora | None
    lora_scale: float
    guidance_scale: float


@dataclass(frozen=True)
class Sample:
    """One image of a case."""

    case: Case
    prompt_index: int
    image_index: int
    seed: int
    file: Path


def main() -> None:
    """Options, drawing, scores, statistics, report."""
    # ---- options
    started = time.perf_counter()
    options = tyro.cli(Options, use_underscores=True)
    doctor.check_files(options)
    trained = list(rewards.parse(options.reward))
    held_out = list(rewards.parse_held_out(options.held_out_reward))
    loras = find_loras(options.lora_paths)
    options = drawing.settle(options, [lora.path for lora in loras])
    prompts = check(options)
    cases = find_cases(options, loras)
    output = Path(options.output_dir)
    state = PartialState(options.device == "cpu" or not torch.cuda.is_available(), timeout=MAX_WAIT)
    device = devices.find(options.device or (str(state.device) if state.num_processes > 1 else None))
    placed, quiet = replace(options, device=str(device)), not state.is_main_process
    settings = check_settings(options, prompts, device)

    # ---- images that are not there yet; each process draws its share
    samples = [
        Sample(case, i, j, image_seed(options.seed, i, j), output / "images" / case.folder / f"{i}_{j}.png")
        for case in cases
        for i in range(len(prompts))
        for j in range(options.num_images_per_prompt)
    ]
    missing = [sample for sample in samples if not sample.file.exists()]
    with together():
        state.wait_for_everyone()  # all have looked before one draws
    scorers = load_scorers(placed, prompts)
    if state.is_main_process:
        with writing(output):
            for case in cases:
                (output / "images" / case.folder).mkdir(parents=True, exist_ok=True)
            write_whole(output / SETTINGS, json.dumps(settings, indent=2) + "\n")
    with together():
        state.wait_for_everyone()
    seconds_drawing = draw(share(missing, state), prompts, placed, loras, quiet)
    with together():
        state.wait_for_everyone()

    # ---- scores
    names = [REWARD, *(trained if len(trained) > 1 else ()), *held_out]
    by_prompt = [
        list(group) for _, group in groupby(samples, lambda sample: (sample.case, sample.prompt_index))
    ]
    scores, diversity = score(share(by_prompt, state), scorers, prompts, names, placed, quiet)
    with together():
        scores, diversity, seconds = (
            gather_object([found]) for found in (scores, diversity, seconds_drawing)
        )
    state.destroy_process_group()
    if quiet:
        return
    shape = len(cases), len(prompts), options.num_images_per_prompt
    columns = np.concatenate(scores).astype(float).T
    values = {name: own.reshape(shape) for name, own in zip([*names, SATURATED], columns, strict=True)}
    of_prompts = {name: value.mean(-1) for name, value in values.items()}  # each (cases, prompts)
    if all(found is not None for found in diversity):
        of_prompts[DIVERSITY] = np.concatenate(diversity).reshape(shape[:2])

    # ---- statistics
    bases, shown = [find_base(case, cases) for case in cases], find_shown(cases, options)
    evaluation = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "seconds": round(time.perf_counter() - started, 1),
        "seconds_drawing_per_image": round(sum(seconds) / len(missing), 3) if missing else None,
        "options": asdict(options),
        "num_prompts": len(prompts),
        "num_images_per_prompt": options.num_images_per_prompt,
        "reward": options.reward,
        "measures": list(of_prompts),
        "shown": shown,
        "cases": compare(cases, bases, values, of_prompts, names, options.tie_margin),
    }

    # ---- reports
    with writing(output):
        write_whole(output / "images.csv", table_of_images(samples, prompts, values))
        write_whole(output / "prompts.csv", table_of_prompts(cases, bases, prompts, of_prompts))
        write_whole(output / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
        save_image(
            grid(cases, shown, bases, samples, prompts, values, [REWARD, *held_out[:1]]), output / "grid.png"
        )
        pairs = choose_pairs(shown, bases, samples, prompts, values, names)
        difference = (values[REWARD][shown] - values[REWARD][bases[shown]]).ravel()
        write_whole(output / "report.html", page.render(evaluation, shown, difference, pairs))
    print(page.text(evaluation, shown))
    if DIVERSITY not in of_prompts:
        print(f"no diversity: {diversity_needs(options)}")
    if len(prompts) < FEW_PROMPTS:
        print(f"note: intervals over {len(prompts)} prompt{'s' * (len(prompts) > 1)} are too narrow")
    print(f"report: {output / 'report.html'}")
    folder = Path(cases[shown].lora.path)
    is_result = (folder / "options.json").is_file()  # of a training, not one of its checkpoints
    if is_result and (written := card.write_if_possible(folder, evaluation=output)):
        print(f"model card: {written}")


# ---------------------------------------------------------------------------------------------------- options


def check(options: Options) -> list[str]:
    """The prompts, once each; raises `UserError` for options that cannot be. Loads nothing."""
    drawing.check_images(options)
    if options.num_prompts is not None and options.num_prompts < 1:
        raise UserError(f"--num_prompts {options.num_prompts}: must be 1 or more, or None for all.")
    if not options.tie_margin >= 0:
        raise UserError(f"--tie_margin {options.tie_margin}: must be 0 or more.")
    # Twice the same prompt would tell twice the same: intervals would be too narrow.
    return list(dict.fromkeys(read_prompts(options.prompts)))[: options.num_prompts]


def find_loras(paths: Sequence[str]) -> list[Lora]:
    """The LoRAs with short names, once each: a run's last checkpoint and its result are the same file."""
    if not paths:
        raise UserError("--lora_paths: name a LoRA, or several.")
    files = [lora_file(path) for path in paths]
    places = [Path(os.path.abspath(f.parent if f.name == LORA_FILE else f)) for f in files]
    top = os.path.commonpath([place.parent for place in places])
    loras = {}
    for path, file, place in zip(paths, files, places, strict=True):
        step = read_metadata(file).get("step")
        digest = sha256(file.read_bytes()).hexdigest()
        if digest not in loras:
            name = place.relative_to(top).as_posix()
            name = f"LoRA {name}" if name == "base" else name
            loras[digest] = Lora(path, name, digest, step if isinstance(step, int) else None)
        elif is_first_process():
            print(f"note: {path} is the same LoRA as {loras[digest].path}; left out")
    return list(loras.values())


def find_cases(options: Options, loras: Sequence[Lora]) -> list[Case]:
    """The base model at each guidance, then each LoRA at each scale and guidance; scale 0 is the former."""
    scales = read_sweep("sweep_lora_scale", options.sweep_lora_scale) or [options.lora_scale]
    guidances = read_sweep("sweep_guidance", options.sweep_guidance) or [options.guidance_scale]
    if not all(map(math.isfinite, (*scales, *guidances))):
        raise UserError("scales and guidances, swept or not, must be finite numbers.")
    if not any(scales):
        raise UserError("--lora_scale 0 is the model without the LoRA: there is nothing to compare it with.")
    cases = []
    for lora, scale in [(None, 0.0), *((lora, scale) for lora in loras for scale in scales if scale)]:
        for guidance in guidances:
            name, folder = "base", "base"
            if lora:
                name = lora.name
                label = re.sub(r"[^\w.-]", "_", Path(name).name)
                folder = f"{label}-{lora.digest[:12]}_scale_{scale:.12g}"
                name += f" scale {scale:.12g}" if options.sweep_lora_scale else ""
            name += f" guidance {guidance:.12g}" if options.sweep_guidance else ""
            cases.append(Case(name, f"{folder}_guidance_{guidance:.12g}", lora, scale, guidance))
    return cases


def read_sweep(name: str, text: str | None) -> list[float]:
    """Numbers of a sweep, sorted, once each; [] if there is none."""
    if text is None:
        return []
    try:
        return sorted({float(part) for part in text.split(",")})
    except ValueError as error:
        raise UserError(
            f"--{name} {text}: expected numbers with commas between, such as 0.5,1,1.5."
        ) from error


def find_base(case: Case, cases: Sequence[Case]) -> int:
    """Where the base model at a case's guidance is among the cases."""
    return next(i for i, c in enumerate(cases) if not c.lora and c.guidance_scale == case.guidance_scale)


def find_shown(cases: Sequence[Case], options: Options) -> int:
    """Where the first LoRA is, nearest to the scale and guidance that were not swept."""
    first = next(case.lora for case in cases if case.lora)
    distance = {
        index: (abs(case.lora_scale - options.lora_scale), abs(case.guidance_scale - options.guidance_scale))
        for index, case in enumerate(cases)
        if case.lora == first
    }
    return min(distance, key=distance.get)


def check_settings(options: Options, prompts: list[str], device: torch.device) -> dict:
    """What decides all images; raises `UserError` if those of the output folder were decided otherwise.

    Prompts may be more or fewer than they were.
    """
    model = Path(options.pretrained_model_name_or_path)
    weights = [
        file
        for part in ("scheduler", "text_encoder", "unet", "vae")
        for file in sorted((model / part).iterdir())
        if file.is_file()
    ]
    settings = {
        "pretrained_model_name_or_path": options.pretrained_model_name_or_path,
        "the model's files": fingerprint(weights),
        "sampler": options.sampler,
        "num_inference_steps": options.num_inference_steps,
        "resolution": resolution_of(options.pretrained_model_name_or_path, options.resolution),
        "dtype": drawing.precision(options, device),
        "lora_in_uncond": options.lora_in_uncond,
        "seed": options.seed,
        "prompts": prompts,
    }
    file = Path(options.output_dir) / SETTINGS
    if not file.exists():
        return settings
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        pairs = zip(before["prompts"], prompts, strict=False)
        changes = [
            f"--{n} was {before[n]}, is now {value}" for n, value in settings.items() if before[n] != value
        ]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); take another --output_dir.") from error
    changes = [change for change in changes if not change.startswith("--prompts ")]
    changes += [
        f"prompt {i} was {was!r}, is now {now!r}" for i, (was, now) in enumerate(pairs) if was != now
    ][:1]
    if changes:
        raise UserError(
            f"{options.output_dir} holds another evaluation: {'; '.join(changes)}. Take another --output_dir."
        )
    return settings | {"prompts": max(prompts, before["prompts"], key=len)}


# ---------------------------------------------------------------------------------------------------- drawing


def image_seed(seed: int, prompt_index: int, image_index: int) -> int:
    """Seed of an image's noise; it depends on these three alone, and inference.py --seed draws from it as
    well."""
    return int(np.random.SeedSequence([seed, prompt_index, image_index]).generate_state(1)[0])


def share(items: list, state: PartialState) -> list:
    """This process's part of a list: as many as any other's, and neighbours, so that few LoRAs are loaded."""
    rank, world = state.process_index, state.num_processes
    return items[len(items) * rank // world : len(items) * (rank + 1) // world]


def draw(
    samples: Sequence[Sample], prompts: Sequence[str], options: Options, loras: Sequence[Lora], quiet: bool
) -> float:
    """Draw images to their files, case by case; returns the seconds that it took."""
    if not samples:
        return 0.0
    pipeline = drawing.pipeline(options)
    for lora in loras:
        put_in(pipeline, lora, 1.0, options)  # one that does not fit is found before hours of drawing
    started = time.perf_counter()
    with tqdm(total=len(samples), desc="drawing", unit="image", disable=quiet) as bar:
        for case, own in groupby(samples, lambda sample: sample.case):
            own = list(own)
            put_in(pipeline, case.lora, case.lora_scale, options)
            wanted = [(prompts[sample.prompt_index], sample.seed) for sample in own]
            settings = replace(options, guidance_scale=case.guidance_scale)
            for sample, drawn in zip(own, drawing.draw_each(pipeline, wanted, settings, bar), strict=True):
                with writing(sample.file.parent):
                    save_image(drawn, sample.file)
    return time.perf_counter() - started


def put_in(pipeline: StableDiffusionPipeline, lora: Lora | None, scale: float, options: Options) -> None:
    """Let a LoRA, or none, take the place of the one in the pipeline."""
    unload_lora(pipeline)
    if lora:
        if sha256(lora_file(lora.path).read_bytes()).hexdigest() != lora.digest:
            raise UserError(
                f"{lora.path} has been changed since this began, by a training that goes on? Evaluate one of "
                "its checkpoints, or wait for its end."
            )
        load_lora(pipeline, lora.path, scale, options.lora_in_uncond)


@contextmanager
def together() -> Iterator[None]:
    """A block in which processes wait for each other; raises `UserError` if one of them has ended."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistBackendError) and "gloo" not in str(error):
            raise
        raise UserError(
            "another process ended, so this one did. It said why, if it could; the same command goes on."
        ) from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A block that writes; raises `UserError` for a disk that is full, or the like."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error}. The same command goes on from here."
        ) from error


# ----------------------------------------------------------------------------------------------------- scores


def load_scorers(options: Options, prompts: Sequence[str]) -> rewards.WeightedRewards:
    """All rewards, those held out with weight 0, tried on an image of noise: better now than after
    drawing."""
    device = devices.find(options.device)
    found = rewards.load(options.reward, options.reward_path, device, torch.float32)
    if options.held_out_reward:
        held_out = rewards.load(
            options.held_out_reward, options.reward_path, device, torch.float32, "--held_out_reward"
        )
        found = rewards.WeightedRewards(
            found.rewards | held_out.rewards, found.weights | dict.fromkeys(held_out.rewards, 0.0)
        )
    side = resolution_of(options.pretrained_model_name_or_path, options.resolution)
    with torch.no_grad():
        noise = torch.rand((1, 3, side, side), generator=torch.Generator().manual_seed(0))
        found(noise.to(device), [prompts[0]])
    return found


@torch.no_grad()
def score(
    groups: Sequence[list[Sample]], scorers: rewards.WeightedRewards, prompts: Sequence[str],
    names: Sequence[str], options: Options, quiet: bool,
) -> tuple[np.ndarray, np.ndarray | None]:  # fmt: skip
    """Of images in groups, one for each case and prompt: values (N, len(names) + 1), and each group's
    diversity, None where there is none."""
    device = devices.find(options.device)
    values, features = [torch.zeros(0, len(names) + 1)], []
    samples = [sample for group in groups for sample in group]
    with tqdm(total=len(samples), desc="scoring", unit="image", disable=quiet) as bar:
        for start in range(0, len(samples), options.batch_size):
            batch = samples[start : start + options.batch_size]
            images = torch.stack([to_tensor(read(sample.file)) for sample in batch])
            saturated = ((images == 0) | (images == 1)).float().mean((1, 2, 3))
            images = images.to(device)
            found = scorers(images, [prompts[sample.prompt_index] for sample in batch])  # (K, B)
            own = dict(zip(scorers.rewards, found, strict=True)) | {REWARD: scorers.total(found)}
            values.append(torch.stack([*(own[name].cpu() for name in names), saturated], dim=1).float())
            features.append(scorers.features(images))
            bar.update(len(batch))
    values = torch.cat(values).numpy()
    if not groups:  # more processes than prompts
        return values, np.zeros(0)
    if features[0] is None or options.num_images_per_prompt < 2:
        return values, None
    return values, rewards.diversity(torch.cat(features).unflatten(0, (len(groups), -1))).cpu().numpy()


def diversity_needs(options: Options) -> str:
    """Why there is none."""
    if options.num_images_per_prompt < 2:
        return "it takes --num_images_per_prompt 2 or more"
    return "no reward has features of images, as imagereward has"


def read(file: Path) -> Image.Image:
    """An image that was drawn."""
    try:
        with Image.open(file) as sample:
            return sample.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise UserError(
            f"{file} cannot be read ({error}). Delete it; the same command draws it again."
        ) from error


def compare(
    cases: Sequence[Case], bases: Sequence[int], values: dict[str, np.ndarray],
    of_prompts: dict[str, np.ndarray], names: Sequence[str], tie_margin: float,
) -> list[dict]:  # fmt: skip
    """Each case's means, and their differences to the base model, with intervals; see `intervals`."""
    means = np.stack([value.T for value in of_prompts.values()], axis=1)  # (prompts, measures, cases)
    both = np.stack([means, means - means[:, :, bases]])  # (2, prompts, measures, cases)
    both = statistics.bootstrap(np.moveaxis(both, 0, 1)).tolist()  # [mean, low, high][2][measures][cases]
    compared = []
    for index, (case, base) in enumerate(zip(cases, bases, strict=True)):
        own, against = {}, {}
        for place, name in enumerate(of_prompts):
            own[name], against[name] = (
                dict(zip((key, "low", "high"), (part[kind][place][index] for part in both), strict=True))
                for kind, key in enumerate(("mean", "difference"))
            )
            if name in names:
                difference = values[name][index] - values[name][base]
                against[name] |= statistics.outcomes(difference, tie_margin)
        compared.append({
            "name": case.name,
            "lora_path": case.lora and case.lora.path,
            "lora_sha256": case.lora and case.lora.digest,
            "lora_scale": case.lora_scale,
            "guidance_scale": case.guidance_scale,
            "step": case.lora and case.lora.step,
            "means": own,
            "against_base": against if case.lora else None,
        })  # fmt: skip
    return compared


# ---------------------------------------------------------------------------------------------------- reports


def table_of_images(samples: Sequence[Sample], prompts: Sequence[str], values: dict[str, np.ndarray]) -> str:
    """A row of CSV for each image."""
    columns = [value.ravel() for value in values.values()]
    rows = [
        [p.case.name, p.prompt_index, p.image_index, p.seed, prompts[p.prompt_index], *map(float, own)]
        for p, own in zip(samples, zip(*columns, strict=True), strict=True)
    ]
    return to_csv(["case", "prompt_index", "image_index", "seed", "prompt", *values], rows)


def table_of_prompts(
    cases: Sequence[Case], bases: Sequence[int], prompts: Sequence[str], of_prompts: dict[str, np.ndarray]
) -> str:
    """A row of CSV for each case and prompt: means of its images, and differences to the base model's."""
    rows = []
    for index, (case, base) in enumerate(zip(cases, bases, strict=True)):
        for place, prompt in enumerate(prompts):
            own = [float(value[index, place]) for value in of_prompts.values()]
            differences = [
                float(v[index, place] - v[base, place]) if case.lora else "" for v in of_prompts.values()
            ]
            rows.append([case.name, place, prompt, *own, *differences])
    differences = [f"{name}_difference" for name in of_prompts]
    return to_csv(["case", "prompt_index", "prompt", *of_prompts, *differences], rows)


def to_csv(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    content = io.StringIO()
    csv.writer(content, lineterminator="\n").writerows([header, *rows])
    return content.getvalue()


def grid(
    cases: Sequence[Case], shown: int, bases: Sequence[int], samples: Sequence[Sample],
    prompts: Sequence[str], values: dict[str, np.ndarray], measures: Sequence[str],
) -> Image.Image:  # fmt: skip
    """The first prompts' first images, whatever came out, without the LoRA above those with it."""
    indices, (_, num_prompts, number) = range(min(GRID_PAIRS, len(prompts))), values[REWARD].shape
    sides = {"before": bases[shown], "after": shown}
    drawn = {
        side: [read(samples[(case * num_prompts + index) * number].file) for index in indices]
        for side, case in sides.items()
    }
    captions = {
        side: [
            ", ".join(f"{name} {values[name][case, index, 0]:.2f}" for name in measures)
            + f"\n{prompts[index]}" * (side == "after")
            for index in indices
        ]
        for side, case in sides.items()
    }
    before, after = ([values[name][case].mean() for name in measures] for case in sides.values())
    header = f"base (above) and {cases[shown].name} (below), {num_prompts} prompts: " + ", ".join(
        f"{name} {old:.3f} -> {new:.3f}" for name, old, new in zip(measures, before, after, strict=True)
    )
    return pairs(drawn, captions, GRID_COLUMNS, header)


def choose_pairs(
    shown: int, bases: Sequence[int], samples: Sequence[Sample], prompts: Sequence[str],
    values: dict[str, np.ndarray], names: Sequence[str],
) -> dict[str, list[page.Pair]]:  # fmt: skip
    """Images without and with the LoRA: where the reward rose most, where it fell most, and at random."""
    before, after = bases[shown], shown
    gain = (values[REWARD][after] - values[REWARD][before]).ravel()
    order = gain.argsort()[::-1]
    chosen = {
        "Largest gains": [index for index in order[:SHOWN_PAIRS] if gain[index] > 0],
        "Largest losses": [index for index in order[: -SHOWN_PAIRS - 1 : -1] if gain[index] < 0],
        "At random": np.random.default_rng(0).permutation(len(gain))[:SHOWN_PAIRS],
    }

    def pair(index: int) -> page.Pair:
        sides = [samples[case * len(gain) + index] for case in (before, after)]
        scores = {name: [float(values[name][case].flat[index]) for case in (before, after)] for name in names}
        files = [read(side.file) for side in sides]
        return page.Pair(prompts[sides[0].prompt_index], sides[0].seed, *files, scores)

    return {title: [pair(int(index)) for index in indices] for title, indices in chosen.items()}


if __name__ == "__main__":
    run_as_command(main, drawing.memory_advice)

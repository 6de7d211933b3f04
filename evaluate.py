"""Evaluate LoRAs against the base model: images from the same noise, scored by rewards, prompt by prompt.

python evaluate.py                                      -> result/evaluation/report.html, evaluation.json, ...
python evaluate.py --lora_paths checkpoint/refl_lora checkpoint/refl_lora/checkpoint-*
python evaluate.py --sweep_guidance 1,2,3,5,7.5         each at its best guidance, besides
python -m refl launch --multi_gpu --num_processes 2 evaluate.py     each process takes its share, on one disk

The same command resumes: existing images are not generated again. LoRAs, scales, guidances, prompts and
images per prompt may be added in the same way. Scores are always computed anew: that costs a hundredth of the
generation, and the code of a reward may have changed.
"""

from refl.system.streams import protect_streams

if __name__ == "__main__":
    protect_streams()  # before the imports, which take seconds

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from hashlib import sha256
from itertools import groupby
from pathlib import Path

from refl.model import drawing
from refl.model.folder import resolution_of
from refl.model.lora import lora_file
from refl.model.pipeline import load_lora, unload_lora
from refl.preflight import doctor
from refl.report import card, examples, outputs, page, settings
from refl.report.cases import Lora, Sample, find_cases, find_loras, list_samples, shown_index
from refl.report.results import DIVERSITY, REWARD, SATURATED, Results, compare, images_csv, prompts_csv
from refl.reward import rewards
from refl.system import devices
from refl.system.distributed import is_peer_lost, joining, process_group
from refl.system.errors import UserError, run_as_command
from refl.system.files import writing
from refl.system.images import ImageWriter, to_png, to_tensor
from refl.system.options import read as read_options
from refl.system.ownership import OutputFolder, locks_released
from refl.system.prompts import read_prompts

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import StableDiffusionPipeline
from tqdm import tqdm

FEW_PROMPTS = 10  # below it, bootstrap intervals are too narrow
MAX_WAIT = timedelta(days=7)  # for a slower process; one that has ended is noticed at once
RESUME = " The same command resumes from here."


@dataclass
class Options(drawing.LoraOptions, drawing.ImageOptions):
    """Compare the model with and without LoRAs, image by image from the same noise, and write a report."""

    lora_paths: tuple[str, ...] = ("checkpoint/refl_lora",)
    """LoRAs for this model, files or folders; the report shows images of the first."""
    prompts: str = "data/held_out_prompts.txt"
    """File of prompts that were not trained on: .txt, .json, .jsonl, .csv, .tsv or .parquet."""
    num_prompts: int | None = None
    """Number of prompts to use, from the first; None: all."""
    num_images_per_prompt: int = 4
    """Images of each prompt in each case."""
    seed: int = 0
    """Seed of all noise. The noise of an image depends on it and on the indices of prompt and image alone."""
    reward: str = "imagereward"
    """The trained reward: one or a weighted sum, as in training."""
    held_out_reward: str | None = None
    """Rewards that were not trained on, in the same syntax; each is reported separately."""
    suite: bool = False
    """Hold out every built-in reward whose files are in --reward_path; print a table of all LoRAs."""
    reward_path: str = "checkpoint"
    """Folder of the rewards' files, placed as in checkpoint/README.md."""
    sweep_lora_scale: str | None = None
    """Scales such as 0,0.5,1,1.5 in place of --lora_scale."""
    sweep_guidance: str | None = None
    """Guidances such as 1,3,7.5 in place of --guidance_scale. The base model and each LoRA are then also
    compared at the best of them for each, by the first held-out reward, or by the reward if there is none."""
    tie_margin: float = 0.01
    """Two images tie if their scores differ by no more than this; hpsv2's and clip's are counted in 0.03."""
    output_dir: str = "result/evaluation"
    """Folder of report.html, evaluation.json, images.csv, prompts.csv, grid.png and images/."""


@process_group()
@locks_released()
def main() -> None:
    """Read the options, generate the missing images, score all images, compare the cases, report."""
    started = time.perf_counter()

    # ---- options and cases
    options = read_options(Options)
    if options.suite:
        options.held_out_reward = rewards.suite(options.reward, options.held_out_reward, options.reward_path)
    doctor.check_files(options)
    loras = find_loras(options.lora_paths)
    paths = [lora.path for lora in loras]
    guidances = drawing.find_guidance(options, paths, is_quiet=bool(options.sweep_guidance))
    options = drawing.apply_trained_settings(options, paths)
    prompts = check(options)
    cases = find_cases(
        loras, options.lora_scale, guidances, options.base_guidance_scale, options.sweep_lora_scale,
        options.sweep_guidance,
    )  # fmt: skip
    with joining():
        state = PartialState(options.device == "cpu" or not torch.cuda.is_available(), timeout=MAX_WAIT)
    device = devices.find(options.device or (str(state.device) if state.num_processes > 1 else None))
    devices.set_tf32(False)
    saved_settings = check_settings(options, prompts, device)
    folder, is_quiet = Path(options.output_dir), not state.is_main_process

    # ---- generate the images that do not exist yet; each process takes its share
    samples = list_samples(
        cases, len(prompts), options.num_images_per_prompt, options.seed, folder / "images"
    )
    missing = [sample for sample in samples if not sample.file.exists()]
    wait(state)  # every process lists them before one generates
    if state.is_main_process:
        files = [sample.file for sample in samples]
        output = outputs.open_evaluation(folder, options.prompts, files, saved_settings["resolution"])
        card.check_early(loras[0].path)
    scorers = load_scorers(options, device, prompts[0])  # before the generation: a faulty reward ends it now
    if state.is_main_process:
        with writing(folder, RESUME):
            output.write(settings.FILE, json.dumps(saved_settings, indent=2) + "\n")
    wait(state)
    output = OutputFolder(folder)
    seconds = generate(share(missing, state), prompts, loras, options, device, output, is_quiet)
    wait(state)

    # ---- score
    groups = groupby(samples, lambda sample: (sample.case, sample.prompt_index))
    groups = share([list(group) for _, group in groups], state)
    names = measures(options)
    scores, diversity = score(groups, scorers, prompts, names, options.batch_size, device, is_quiet)
    with together():
        gathered = gather_object([(scores, diversity, seconds)])
    state.destroy_process_group()
    if is_quiet:
        return
    scores, diversity, seconds = zip(*gathered, strict=True)
    shape = len(cases), len(prompts), options.num_images_per_prompt
    columns = np.concatenate(scores).astype(float).T.reshape(-1, *shape)
    has_diversity = all(part is not None for part in diversity)
    results = Results(
        cases, shown_index(cases, options.lora_scale, guidances[0]), prompts, samples,
        rewards=names,
        scores=dict(zip([*names, SATURATED], columns, strict=True)),
        diversity=np.concatenate(diversity).reshape(shape[:2]) if has_diversity else None,
        base_guidance_scale=options.base_guidance_scale,
        criterion=next(iter(rewards.parse_held_out(options.held_out_reward)), REWARD),
    )  # fmt: skip

    # ---- compare and report
    evaluation = {
        **settings.occasion(),
        "seconds": round(time.perf_counter() - started, 1),
        "seconds_drawing_per_image": round(sum(seconds) / len(missing), 3) if missing else None,
        "options": asdict(options),
        "num_prompts": len(prompts),
        "num_images_per_prompt": options.num_images_per_prompt,
        "reward": options.reward,
        "measures": list(results.prompt_means),
    } | compare(results, rewards.tie_margins(names, options.reward, options.tie_margin))
    report(results, evaluation, options, output)


# ---------------------------------------------------------------------------------------------------- options


def check(options: Options) -> list[str]:
    """Return the prompts, without duplicates; raises `UserError` for impossible options. Loads no weights."""
    drawing.check_images(options)
    if options.num_prompts is not None and options.num_prompts < 1:
        raise UserError(f"--num_prompts {options.num_prompts}: must be 1 or more, or None for all.")
    if not options.tie_margin >= 0:
        raise UserError(f"--tie_margin {options.tie_margin}: must be 0 or more.")
    # A duplicate has the same images, so it would make the intervals too narrow.
    prompts = list(dict.fromkeys(read_prompts(options.prompts)))[: options.num_prompts]
    drawing.check_amount(len(prompts), options.num_images_per_prompt)
    return prompts


def check_settings(options: Options, prompts: Sequence[str], device: torch.device) -> dict:
    """Return the settings to keep with the images; raises `UserError` if existing images have others."""
    current = settings.collect(
        options.pretrained_model_name_or_path, options.sampler, options.num_inference_steps,
        options.resolution, drawing.precision(options, device), options.lora_in_uncond, options.seed, prompts,
    )  # fmt: skip
    return settings.merge(Path(options.output_dir), current)


def measures(options: Options) -> list[str]:
    """Names of the rewards to report: the trained one, its parts if it is a sum, and the held-out ones."""
    trained = rewards.parse(options.reward)
    return [REWARD, *(trained if len(trained) > 1 else ()), *rewards.parse_held_out(options.held_out_reward)]


# -------------------------------------------------------------------------------------------------- processes


def share(items: list, state: PartialState) -> list:
    """This process's part of a list: contiguous, so that a process loads few LoRAs, and of equal length to
    within 1."""
    rank, world_size = state.process_index, state.num_processes
    return items[len(items) * rank // world_size : len(items) * (rank + 1) // world_size]


def wait(state: PartialState) -> None:
    """Wait until all processes are here."""
    with together():
        state.wait_for_everyone()


@contextmanager
def together() -> Iterator[None]:
    """Raise `UserError` if another process ends during a collective operation."""
    try:
        yield
    except RuntimeError as error:
        if not is_peer_lost(error):
            raise
        raise UserError(f"another process ended; see its message above.{RESUME}") from error


# ----------------------------------------------------------------------------------------- images and scores


def generate(
    samples: Sequence[Sample], prompts: Sequence[str], loras: Sequence[Lora], options: Options,
    device: torch.device, output: OutputFolder, is_quiet: bool,
) -> float:  # fmt: skip
    """Generate images and save them, case by case; return the seconds taken."""
    if not samples:
        return 0.0
    pipeline = drawing.pipeline(replace(options, device=str(device)))
    for lora in loras:  # all of them now: one that does not fit would otherwise fail after hours
        set_lora(pipeline, lora, 1.0, options.lora_in_uncond)
    started = time.perf_counter()
    with (
        tqdm(total=len(samples), desc="drawing", unit="image", disable=is_quiet) as bar,
        ImageWriter(output, RESUME) as writer,
    ):
        for case, group in groupby(samples, lambda sample: sample.case):
            group = list(group)
            set_lora(pipeline, case.lora, case.lora_scale, options.lora_in_uncond)
            wanted = [(prompts[sample.prompt_index], sample.seed) for sample in group]
            guided = replace(options, guidance_scale=case.guidance_scale)
            for sample, image in zip(group, drawing.draw_each(pipeline, wanted, guided, bar), strict=True):
                writer.write(image, sample.file.relative_to(output.path).as_posix())
    return time.perf_counter() - started


def set_lora(
    pipeline: StableDiffusionPipeline, lora: Lora | None, scale: float, lora_in_uncond: bool
) -> None:
    """Replace the LoRA of the pipeline by another, or by none; raises `UserError` if its file has changed."""
    unload_lora(pipeline)
    if lora:
        if sha256(lora_file(lora.path).read_bytes()).hexdigest() != lora.digest:
            raise UserError(
                f"{lora.path} has changed since the evaluation started. If it is being trained, evaluate one "
                "of its checkpoints, or wait until it is finished."
            )
        load_lora(pipeline, lora.path, scale, lora_in_uncond)


def load_scorers(options: Options, device: torch.device, prompt: str) -> rewards.WeightedRewards:
    """Load all rewards, the held-out ones with weight 0, and try them on an image of noise."""
    named = options.reward, options.held_out_reward
    scorers = rewards.load_with_held_out(*named, options.reward_path, device, torch.float32)
    side = resolution_of(options.pretrained_model_name_or_path, options.resolution)
    with torch.no_grad():
        noise = torch.rand((1, 3, side, side), generator=torch.Generator().manual_seed(0))
        scorers(noise.to(device), [prompt])
    return scorers


@torch.no_grad()
def score(
    groups: Sequence[list[Sample]], scorers: rewards.WeightedRewards, prompts: Sequence[str],
    names: Sequence[str], batch_size: int, device: torch.device, is_quiet: bool,
) -> tuple[np.ndarray, np.ndarray | None]:  # fmt: skip
    """Score the images of groups, each of one case and prompt.

    Returns values (number of images, len(names) + 1), the last column the share of saturated colour values,
    and the diversity of each group, None without features or with one image in a group.
    """
    values, features = [torch.zeros(0, len(names) + 1)], []
    samples = [sample for group in groups for sample in group]
    with tqdm(total=len(samples), desc="scoring", unit="image", disable=is_quiet) as bar:
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            images = torch.stack([to_tensor(sample.read()) for sample in batch])  # (B, 3, H, W) in [0, 1]
            saturated = ((images == 0) | (images == 1)).float().mean((1, 2, 3))  # (B,)
            images = images.to(device)
            with rewards.embedding_once():
                scores = scorers(images, [prompts[sample.prompt_index] for sample in batch])  # (K, B)
                features.append(scorers.features(images))
            by_name = dict(zip(scorers.rewards, scores, strict=True)) | {REWARD: scorers.finite_total(scores)}
            values.append(torch.stack([*(by_name[name].cpu() for name in names), saturated], dim=1).float())
            bar.update(len(batch))
    values = torch.cat(values).numpy()
    if not groups:  # more processes than prompts
        return values, np.zeros(0)
    if features[0] is None or len(groups[0]) < 2:
        return values, None
    return values, rewards.diversity(torch.cat(features).unflatten(0, (len(groups), -1))).cpu().numpy()


# ----------------------------------------------------------------------------------------------------- report


def report(results: Results, evaluation: dict, options: Options, output: OutputFolder) -> None:
    """Write all files of the report, print a summary, and update the model card of a finished training."""
    held_out = list(rewards.parse_held_out(options.held_out_reward))
    with writing(output.path, RESUME):
        output.write("images.csv", images_csv(results))
        output.write("prompts.csv", prompts_csv(results))
        output.write("evaluation.json", json.dumps(evaluation, indent=2) + "\n")
        output.write("grid.png", to_png(examples.grid(results, [REWARD, *held_out[:1]])))
        pairs, differences = examples.choose_pairs(results), results.differences(REWARD)
        output.write("report.html", page.render(evaluation, results.shown, differences, pairs))
    print(page.text(evaluation, results.shown))
    if DIVERSITY not in results.prompt_means:
        few = options.num_images_per_prompt < 2
        reason = "--num_images_per_prompt must be 2 or more" if few else "no reward has image features"
        print(f"no diversity: {reason}")
    if len(results.prompts) < FEW_PROMPTS:
        plural = "s" if len(results.prompts) > 1 else ""
        print(f"note: intervals over {len(results.prompts)} prompt{plural} are too narrow")
    print(f"report: {output.path / 'report.html'}")
    folder = results.cases[results.shown].lora.path
    if outputs.is_run(folder) and (path := card.write_if_possible(folder, evaluation=output.path)):
        print(f"model card: {path}")


if __name__ == "__main__":
    run_as_command(main, drawing.memory_advice)

"""Model card of a training run: README.md with curves and images, for people and for the Hugging Face Hub.

python -m refl card checkpoint/refl_lora
python -m refl card checkpoint/refl_lora --evaluation result/evaluation

Everything is read from the output folder; sections without data are left out. The text is card.md.jinja.
"""

import hashlib
import io
import json
import logging
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from refl.model.lora import KOHYA_FILE, LORA_FILE, guidance_of, read_metadata
from refl.model.pipeline import SAMPLERS
from refl.report import outputs
from refl.report.labels import label, plain_labels
from refl.report.results import best_comparisons, comparisons, other_comparisons
from refl.system import checkpoints
from refl.system.errors import UserError
from refl.system.files import writing
from refl.system.options import read as read_options
from refl.system.ownership import OutputFolder, locks_released, take
from refl.system.prompts import read_prompts
from refl.system.reading import check_folder, exists, read_bytes, read_object
from refl.system.text import printable
from refl.system.weights import open_safetensors

import numpy as np
import tyro
from jinja2 import Environment, FileSystemLoader, UndefinedError
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FILE = outputs.CARD
FILES = (FILE, *outputs.CARD_IMAGES)
EVALUATION, BEFORE_AFTER = outputs.EVALUATION, "before_after.png"  # of an evaluation, copied into the folder
MAIN_OPTIONS = """learning_rate max_train_steps rank train_batch_size gradient_accumulation_steps
    num_inference_steps min_stop max_stop guidance_scale grad_scale reward_target seed""".split()
EXTRA_OPTIONS = """normalize_by_stop noise_distance_weight lora_shrinkage pretrain_data held_out_reward
    early_stop""".split()  # also main options where they are set


@dataclass
class Options:
    """Write the model card of a LoRA, README.md, into its folder."""

    folder: tyro.conf.Positional[str] = "checkpoint/refl_lora"
    """The --output_dir of the training."""
    evaluation: str | None = None
    """Folder of an evaluation of this LoRA; its evaluation.json and grid.png are copied beside the card."""


def write(folder: str | Path, evaluation: str | Path | None = None) -> Path:
    """Write README.md and its images, and return its path; the same files give the same bytes.

    An evaluation is copied into the folder and used by later calls. Raises `UserError` if the folder has no
    LoRA or cannot be written, if one of the files is not the program's own, or if the evaluation cannot be
    read.
    """
    folder = Path(folder)
    lora = folder / LORA_FILE
    if not exists(lora):
        raise UserError(f"no LoRA at {lora}; name the --output_dir of a finished training.")
    output = take(folder, outputs.RUN)
    output.check([*FILES, EVALUATION] if evaluation else [FILE])
    digest = hashlib.sha256(read_bytes(lora)).hexdigest()
    facts, files = _training(folder)
    results, has_image = _read_json(folder / EVALUATION), (folder / BEFORE_AFTER).is_file()
    if evaluation:
        results = _read_json(Path(evaluation) / EVALUATION)
        grid = Path(evaluation) / "grid.png"
        files[EVALUATION] = json.dumps(results, indent=2) + "\n"
        if has_image := grid.is_file():
            files[BEFORE_AFTER] = grid.read_bytes()
    facts |= {"evaluation": results, "has_image": has_image}
    try:
        cases = _cases(results, digest)
        if evaluation and not cases:
            raise LookupError("no LoRA in it")
        is_current = bool(cases) and cases[0][0]["lora_sha256"] == digest
        best = [
            one for one in best_comparisons(results) if one[0]["lora_sha256"] == cases[0][0]["lora_sha256"]
        ]
        card = _render(facts | {"cases": cases, "best": best, "is_current": is_current})
    except (LookupError, TypeError, ValueError, AttributeError, UndefinedError) as error:
        if evaluation:
            raise UserError(f"--evaluation {evaluation}: no readable {EVALUATION} in this folder.") from error
        card = _render(facts | {"cases": [], "best": [], "is_current": False})
    output.check(list(files))
    with writing(folder):
        for name, content in (files | {FILE: card}).items():
            output.write(name, content)
        if not has_image:
            output.delete(BEFORE_AFTER)  # of an earlier evaluation
    return folder / FILE


def check_early(folder: str | Path) -> None:
    """Print a note if the card of a run cannot be updated after an evaluation, because it was edited say."""
    if outputs.is_run(folder):
        try:
            OutputFolder(folder, outputs.RUN).check([*FILES, EVALUATION])
        except UserError as error:
            print(f"note: the model card will not be updated: {error}")


def write_if_possible(folder: str | Path, evaluation: str | Path | None = None) -> Path | None:
    """Write the card; print a warning and return None on failure, since the training itself succeeded."""
    try:
        return write(folder, evaluation)
    except UserError as error:
        print(f"WARNING: no model card: {error}", file=sys.stderr)
        return None


def _training(folder: Path) -> tuple[dict, dict[str, bytes]]:
    """Collect the template's variables about the training, and the card's images by file name."""
    lora = folder / LORA_FILE
    metadata, options, state = read_metadata(lora), _read_json(folder / "options.json"), _state(folder)
    scalars, images = _read_events(folder / str(options.get("logging_dir", "logs")))
    step = metadata.get("step")
    images = _first_and_last(images, step)
    names = ("validation_before.png", "validation_after.png")
    files = {name: image.encoded_image_string for name, image in zip(names, images, strict=False)}
    if scalars:
        files["curves.png"] = curves(scalars, step)
    main_options = MAIN_OPTIONS + [name for name in EXTRA_OPTIONS if options.get(name)]
    facts = {
        "metadata": metadata,
        "options": options,
        "main_options": {name: options[name] for name in main_options if name in options},
        "state": state,
        "is_sd14": _is_sd14(lora, str(metadata.get("base_model"))),
        "sampler": getattr(SAMPLERS.get(str(metadata.get("sampler"))), "__name__", None),
        "drawing": _drawing(metadata),
        "guidance": guidance_of(metadata),
        "lora_file": Markup(lora.name),
        "kohya_file": Markup(KOHYA_FILE),
        "has_kohya": (folder / KOHYA_FILE).is_file(),
        "has_curves": bool(scalars),
        "images": images,
        "validation": _first_and_last(scalars.get("validation/reward", []), step),
        "time": _time(scalars),
        "data": _data(options, state.get("fingerprint", {})),
    }
    return facts, files


# ---------------------------------------------------------------------------------------------------- reading


def _read_json(path: Path, types: Mapping[str, type] | None = None) -> dict:
    """Read a JSON object; {} if there is none or it cannot be read, or if entries have other types."""
    try:
        return read_object(path, types or {})
    except UserError:
        return {}


def _is_fault(record: logging.LogRecord) -> bool:
    """Whether a message of TensorBoard's says more than that the points are purged that a resumed run wrote
    after its checkpoint, as they should be."""
    return "out of order event.step" not in record.getMessage()


logging.getLogger("tensorboard").addFilter(_is_fault)


def _read_events(folder: Path) -> tuple[dict[str, list], list]:
    """Read TensorBoard's finite scalars by tag and the validation images; ({}, []) if they cannot be read."""
    everything = {"scalars": 0, "images": 0, "histograms": 1, "compressedHistograms": 1}  # 0: all of them
    try:
        check_folder(folder)
        events = EventAccumulator(str(folder), size_guidance=everything).Reload()
        tags, images = events.Tags(), "validation/images"
        scalars = {tag: [p for p in events.Scalars(tag) if math.isfinite(p.value)] for tag in tags["scalars"]}
        return scalars, events.Images(images) if images in tags["images"] else []
    except Exception:  # of TensorBoard's own types, for a missing folder or unreadable files
        return {}, []


def _state(folder: Path) -> dict:
    """Read the state of the newest checkpoint; {} without one."""
    steps = checkpoints.steps(folder)
    if not steps:
        return {}
    types = {"fingerprint": dict, "progress": dict, "versions": dict}
    return _read_json(folder / f"checkpoint-{max(steps)}" / checkpoints.STATE, types)


def _first_and_last(points: list, step: int | None) -> list:
    """The first point and the last one up to `step`, the LoRA's; [] for fewer than two points."""
    points = [point for point in points if step is None or point.step <= step]
    return [points[0], points[-1]] if len(points) > 1 else []


def _is_sd14(lora: Path, base_model: str) -> bool:
    """Whether the base model has SD-1.4's name and the LoRA the widths of its first attention layers."""
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    widths = {f"{block}.attn1.to_q.lora.down.weight": 320, f"{block}.attn2.to_k.lora.down.weight": 768}
    with open_safetensors(lora) as tensors:
        return Path(base_model).name == "stable-diffusion-v1-4" and all(
            key in set(tensors.keys()) and tensors.get_slice(key).get_shape()[1] == width
            for key, width in widths.items()
        )


def _drawing(metadata: dict) -> Markup:
    """Format the pipeline's arguments that draw for what the LoRA was trained."""
    side = metadata.get("resolution")
    arguments = {
        "num_inference_steps": metadata.get("num_inference_steps"),
        "guidance_scale": guidance_of(metadata),
        "height": side,
        "width": side,
    }
    return Markup("".join(f", {name}={value}" for name, value in arguments.items() if value is not None))


def _time(scalars: dict[str, list]) -> str | None:
    """Describe how long the steps took and when the run ended."""
    if not (steps := scalars.get("seconds/total")):
        return None
    try:
        day = datetime.fromtimestamp(steps[-1].wall_time, UTC).date()
    except (ValueError, OverflowError, OSError):  # of a damaged file
        return None
    minutes = sum(point.value for point in steps) / 60
    return f"The {len(steps)} logged steps took {minutes:.1f} minutes and ended on {day} (UTC)."


def _data(options: dict, fingerprint: dict) -> list[Markup]:
    """Describe the training and validation data; prompts are counted if their file has not changed since."""
    lines = []
    if path := options.get("prompts"):
        line = f"Trained on the prompts of {code(Path(str(path)).name)}"
        if digest := fingerprint.get("prompts"):
            try:
                prompts = read_prompts(str(path))
            except UserError:
                prompts = []
            if hashlib.sha256("\n".join(prompts).encode()).hexdigest() == digest:
                line += f", {len(prompts)} of them"
            line += f"; SHA-256 {code(digest)}"
        lines.append(line)
    if path := options.get("validation_prompts"):
        lines.append(f"Validated on prompts of {code(Path(str(path)).name)}")
    if path := options.get("pretrain_data"):
        lines.append(f"Regularised by the captioned images of {code(Path(str(path)).name)}")
    elif lines:
        lines.append("No images were trained on")
    return [Markup(line) for line in lines]


def _cases(evaluation: dict, digest: str) -> list[tuple[dict, list, list]]:
    """Each case with a LoRA, its `comparisons` and its `other_comparisons`. The LoRA with SHA-256 `digest`
    comes first, starting with the case that the report shows."""
    if not evaluation:
        return []
    shown = evaluation["cases"][evaluation["shown"]]
    loras = [
        (case, comparisons(evaluation, index), other_comparisons(evaluation, index))
        for index, case in enumerate(evaluation["cases"])
        if case["against_base"]
    ]
    return sorted(loras, key=lambda item: (item[0]["lora_sha256"] != digest, item[0] is not shown))


# ------------------------------------------------------------------------------------------------------- text


def escape(value: object) -> Markup:
    """Escape a value as one line of plain text for Markdown and its tables."""
    if isinstance(value, Markup):
        return value
    line = " ".join(printable(value).split())
    return Markup(re.sub(r"[^\w\s.,:+/=%()-]|_", lambda match: f"&#{ord(match[0])};", line))


def code(value: object) -> Markup:
    """Format a value as one line of code, also for tables."""
    line = " ".join(printable(value).split())
    is_plain = line and not set("`|\\") & set(line)
    return Markup(f"`{line}`" if is_plain else f"<code>{escape(line)}</code>")


def number(value: float | None, form: str = ".3f") -> str:
    """Format a number; "" for None."""
    return "" if value is None else format(value, form)


def share(count: float, outcomes: dict) -> str:
    """Format a count of wins, ties or losses as a percentage of all."""
    return f"{count / (outcomes['win'] + outcomes['tie'] + outcomes['loss']):.0%}"


def _render(facts: dict) -> str:
    """The card; every value is escaped for Markdown, unless it is `Markup`."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"code": code, "number": number, "share": share}
    text = templates.get_template("card.md.jinja").render(**facts)
    return re.sub(r"\n{3,}", "\n\n", text)


# ----------------------------------------------------------------------------------------------------- curves


@plain_labels()
def curves(scalars: dict[str, list], lora_step: int | None = None) -> bytes:
    """Plot reward, validation, loss and gradient norm by step, as PNG."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    reward, validation, loss, norm = figure.subplots(2, 2).flat
    for axis, tag, title in (
        (reward, "reward/mean", "reward of the training images"),
        (loss, "loss", "loss"),
        (norm, "gradient_norm", "gradient norm before clipping"),
    ):
        _plot_smoothed(axis, scalars.get(tag, []))
        axis.set_title(title)
    seen = []
    for tag in sorted(scalars, key=lambda tag: (tag != "validation/reward", tag)):
        values = [point.value for point in scalars[tag]]
        if tag.startswith("validation/") and values not in seen:  # a single reward equals the sum
            seen.append(values)
            validation.plot(
                [p.step for p in scalars[tag]],
                values,
                "o-",
                ms=3.5,
                lw=1.5,
                clip_on=False,
                label=label(tag[11:]),
            )
    validation.set_title("validation, from the same noise each time")
    if len(seen) > 1:
        validation.legend(frameon=False, fontsize=8)
    validation.set_visible(bool(seen))
    last = max((points[-1].step for points in scalars.values() if points), default=0)
    for axis in (reward, validation, loss, norm):
        axis.set_xlim(0, last or 1)
        axis.set_xlabel("step", color="0.4", fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.title.set(fontsize=10, color="0.2")
        axis.tick_params(labelsize=8, colors="0.4", length=0)
        axis.grid(lw=0.5, color="0.9")
        axis.set_axisbelow(True)
        axis.spines[:].set_visible(False)
        if lora_step is not None and lora_step < last:
            axis.axvline(lora_step, color="0.5", lw=0.8, ls=":")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130, metadata={"Software": None})
    return content.getvalue()


def _plot_smoothed(axis: Axes, points: list) -> None:
    """Plot the points faintly, and their moving average over a fifteenth of them."""
    steps, values = [point.step for point in points], [point.value for point in points]
    half = len(values) // 30
    mean = [np.mean(values[max(0, index - half) : index + half + 1]) for index in range(len(values))]
    axis.plot(steps, values, color="C0", lw=0.8, alpha=0.3)
    axis.plot(steps, mean, color="C0", lw=1.8)


@locks_released()
def main() -> None:
    """Read the options and write the card."""
    options = read_options(Options, prog="python -m refl card")
    print(f"model card written: {write(options.folder, options.evaluation)}")

"""Report of an evaluation: text for a terminal, and one self-contained HTML file without scripts."""

import base64
import io
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from refl.report.labels import label, plain_labels
from refl.report.results import DIVERSITY, SATURATED, base_at, best_comparisons, other_comparisons
from refl.system.text import printable

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

MAX_SIDE = 256  # pixels of an image in the report
BINS = 30  # even, so that 0 is an edge between two bins
# Placeholder colours of plots, replaced in the SVG by colours of the page, light or dark.
TEXT, LINE, ACCENT = "#010203", "#040506", "#070809"
PAGE_COLOURS = {TEXT: "currentColor", LINE: "var(--line)", ACCENT: "var(--accent)"}
COLOUR_MAP = "viridis"


@dataclass
class Pair:
    """An image without and with the LoRA, from the same noise, and their scores."""

    prompt: str
    seed: int
    before: Image.Image
    after: Image.Image
    scores: dict[str, list[float]]  # by measure: before, after


# ------------------------------------------------------------------------------------------------------- text


def text(evaluation: dict, shown: int) -> str:
    """Tables of the shown case against the base model, a line for each other LoRA, and the best against the
    best."""
    case = evaluation["cases"][shown]
    compared = other_comparisons(evaluation, shown)
    counts = f"{evaluation['num_prompts']} prompts, {evaluation['num_images_per_prompt']} of each"
    tables = "\n\n".join(_table(evaluation, case, *one) for one in compared)
    blocks = [f"{counts}\n{tables}".rstrip()]
    others = [i for i, c in enumerate(evaluation["cases"]) if c["against_base"] and i != shown]
    if others:
        rows = [("reward", "against", "difference", "95 % interval", "win / tie / loss")]
        for index in others:
            for base, against in other_comparisons(evaluation, index):
                rows.append((evaluation["cases"][index]["name"], base["name"], *_cells(against["reward"])))
        blocks.append(_aligned(rows))
    if evaluation["options"].get("suite"):
        blocks.append(_all_means(evaluation))
    if best := best_comparisons(evaluation):
        criterion = evaluation["best_against_best"]["criterion"]
        tables = "\n\n".join(_table(evaluation, *one) for one in best)
        blocks.append(f"Best against best: each at the guidance with its highest {criterion}\n{tables}")
    return printable("\n" + "\n\n".join(blocks) + "\n")


def _all_means(evaluation: dict) -> str:
    """Table of all cases and measures: the means, and half of their 95 % intervals."""
    rows = [("mean, 95 % interval", *evaluation["measures"])]
    for case in evaluation["cases"]:
        means = (case["means"][name] for name in evaluation["measures"])
        rows.append((case["name"], *(f"{m['mean']:.3f} ± {(m['high'] - m['low']) / 2:.3f}" for m in means)))
    return _aligned(rows)


def _table(evaluation: dict, case: dict, base: dict, differences: dict) -> str:
    """Table of a case against one of the base model, with all measures."""
    rows = [("", base["name"], case["name"], "difference", "95 % interval", "win / tie / loss")]
    for name in evaluation["measures"]:
        means = (f"{entry['means'][name]['mean']:.3f}" for entry in (base, case))
        rows.append((name, *means, *_cells(differences[name])))
    return _aligned(rows)


def _cells(against: dict) -> tuple[str, str, str]:
    """Format difference, interval and outcomes."""
    return f"{against['difference']:+.3f}", interval(against), outcomes(against)


def interval(entry: dict, form: str = "+.3f") -> str:
    """Format the ends of an interval."""
    return f"{entry['low']:{form}} to {entry['high']:{form}}"


def outcomes(against: dict) -> str:
    """Format the shares of wins, ties and losses; "" for a measure that is not a reward."""
    if "win" not in against:
        return ""
    counts = [against[key] for key in ("win", "tie", "loss")]
    return " / ".join(f"{count / sum(counts):.0%}" for count in counts)


def significance(against: dict, measure: str) -> str:
    """ "better" or "worse" for a difference whose interval excludes 0; "" for others.

    What is not a reward can only be worse, as for --early_stop: less diversity, more saturation.
    """
    is_reward = "win" in against
    rises, falls = against["low"] > 0, against["high"] < 0
    if rises and is_reward:
        return "better"
    is_worse = rises if measure == SATURATED else falls and (is_reward or measure == DIVERSITY)
    return "worse" if is_worse else ""


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        row[0].ljust(widths[0])
        + "".join(f"  {cell.rjust(w)}" for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


# ------------------------------------------------------------------------------------------------------- HTML


def render(evaluation: dict, shown: int, differences: np.ndarray, pairs: dict[str, list[Pair]]) -> str:
    """Render the HTML page. `differences` (N,): the reward of each image of the shown case minus the base
    model's."""
    cases = evaluation["cases"]
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters |= {"interval": interval, "outcomes": outcomes, "data_uri": data_uri}
    templates.filters |= {"significance": significance}
    return templates.get_template("report.html.jinja").render(
        evaluation=evaluation,
        loras=[
            (case, other_comparisons(evaluation, index))
            for index, case in sorted(enumerate(cases), key=lambda item: item[0] != shown)
            if case["against_base"]
        ],
        best=best_comparisons(evaluation),
        histogram=plot(lambda axis: histogram(axis, differences), "Differences of the reward, by image"),
        curves=curves(evaluation),
        heat_maps=heat_maps(evaluation, cases[shown]["lora_path"]),
        pairs=pairs,
    )


def data_uri(image: Image.Image) -> str:
    """Encode an image, reduced to `MAX_SIDE`, as the source of an <img>."""
    content = io.BytesIO()
    image = image.copy()
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    image.save(content, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


# ------------------------------------------------------------------------------------------------------ plots


@plain_labels()
def plot(draw: Callable[[Axes], None], title: str) -> Markup:
    """Render what `draw` puts on an axis as inline SVG in the page's colours and font."""
    title = printable(title)
    figure = Figure(figsize=(5.6, 3.2), layout="constrained", facecolor="none")
    axis = figure.subplots()
    axis.set_facecolor("none")
    axis.set_title(title, fontsize=10, color=TEXT)
    axis.tick_params(labelsize=8, colors=TEXT, length=0)
    axis.grid(lw=0.6, color=LINE)
    axis.set_axisbelow(True)
    axis.spines[:].set_visible(False)
    draw(axis)
    for text in (axis.xaxis.label, axis.yaxis.label):
        text.set(fontsize=8, color=TEXT)
    content = io.StringIO()
    # The salt makes the SVG's internal ids reproducible and different from those of the page's other plots.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    svg = content.getvalue()
    for colour, replacement in PAGE_COLOURS.items():
        svg = svg.replace(colour, replacement)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    attributes = f'role="img" aria-label="{Markup.escape(title)}"'
    return Markup(re.sub(r'width="[^"]*pt" height="[^"]*pt"', lambda _: attributes, svg, count=1))


def histogram(axis: Axes, differences: np.ndarray) -> None:
    """Histogram of the differences in reward, by image."""
    widest = float(np.abs(differences).max()) or 1.0
    axis.hist(differences, bins=np.linspace(-widest, widest, BINS + 1), color=ACCENT)
    axis.axvline(0, color=TEXT, lw=1, label="base")
    axis.axvline(differences.mean(), color=TEXT, lw=1, ls="--", label=f"mean {differences.mean():+.3f}")
    axis.legend(frameon=False, fontsize=8, labelcolor=TEXT)
    axis.set_xlabel("with the LoRA minus without")
    axis.set_ylabel("images")
    axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def curves(evaluation: dict) -> list[Markup]:
    """Plot each measure by training step, one line for each run with LoRAs of several steps; the base model
    is step 0. [] without such a run, or with several scales or guidances."""
    cases = [case for case in evaluation["cases"] if case["step"] is not None]
    settings = {(case["lora_scale"], case["guidance_scale"]) for case in cases}
    runs = defaultdict(dict)  # folder -> step -> case
    for case in sorted(cases, key=lambda case: case["step"]):
        path = Path(case["lora_path"])
        runs[path.parent if re.fullmatch(r"checkpoint-\d+|best", path.name) else path][case["step"]] = case
    runs = {folder: by_step for folder, by_step in runs.items() if len(by_step) > 1}
    if not runs or len(settings) > 1:
        return []
    base = base_at(evaluation, cases[0]["guidance_scale"])

    def curve(axis: Axes, name: str) -> None:
        for (folder, by_step), style in zip(runs.items(), cycle(("-", "--", ":", "-.")), strict=False):
            steps, means = [0, *by_step], [case["means"][name] for case in (base, *by_step.values())]
            mean, low, high = ([entry[key] for entry in means] for key in ("mean", "low", "high"))
            axis.fill_between(steps, low, high, color=ACCENT, alpha=0.2 / len(runs), lw=0)
            axis.plot(steps, mean, f"o{style}", color=ACCENT, ms=4, label=label(folder.name))
        if len(runs) > 1:
            axis.legend(frameon=False, fontsize=8, labelcolor=TEXT)
        axis.set_xlabel("training step; the band is the 95 % interval")
        axis.xaxis.set_major_locator(MaxNLocator(7, integer=True))

    return [
        plot(lambda axis, name=name: curve(axis, name), f"{name} by training step")
        for name in evaluation["measures"]
    ]


def heat_maps(evaluation: dict, lora_path: str) -> list[Markup]:
    """Plot each measure of one LoRA by scale and guidance; scale 0 is the base model. [] without a sweep."""
    own = [case for case in evaluation["cases"] if case["lora_path"] == lora_path]
    if len(own) < 2:
        return []
    guidances = sorted({case["guidance_scale"] for case in own})
    bases = [case for case in evaluation["cases"] if case["lora_path"] is None]
    cases = [case for case in [*bases, *own] if case["guidance_scale"] in guidances]
    scales = sorted({case["lora_scale"] for case in cases})

    def heat_map(axis: Axes, name: str) -> None:
        means = np.zeros((len(scales), len(guidances)))
        for case in cases:
            place = scales.index(case["lora_scale"]), guidances.index(case["guidance_scale"])
            means[place] = case["means"][name]["mean"]
        axis.grid(False)
        axis.pcolormesh(means, cmap=COLOUR_MAP, edgecolor="none")
        middle = (means.min() + means.max()) / 2
        for (row, column), mean in np.ndenumerate(means):
            colour = "white" if mean <= middle else "black"
            place = column + 0.5, row + 0.5
            axis.text(*place, f"{mean:.3f}", ha="center", va="center", color=colour, fontsize=9)
        axis.set_xticks(np.arange(len(guidances)) + 0.5, [f"{guidance:g}" for guidance in guidances])
        axis.set_yticks(np.arange(len(scales)) + 0.5, [f"{scale:g}" for scale in scales])
        axis.set_xlabel("guidance scale")
        axis.set_ylabel("LoRA scale; 0 is the base model")

    return [
        plot(lambda axis, name=name: heat_map(axis, name), f"{name} by scale and guidance")
        for name in evaluation["measures"]
    ]

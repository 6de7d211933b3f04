"""Example images of an evaluation: with and without the LoRA, from the same noise."""

from collections.abc import Sequence

from refl.report import sheets
from refl.report.page import Pair
from refl.report.results import REWARD, Results

import numpy as np
from PIL import Image

PAIRS_PER_SECTION = 8  # of the report
GRID_PAIRS, GRID_COLUMNS = 12, 6


def grid(results: Results, measures: Sequence[str]) -> Image.Image:
    """The first image of each of the first prompts, not selected: base model above, LoRA below, captioned
    with the scores of `measures`."""
    num_prompts = len(results.prompts)
    num_images = len(results.samples) // (len(results.cases) * num_prompts)
    shown, base = results.shown, results.bases[results.shown]
    indices = range(min(GRID_PAIRS, num_prompts))
    images, captions = {}, {}
    for side, case in (("before", base), ("after", shown)):
        images[side] = [results.samples[(case * num_prompts + i) * num_images].read() for i in indices]
        captions[side] = [
            ", ".join(f"{name} {results.scores[name][case, i, 0]:.2f}" for name in measures) for i in indices
        ]
    captions["after"] = [f"{text}\n{results.prompts[i]}" for i, text in enumerate(captions["after"])]
    means = ", ".join(
        f"{name} {results.scores[name][base].mean():.3f} -> {results.scores[name][shown].mean():.3f}"
        for name in measures
    )
    header = f"base (above) and {results.cases[shown].name} (below), {num_prompts} prompts: {means}"
    return sheets.pairs(images, captions, GRID_COLUMNS, header)


def choose_pairs(results: Results) -> dict[str, list[Pair]]:
    """Pairs of images for the report: the largest gains in reward, the largest losses, and random ones."""
    gain = results.differences(REWARD)
    order = gain.argsort()[::-1]
    chosen = {
        "Largest gains": [index for index in order[:PAIRS_PER_SECTION] if gain[index] > 0],
        "Largest losses": [index for index in order[: -PAIRS_PER_SECTION - 1 : -1] if gain[index] < 0],
        "At random": np.random.default_rng(0).permutation(len(gain))[:PAIRS_PER_SECTION],
    }
    return {title: [_pair(results, int(index)) for index in indices] for title, indices in chosen.items()}


def _pair(results: Results, index: int) -> Pair:
    """The pair at `index` among the P * N images of a case."""
    cases = results.bases[results.shown], results.shown
    per_case = len(results.samples) // len(results.cases)
    before, after = (results.samples[case * per_case + index] for case in cases)
    scores = {
        name: [float(results.scores[name][case].flat[index]) for case in cases] for name in results.rewards
    }
    return Pair(results.prompts[after.prompt_index], after.seed, before.read(), after.read(), scores)

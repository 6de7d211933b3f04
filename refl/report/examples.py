"""Example images of an evaluation: with and without the LoRA, from the same noise."""

from collections.abc import Sequence

from refl.report import sheets
from refl.report.cases import Case
from refl.report.page import Pair
from refl.report.results import REWARD, Results

import numpy as np
from PIL import Image

PAIRS_PER_SECTION = 8  # of the report
GRID_PAIRS, GRID_COLUMNS = 12, 6


def grid(results: Results, measures: Sequence[str]) -> Image.Image:
    """The first image of each of the first prompts, not selected, captioned with the scores of `measures`.

    From top to bottom: the base model at its own default guidance and at the LoRA's, and the LoRA; if
    guidance was swept, the base model and the LoRA, each at its best.
    """
    num_prompts = len(results.prompts)
    num_images = len(results.samples) // (len(results.cases) * num_prompts)
    indices = range(min(GRID_PAIRS, num_prompts))
    images, captions, means = {}, {}, []
    for case in _sides(results):
        name = results.cases[case].name
        images[name] = [results.samples[(case * num_prompts + i) * num_images].read() for i in indices]
        captions[name] = [
            f"{name}\n"
            + ", ".join(f"{measure} {results.scores[measure][case, i, 0]:.2f}" for measure in measures)
            for i in indices
        ]
        scores = ", ".join(f"{measure} {results.scores[measure][case].mean():.3f}" for measure in measures)
        means.append(f"{name}: {scores}")
    captions[name] = [f"{text}\n{results.prompts[i]}" for i, text in enumerate(captions[name])]
    header = "\n".join([f"{num_prompts} prompts, means over all images", *means])
    return sheets.pairs(images, captions, GRID_COLUMNS, header)


def _sides(results: Results) -> list[int]:
    """Indices of the cases in the grid."""
    if results.best:
        base, *loras = results.best
        shown = results.cases[results.shown]
        return [base, next(i for i in loras if _is_same(results.cases[i], shown))]
    bases = [results.default_base, results.bases[results.shown]]
    return [*dict.fromkeys(base for base in bases if base is not None), results.shown]


def _is_same(one: Case, other: Case) -> bool:
    """Whether two cases differ in guidance alone."""
    return (one.lora, one.lora_scale) == (other.lora, other.lora_scale)


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

"""Results of an evaluation: scores of all images, their comparison with the base model, CSV tables."""

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from refl.report import statistics
from refl.report.cases import Case, Sample, base_index

import numpy as np

REWARD, SATURATED, DIVERSITY = "reward", "saturated", "diversity"  # measures besides the rewards' own names


@dataclass(frozen=True)
class Results:
    """Measures of C cases x P prompts x N images of each prompt."""

    cases: Sequence[Case]  # (C)
    shown: int  # index of the case that reports show first
    prompts: Sequence[str]  # (P)
    samples: Sequence[Sample]  # (C * P * N), ordered by case, prompt and image
    rewards: Sequence[str]  # the measures of `scores` that are better when higher
    scores: dict[str, np.ndarray]  # by measure, (C, P, N)
    diversity: np.ndarray | None  # of the images of each prompt, (C, P)
    base_guidance_scale: float | None = None  # the base model's own default, if it was drawn at that
    criterion: str = REWARD  # the measure that decides which guidance is best

    @cached_property
    def bases(self) -> list[int]:
        """Index of the base model at the guidance of each case, (C)."""
        return [base_index(case.guidance_scale, self.cases) for case in self.cases]

    @property
    def default_base(self) -> int | None:
        """Index of the base model at its own default guidance; None if it was not drawn at that."""
        scale = self.base_guidance_scale
        return None if scale is None else base_index(scale, self.cases)

    @cached_property
    def best(self) -> list[int]:
        """Indices of the best cases, by guidance, of the base model and of each LoRA at each scale, in this
        order. Best is the highest mean of `criterion`. [] if each LoRA was drawn at one guidance only."""
        means, groups = self.scores[self.criterion].mean((1, 2)), defaultdict(list)
        for index, case in enumerate(self.cases):
            groups[case.lora, case.lora_scale].append(index)
        if all(len(group) == 1 for (lora, _), group in groups.items() if lora):
            return []
        return [max(group, key=means.__getitem__) for group in groups.values()]

    @cached_property
    def prompt_means(self) -> dict[str, np.ndarray]:
        """By measure: means over the images of each prompt, (C, P)."""
        means = {name: value.mean(-1) for name, value in self.scores.items()}
        return means if self.diversity is None else means | {DIVERSITY: self.diversity}

    def differences(self, measure: str) -> np.ndarray:
        """Score of each image of the shown case minus the base model's from the same noise, (P * N)."""
        scores = self.scores[measure]
        return (scores[self.shown] - scores[self.bases[self.shown]]).ravel()


# ------------------------------------------------------------------------------------------------- comparison


def compare(results: Results, tie_margins: dict[str, float]) -> dict:
    """Entries of evaluation.json: the means of each case, its differences from the base model at the same
    guidance and at its own default, and the best against the best.

    `tie_margins`: by reward. "best_against_best" compares each LoRA, at each scale, at its best guidance with
    the base model at its best. The best are chosen on the images that are compared, so both sides look
    slightly better than they would on new images. None without a sweep of guidance.
    """
    means = np.stack([value.T for value in results.prompt_means.values()], axis=1)  # (P, M measures, C)
    intervals = statistics.bootstrap(means)  # (3: mean, low, high; M, C)
    best = None
    if results.best:
        base, *loras = results.best
        compared = [
            {"case": i, "against_best_base": _differences(results, i, base, tie_margins)} for i in loras
        ]
        best = {"criterion": results.criterion, "base": base, "loras": compared}
    return {
        "shown": results.shown,
        "base_guidance_scale": results.base_guidance_scale,
        "cases": [
            _entry(results, index, intervals[..., index], tie_margins) for index in range(len(results.cases))
        ],
        "best_against_best": best,
    }


def _entry(results: Results, index: int, intervals: np.ndarray, tie_margins: dict[str, float]) -> dict:
    """The entry of a case in evaluation.json. `intervals`: (3: mean, low, high; M)."""
    case, lora, base = results.cases[index], results.cases[index].lora, results.bases[index]
    default = None if results.default_base == base else results.default_base
    return {
        "name": case.name,
        "folder": case.folder,
        "lora_path": lora and lora.path,
        "lora_sha256": lora and lora.digest,
        "lora_scale": case.lora_scale,
        "guidance_scale": case.guidance_scale,
        "step": lora and lora.step,
        "means": {
            name: dict(zip(("mean", "low", "high"), interval, strict=True))
            for name, interval in zip(results.prompt_means, intervals.T.tolist(), strict=True)
        },
        "against_base": _differences(results, index, base, tie_margins) if lora else None,
        "against_default_base": (
            None if not lora or default is None else _differences(results, index, default, tie_margins)
        ),
    }


def _differences(results: Results, index: int, base: int, tie_margins: dict[str, float]) -> dict:
    """By measure: the difference of a case from one of the base model, with a bootstrap interval; for rewards
    also the wins, ties and losses by image."""
    means = np.stack([value[index] - value[base] for value in results.prompt_means.values()], axis=1)
    differences = {}
    for name, interval in zip(results.prompt_means, statistics.bootstrap(means).T.tolist(), strict=True):
        differences[name] = dict(zip(("difference", "low", "high"), interval, strict=True))
        if name in results.rewards:
            scores = results.scores[name]
            differences[name] |= statistics.outcomes(scores[index] - scores[base], tie_margins[name])
    return differences


def base_at(evaluation: dict, guidance_scale: float) -> dict:
    """The base model's case at a guidance."""
    bases = (case for case in evaluation["cases"] if case["lora_path"] is None)
    return next(case for case in bases if case["guidance_scale"] == guidance_scale)


def comparisons(evaluation: dict, index: int) -> list[tuple[dict, dict]]:
    """What the case at `index` is compared with, and the differences: the base model at the same guidance,
    then at its own default if that is another and the best are not compared with the best."""
    own = evaluation["cases"][index]
    found = [(base_at(evaluation, own["guidance_scale"]), own["against_base"])]
    if own.get("against_default_base") and not evaluation.get("best_against_best"):
        default = base_at(evaluation, evaluation["base_guidance_scale"])
        found.append((default, own["against_default_base"]))
    return found


def other_comparisons(evaluation: dict, index: int) -> list[tuple[dict, dict]]:
    """Those of `comparisons` that are not among `best_comparisons`, so that no table appears twice."""
    own = evaluation["cases"][index]
    best = [base for case, base, _ in best_comparisons(evaluation) if case is own]
    return [one for one in comparisons(evaluation, index) if not any(one[0] is base for base in best)]


def best_comparisons(evaluation: dict) -> list[tuple[dict, dict, dict]]:
    """The cases of each LoRA and of the base model at their best guidance, and the differences; [] without a
    sweep."""
    best, cases = evaluation.get("best_against_best"), evaluation["cases"]
    if not best:
        return []
    base = cases[best["base"]]
    return [(cases[own["case"]], base, own["against_best_base"]) for own in best["loras"]]


# ----------------------------------------------------------------------------------------------------- tables


def images_csv(results: Results) -> str:
    """CSV with the scores of each image."""
    columns = [value.ravel().tolist() for value in results.scores.values()]
    rows = [
        [s.case.name, s.prompt_index, s.image_index, s.seed, results.prompts[s.prompt_index], *scores]
        for s, scores in zip(results.samples, zip(*columns, strict=True), strict=True)
    ]
    return _csv(["case", "prompt_index", "image_index", "seed", "prompt", *results.scores], rows)


def prompts_csv(results: Results) -> str:
    """CSV with the means of each case and prompt, and for LoRAs their differences from the base model."""
    means = np.stack(list(results.prompt_means.values()), axis=-1)  # (C, P, M)
    rows = []
    for index, case in enumerate(results.cases):
        differences = means[index] - means[results.bases[index]]  # (P, M)
        for place, prompt in enumerate(results.prompts):
            against = differences[place].tolist() if case.lora else [""] * means.shape[-1]
            rows.append([case.name, place, prompt, *means[index, place].tolist(), *against])
    header = [*results.prompt_means, *(f"{name}_difference" for name in results.prompt_means)]
    return _csv(["case", "prompt_index", "prompt", *header], rows)


def _csv(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    content = io.StringIO()
    csv.writer(content, lineterminator="\n").writerows([map(cell, row) for row in (header, *rows)])
    return content.getvalue()


def cell(value: object) -> object:
    """A value for a table. Spreadsheets take text that begins like a formula for one, so it is given an
    apostrophe, as OWASP recommends."""
    is_formula = isinstance(value, str) and value.lstrip().startswith(("=", "+", "-", "@"))
    return f"'{value}" if is_formula else value

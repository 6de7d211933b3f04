"""Results of an evaluation: scores of all images, their comparison with the base model, CSV tables."""

import csv
import io
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

    @cached_property
    def bases(self) -> list[int]:
        """Index of the base model that each case is compared with, (C)."""
        return [base_index(case, self.cases) for case in self.cases]

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


def compare(results: Results, tie_margin: float) -> list[dict]:
    """For each case: means of all measures and differences from the base model, with bootstrap intervals;
    for rewards also the wins, ties and losses by image."""
    means = np.stack([value.T for value in results.prompt_means.values()], axis=1)  # (P, M measures, C)
    both = np.stack([means, means - means[:, :, results.bases]], axis=1)  # (P, 2, M, C)
    intervals = statistics.bootstrap(both)  # (3: mean, low, high; 2, M, C)
    return [
        _compare_case(results, index, intervals[..., index], tie_margin)
        for index in range(len(results.cases))
    ]


def _compare_case(results: Results, index: int, intervals: np.ndarray, tie_margin: float) -> dict:
    """The entry of a case in evaluation.json. `intervals`: (3: mean, low, high; 2: mean, difference; M)."""
    case, lora = results.cases[index], results.cases[index].lora
    means, against_base = {}, {}
    for place, name in enumerate(results.prompt_means):
        mean, difference = intervals[:, :, place].T.tolist()
        means[name] = dict(zip(("mean", "low", "high"), mean, strict=True))
        against_base[name] = dict(zip(("difference", "low", "high"), difference, strict=True))
        if name in results.rewards:
            scores = results.scores[name]
            difference = scores[index] - scores[results.bases[index]]
            against_base[name] |= statistics.outcomes(difference, tie_margin)
    return {
        "name": case.name,
        "lora_path": lora and lora.path,
        "lora_sha256": lora and lora.digest,
        "lora_scale": case.lora_scale,
        "guidance_scale": case.guidance_scale,
        "step": lora and lora.step,
        "means": means,
        "against_base": against_base if lora else None,
    }


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
    csv.writer(content, lineterminator="\n").writerows([header, *rows])
    return content.getvalue()

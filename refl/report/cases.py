"""Cases of an evaluation, the base model and each LoRA at each scale and guidance, and their images."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path

from refl.model.lora import LORA_FILE, lora_file, read_metadata
from refl.system.errors import UserError, is_first_process
from refl.system.images import read_image
from refl.system.options import check_number
from refl.system.text import printable

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Lora:
    """A LoRA to evaluate."""

    path: str
    name: str
    digest: str  # SHA-256 of the file
    step: int | None  # of training


@dataclass(frozen=True)
class Case:
    """A way to generate images: the base model, or a LoRA at a scale."""

    name: str
    folder: str  # below images/; names everything that the images depend on
    lora: Lora | None
    lora_scale: float
    guidance_scale: float


@dataclass(frozen=True)
class Sample:
    """One image of a case."""

    case: Case
    prompt_index: int
    image_index: int  # among the images of the prompt
    seed: int
    file: Path

    def read(self) -> Image.Image:
        """Read the image; raises `UserError` if the file is damaged."""
        try:
            return read_image(self.file).convert("RGB")
        except UserError as error:
            raise UserError(f"{error} Delete it; the same command generates it again.") from error


def find_loras(paths: Sequence[str]) -> list[Lora]:
    """Read the LoRAs and give them short names. Equal files count once: the last checkpoint of a run is often
    its result."""
    if not paths:
        raise UserError("--lora_paths is empty; name one LoRA or several.")
    files = [lora_file(path) for path in paths]
    locations = [Path(os.path.abspath(file.parent if file.name == LORA_FILE else file)) for file in files]
    common = os.path.commonpath([location.parent for location in locations])
    loras = {}
    for path, file, location in zip(paths, files, locations, strict=True):
        step = read_metadata(file).get("step")
        digest = sha256(file.read_bytes()).hexdigest()
        if digest not in loras:
            name = location.relative_to(common).as_posix()
            name = f"LoRA {name}" if name == "base" else name
            loras[digest] = Lora(path, name, digest, step if isinstance(step, int) else None)
        elif is_first_process():
            print(printable(f"note: {path} is the same LoRA as {loras[digest].path}; skipping it"))
    return list(loras.values())


def find_cases(
    loras: Sequence[Lora],
    lora_scale: float,
    guidance_scales: Sequence[float],
    base_guidance_scale: float | None = None,
    sweep_lora_scale: str | None = None,
    sweep_guidance: str | None = None,
) -> list[Case]:
    """List the base model at each guidance, then each LoRA at each scale and guidance.

    `guidance_scales` has the guidance of each LoRA; the base model is drawn at all of them and, if it is
    given, at `base_guidance_scale`. A sweep takes the place of `lora_scale` or `guidance_scales`. Scale 0 is
    the base model, so it adds no case. Raises `UserError` for sweeps that are not numbers, and if nothing is
    left to compare with the base model.
    """
    scales = _read_sweep("sweep_lora_scale", sweep_lora_scale) or [lora_scale]
    swept = _read_sweep("sweep_guidance", sweep_guidance)
    guidances = [swept or [guidance] for guidance in guidance_scales]  # of each LoRA
    of_base = set(chain(*guidances, [] if base_guidance_scale is None else [base_guidance_scale]))
    if not any(scales):
        raise UserError("--lora_scale 0 is the model without the LoRA: there is nothing to compare it with.")
    cases = []
    for lora, own in [(None, sorted(of_base)), *zip(loras, guidances, strict=True)]:
        for scale in filter(None, scales) if lora else [0.0]:
            name, folder = "base", "base"
            if lora:
                label = re.sub(r"[^\w.-]", "_", Path(lora.name).name)
                name, folder = lora.name, f"{label}-{lora.digest[:12]}_scale_{scale:.12g}"
            if lora and sweep_lora_scale:
                name += f" scale {scale:.12g}"
            for guidance in own:
                full_name = f"{name} guidance {guidance:.12g}" if len(of_base) > 1 else name
                cases.append(Case(full_name, f"{folder}_guidance_{guidance:.12g}", lora, scale, guidance))
    return cases


def _read_sweep(name: str, text: str | None) -> list[float]:
    """Parse the numbers of a sweep, sorted and without duplicates; [] for None."""
    if text is None:
        return []
    try:
        numbers = sorted({float(part) for part in text.split(",")})
    except ValueError as error:
        raise UserError(
            f"--{name} {text}: expected numbers separated by commas, such as 0.5,1,1.5."
        ) from error
    for number in numbers:
        check_number(name, number)
    return numbers


def base_index(guidance_scale: float, cases: Sequence[Case]) -> int:
    """Index of the base model at a guidance."""
    return next(i for i, case in enumerate(cases) if not case.lora and case.guidance_scale == guidance_scale)


def shown_index(cases: Sequence[Case], lora_scale: float, guidance_scale: float) -> int:
    """Index of the case that reports show first: the first LoRA, nearest to this scale and guidance."""
    first = next(case.lora for case in cases if case.lora)
    distance = {
        index: (abs(case.lora_scale - lora_scale), abs(case.guidance_scale - guidance_scale))
        for index, case in enumerate(cases)
        if case.lora == first
    }
    return min(distance, key=distance.get)


def list_samples(
    cases: Sequence[Case], num_prompts: int, num_images: int, seed: int, folder: Path
) -> list[Sample]:
    """List the images of all cases, ordered by case, prompt and image; `folder` holds one folder per case."""
    return [
        Sample(case, i, j, image_seed(seed, i, j), folder / case.folder / f"{i}_{j}.png")
        for case in cases
        for i in range(num_prompts)
        for j in range(num_images)
    ]


def image_seed(seed: int, prompt_index: int, image_index: int) -> int:
    """Seed of the noise of an image, the same in every case; `inference.py --seed` reproduces the noise."""
    return int(np.random.SeedSequence([seed, prompt_index, image_index]).generate_state(1)[0])

"""Settings that decide the images of an evaluation, kept in its output folder so that images of different
settings never mix."""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from refl.model.folder import resolution_of
from refl.system.errors import UserError
from refl.system.files import fingerprint

FILE = "settings.json"


def collect(
    model: str, sampler: str, num_inference_steps: int, resolution: int | None, dtype: str,
    lora_in_uncond: bool, seed: int, prompts: Sequence[str],
) -> dict:  # fmt: skip
    """Everything besides the LoRA, its scale and the guidance that the images depend on.

    The model is identified by the content of its files. Raises `OSError`.
    """
    weights = [
        file
        for part in ("scheduler", "text_encoder", "unet", "vae")
        for file in sorted(Path(model, part).iterdir())
        if file.is_file()
    ]
    return {
        "pretrained_model_name_or_path": model,
        "the model's files": fingerprint(weights),
        "sampler": sampler,
        "num_inference_steps": num_inference_steps,
        "resolution": resolution_of(model, resolution),
        "dtype": dtype,
        "lora_in_uncond": lora_in_uncond,
        "seed": seed,
        "prompts": list(prompts),
    }


def merge(folder: Path, settings: dict) -> dict:
    """Settings to keep in `folder`: `settings`, with the longer list of prompts of a previous evaluation.

    Raises `UserError` if the images in `folder` were generated with other settings. One of the two lists of
    prompts may continue the other.
    """
    file = folder / FILE
    if not file.exists():
        return settings
    try:
        previous = json.loads(file.read_text(encoding="utf-8"))
        changes = [
            f"--{name} was {previous[name]}, is now {value}"
            for name, value in settings.items()
            if name != "prompts" and previous[name] != value
        ]
        prompts = enumerate(zip(previous["prompts"], settings["prompts"], strict=False))
        changed_prompts = [
            f"prompt {index} was {before!r}, is now {now!r}"
            for index, (before, now) in prompts
            if before != now
        ]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); choose another --output_dir.") from error
    if changes := changes + changed_prompts[:1]:
        raise UserError(
            f"{folder} holds another evaluation: {'; '.join(changes)}. Choose another --output_dir."
        )
    return settings | {"prompts": max(settings["prompts"], previous["prompts"], key=len)}


def occasion() -> dict[str, str]:
    """Date and command of this process, for its report; the command repeats it from the same folder."""
    path = os.environ.get("PYTHONPATH")  # where the modules of rewards may be
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join([*([f"PYTHONPATH={path}"] if path else []), "python", *sys.argv]),
    }

"""Every check that can fail before anything is loaded. Each raises `UserError`; none imports torch or reads
weights."""

import json
import os
import tempfile
from pathlib import Path

from refl.errors import UserError

MODEL_PARTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
SOURCES = {
    "stable-diffusion-v1-4/": "CompVis/stable-diffusion-v1-4",
    "ImageReward.pt": "THUDM/ImageReward",
    "med_config.json": "THUDM/ImageReward",
    "bert-base-uncased/": "google-bert/bert-base-uncased",
}


def check_weights(model_folder: str | Path, reward_folder: str | Path | None) -> None:
    """All weights are there; what is missing is named at once, with its place and its source."""
    wanted = {Path(model_folder): (SOURCES["stable-diffusion-v1-4/"], "the folder in diffusers' layout")}
    if reward_folder is not None:
        wanted[Path(reward_folder) / "ImageReward.pt"] = (SOURCES["ImageReward.pt"], "the reward's weights")
        wanted[Path(reward_folder) / "med_config.json"] = (
            SOURCES["med_config.json"],
            "the reward's configuration",
        )
        wanted[Path(reward_folder) / "bert-base-uncased"] = (SOURCES["bert-base-uncased/"], "tokenizer files")
    missing = {path: source for path, source in wanted.items() if not path.exists()}
    if missing:
        lines = [
            f"  {path}  ({what}; on the Hugging Face Hub: {hub})" for path, (hub, what) in missing.items()
        ]
        raise UserError("weights are missing:\n" + "\n".join(lines) + "\nSee checkpoint/README.md.")


def check_model(folder: str | Path) -> None:
    """`folder` is a Stable Diffusion model in diffusers' layout: every part is there with its
    configuration."""
    folder = Path(folder)
    absent = [part for part in MODEL_PARTS if not (folder / part).is_dir()]
    if absent:
        raise UserError(
            f"{folder} is not a Stable Diffusion model in diffusers' layout: "
            f"it has no folder {', '.join(absent)}."
        )
    for part in ("unet", "vae", "text_encoder"):
        read_config(folder, part)
        weights = [file for file in (folder / part).iterdir() if file.suffix in (".safetensors", ".bin")]
        if not weights:
            raise UserError(f"{folder / part} holds no weights (.safetensors or .bin).")


def read_config(folder: str | Path, part: str) -> dict:
    """`folder`/`part`/config.json."""
    path = Path(folder) / part / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a configuration: expected an object.")
    return config


def resolution_of(folder: str | Path, resolution: int | None) -> int:
    """Pixels a side: as asked, or the model's own. Raises if the UNet cannot halve the latents as often as it
    must."""
    unet, vae = read_config(folder, "unet"), read_config(folder, "vae")
    try:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        multiple = factor * 2 ** (len(unet["block_out_channels"]) - 1)
        resolution = resolution or unet["sample_size"] * factor
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: the configuration of unet or vae is not one of Stable Diffusion ({error})."
        ) from error
    if resolution <= 0 or resolution % multiple:
        lower = max(multiple, resolution // multiple * multiple)
        raise UserError(
            f"--resolution {resolution}: this model takes multiples of {multiple} pixels, such as {lower} or "
            f"{lower + multiple}."
        )
    return resolution


def check_output_folder(folder: str | Path) -> None:
    """`folder` exists or can be made, and a file can be written in it."""
    folder = Path(folder)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise UserError(f"{folder} cannot be used for output: {existing} is not a folder.")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror} ({existing}).") from error

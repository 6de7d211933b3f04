"""Every check that can fail before anything is loaded. Each raises `UserError`; none imports torch or reads
weights."""

import json
import os
import tempfile
from pathlib import Path

from refl.errors import UserError

MODEL_PARTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")


def check_weights(model_folder: str | Path, reward_folder: str | Path | None) -> None:
    """All weights are there; what is missing is named at once, with its place and its source.

    `reward_folder` is ImageReward's, None where it is not used.
    """
    model = Path(model_folder)
    wanted = {path: "CompVis/stable-diffusion-v1-4" for path in [model / part for part in MODEL_PARTS]}
    if not model.exists():
        wanted = {model: "CompVis/stable-diffusion-v1-4"}
    if reward_folder is not None:
        wanted |= _reward_files(Path(reward_folder))
    _require(wanted)


def check_reward(folder: str | Path) -> None:
    """ImageReward's files are there."""
    _require(_reward_files(Path(folder)))


def _reward_files(folder: Path) -> dict[Path, str]:
    weights = folder / "ImageReward.pt"
    if folder.suffix in (".pt", ".safetensors"):
        weights, folder = folder, folder.parent
    elif not weights.exists() and weights.with_suffix(".safetensors").exists():
        weights = weights.with_suffix(".safetensors")
    tokenizer = folder / "bert-base-uncased"
    return {
        weights: "THUDM/ImageReward",
        folder / "med_config.json": "THUDM/ImageReward",
        tokenizer / "vocab.txt" if tokenizer.exists() else tokenizer: "google-bert/bert-base-uncased",
    }


def _require(wanted: dict[Path, str]) -> None:
    missing = [
        f"  {path}  (on the Hugging Face Hub: {hub})" for path, hub in wanted.items() if not path.exists()
    ]
    if missing:
        raise UserError("weights are missing:\n" + "\n".join(missing) + "\nSee checkpoint/README.md.")


def check_model(folder: str | Path, num_inference_steps: int) -> None:
    """`folder` holds a text-to-image model in diffusers' layout that can denoise in so many steps."""
    folder = Path(folder)
    unet, vae, text_encoder = (read_config(folder, part) for part in ("unet", "vae", "text_encoder"))
    for part in ("unet", "vae", "text_encoder"):
        if not any(file.suffix in (".safetensors", ".bin") for file in (folder / part).iterdir()):
            raise UserError(f"{folder / part} holds no weights (.safetensors or .bin).")
    channels = (unet.get("in_channels", 4), vae.get("latent_channels", 4))
    widths = (unet.get("cross_attention_dim"), text_encoder.get("hidden_size"))
    if channels[0] != channels[1] or widths[0] != widths[1]:
        raise UserError(
            f"{folder} is not a text-to-image model like Stable Diffusion 1: the UNet takes "
            f"{channels[0]} channels and text of width {widths[0]}, VAE and text encoder give "
            f"{channels[1]} and {widths[1]}."
        )
    timesteps = read_config(folder, "scheduler", "scheduler_config.json").get("num_train_timesteps", 1000)
    if num_inference_steps > timesteps:
        raise UserError(f"--num_inference_steps {num_inference_steps}: this model has {timesteps} timesteps.")


def read_config(folder: str | Path, part: str, name: str = "config.json") -> dict:
    """`folder`/`part`/`name`, an object in JSON."""
    path = Path(folder) / part / name
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
        resolution = unet["sample_size"] * factor if resolution is None else resolution
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

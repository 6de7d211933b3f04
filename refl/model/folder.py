"""Check a model's folder in diffusers' layout by its configurations and file headers, without its weights."""

import math
from pathlib import Path
from typing import Annotated, Literal

from refl.system.errors import UserError
from refl.system.files import require
from refl.system.reading import Count, Natural, Positive, check_folder, exists, read_object
from refl.system.weights import open_safetensors

from pydantic import Field

_UNET = tuple(
    f"diffusion_pytorch_model{ending}" for ending in (".safetensors", ".bin", ".safetensors.index.json")
)
_CLIP = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")
# The files that are loaded, in order of preference; variants such as fp16 are not.
WEIGHT_FILES = {"unet": _UNET, "vae": _UNET, "text_encoder": _CLIP}
MODEL_PARTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
CONFIGS = {  # that are not PART/config.json
    "scheduler": "scheduler/scheduler_config.json",
    "tiny_decoder": "config.json",
}
_BLOCKS = {
    "act_fn": str,
    "block_out_channels": list[Count],
    "in_channels": Count,
    "layers_per_block": Count | list[Count],
    "norm_num_groups": Count | None,
    "out_channels": Count,
}
# Types of the entries of configurations that the libraries compute with.
TYPES = {
    "unet": _BLOCKS
    | {
        "attention_head_dim": Count | list[Count],
        "center_input_sample": bool,
        "cross_attention_dim": Count | list[Count],
        "downsample_padding": Natural,
        "dropout": float,
        "flip_sin_to_cos": bool,
        "freq_shift": float,
        "mid_block_scale_factor": float,
        "norm_eps": Positive,
        "sample_size": Count,
    },
    "vae": _BLOCKS | {"latent_channels": Count, "scaling_factor": Positive},
    "text_encoder": {
        "hidden_act": str,
        "hidden_size": Count,
        "intermediate_size": Count,
        "layer_norm_eps": Positive,
        "max_position_embeddings": Count,
        "num_attention_heads": Count,
        "num_hidden_layers": Count,
        "vocab_size": Count,
    },
    "scheduler": {
        "beta_end": Positive,
        "beta_schedule": Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"],
        "beta_start": Positive,
        "clip_sample": bool,
        "num_train_timesteps": Annotated[Count, Field(le=100_000)],
        "prediction_type": Literal["epsilon", "sample", "v_prediction"],
        "rescale_betas_zero_snr": bool,
        "set_alpha_to_one": bool,
        "skip_prk_steps": bool,
        "steps_offset": Natural,
        "timestep_spacing": Literal["leading", "linspace", "trailing"],
        "trained_betas": list[Positive] | None,
    },
    "tiny_decoder": {
        "_class_name": str,
        "act_fn": str,
        "latent_channels": Count,
        "num_decoder_blocks": list[Count],
        "scaling_factor": Positive,
        "upsampling_scaling_factor": Count,
    },
}


def required_files(folder: str | Path) -> dict[Path, str]:
    """Each file or folder that a model needs, and where it is published; the folder alone if it is
    missing."""
    folder = Path(folder)
    paths = [folder / part for part in MODEL_PARTS] if exists(folder) else [folder]
    return dict.fromkeys(paths, "CompVis/stable-diffusion-v1-4")


def part_files(folder: str | Path, part: str) -> list[Path]:
    """The files of a part of a model that are loaded: its configuration and the preferred weights."""
    part_folder = Path(folder) / part
    files = sorted(file for file in part_folder.iterdir() if file.suffix in (".json", ".txt"))
    weights = next((part_folder / n for n in WEIGHT_FILES.get(part, ()) if (part_folder / n).exists()), None)
    if weights is None or weights.suffix == ".json":  # an index of weights in several files
        return files + sorted(part_folder.glob("*-of-*.safetensors"))
    return [*files, weights]


def check_model(folder: str | Path, num_inference_steps: int) -> None:
    """Raise `UserError` unless `folder` is a text-to-image model that can denoise in
    `num_inference_steps`."""
    folder = Path(folder)
    for part in MODEL_PARTS:
        check_folder(folder / part)
    unet, vae, text_encoder = (read_config(folder, part) for part in ("unet", "vae", "text_encoder"))
    for part, names in WEIGHT_FILES.items():
        if not any(exists(folder / part / name) for name in names):
            raise UserError(f"{folder / part} holds no weights: {names[0]} or {names[1]}.")
    channels = (unet.get("in_channels", 4), vae.get("latent_channels", 4))
    widths = (unet.get("cross_attention_dim"), text_encoder.get("hidden_size"))
    if channels[0] != channels[1] or widths[0] != widths[1]:
        raise UserError(
            f"{folder} is not a text-to-image model like Stable Diffusion 1: the UNet takes "
            f"{channels[0]} channels and text of width {widths[0]}, VAE and text encoder give "
            f"{channels[1]} and {widths[1]}."
        )
    timesteps = read_config(folder, "scheduler").get("num_train_timesteps", 1000)
    if num_inference_steps > timesteps:
        raise UserError(f"--num_inference_steps {num_inference_steps}: this model has {timesteps} timesteps.")


def read_config(folder: str | Path, part: str) -> dict:
    """Read the configuration of a part of a model, one of `TYPES`. Raises `UserError`."""
    return read_object(Path(folder, CONFIGS.get(part, f"{part}/config.json")), TYPES[part])


def resolution_of(folder: str | Path, resolution: int | None) -> int:
    """Pixels per side: as given, or the model's own. Raises `UserError` if the UNet cannot downsample
    them."""
    unet = read_config(folder, "unet")
    try:
        factor = vae_factor_of(folder)
        multiple = factor * 2 ** (len(unet["block_out_channels"]) - 1)
        resolution = int(unet["sample_size"]) * factor if resolution is None else resolution
    except (KeyError, TypeError, ValueError) as error:
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


def vae_factor_of(folder: str | Path) -> int:
    """Image pixels per latent pixel, by the VAE's configuration."""
    return 2 ** (len(read_config(folder, "vae")["block_out_channels"]) - 1)


def check_decode_resolution(folder: str | Path, resolution: int, decode_resolution: int) -> None:
    """Raise `UserError` unless the VAE can decode at `decode_resolution`, and it is not the larger one."""
    factor = vae_factor_of(folder)
    if decode_resolution % factor or not factor <= decode_resolution <= resolution:
        raise UserError(
            f"--decode_resolution {decode_resolution}: must be a multiple of {factor} pixels, and at most "
            f"{resolution}, the images' own."
        )


def check_tiny_decoder(folder: str | Path, model: str | Path) -> None:
    """Raise `UserError` unless `folder` holds a small decoder for the latents of `model`."""
    files = (Path(folder) / name for name in ("config.json", _UNET[0]))
    require(dict.fromkeys(files, "madebyollin/taesd"))
    config, needed = read_config(folder, "tiny_decoder"), read_config(model, "vae").get("latent_channels", 4)
    channels, kind = config.get("latent_channels", 4), config.get("_class_name")
    upsamplings = len(config.get("num_decoder_blocks", (3, 3, 3, 1))) - 1
    factor = config.get("upsampling_scaling_factor", 2) ** upsamplings
    if (kind, channels, factor) != ("AutoencoderTiny", needed, vae_factor_of(model)):
        raise UserError(
            f"--tiny_decoder_path {folder}: must be an AutoencoderTiny of {needed} channels for images "
            f"{vae_factor_of(model)} times as wide; this is {kind}, {channels} channels, {factor} times."
        )


def count_weights(file: Path) -> int:
    """Number of weights in a .safetensors file, by its header; raises `UserError` for an incomplete file."""
    with open_safetensors(file) as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118

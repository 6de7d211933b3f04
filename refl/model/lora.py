"""LoRA (Hu et al. 2021): add to a UNet, pack, unpack, convert; files and their metadata."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from refl.system.errors import UserError
from refl.system.options import MAX_FLOAT
from refl.system.reading import (
    Count,
    Natural,
    Positive,
    check_file,
    check_types,
    exists,
    is_folder,
    parse_json,
)
from refl.system.weights import check_finite, open_safetensors, read_safetensors

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")  # self and cross attention
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name by which diffusers finds it in a folder
KOHYA_FILE = "kohya_lora.safetensors"
METADATA_KEY = "refl"  # our entry of the file's metadata, JSON
# What the file tells of peft's configuration. peft up to 0.20 refuses a file that names a setting of a later
# version, and diffusers 0.35 one without rank_pattern.
ADAPTER_SETTINGS = (
    "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "lora_bias", "use_dora", "bias",
)  # fmt: skip
_Scale = Annotated[float, Field(ge=-MAX_FLOAT, le=MAX_FLOAT)]
# Types of that entry's values.
METADATA = {
    "base_model": str,
    "draw_guidance_scale": _Scale,
    "guidance_in": str,
    "guidance_scale": _Scale,
    "lora_alpha": Positive,
    "lora_in_uncond": bool,
    "num_inference_steps": Count,
    "rank": Count,
    "resolution": Count,
    "reward": str,
    "sampler": Literal["pndm", "ddim", "ddpm", "euler", "euler_a", "dpm++"],
    "step": Natural,
}
# And of peft's, in the metadata of diffusers. Names of layers are regular expressions to peft, so that others
# than plain ones could keep it busy for ever.
_Layer = Annotated[str, Field(pattern=r"^[\w.^$\\-]*$", max_length=200)]
ADAPTER_TYPES = {
    "alpha_pattern": dict[_Layer, Positive] | None,
    "lora_alpha": Positive,
    "r": Count,
    "rank_pattern": dict[_Layer, Count] | None,
    "target_modules": _Layer | list[_Layer] | None,
}
MATRICES = {  # parts of the names of the two matrices of a layer
    "lora.down.": "lora.up.", "lora.up.": "lora.down.",
    "lora_A.": "lora_B.", "lora_B.": "lora_A.",
    "lora_down.": "lora_up.", "lora_up.": "lora_down.",
}  # fmt: skip


def add_lora(
    unet: UNet2DConditionModel,
    rank: int,
    alpha: float,
    seed: int,
    targets: Sequence[str] = ATTENTION_LAYERS,
) -> list[torch.nn.Parameter]:
    """Add a LoRA (Hu et al. 2021), initially zero, to the layers whose names end in one of `targets`.

    Returns its matrices, float32 and trainable.
    """
    torch.manual_seed(seed)
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets))
    )
    cast_training_params(unet, torch.float32)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def pack_lora(unet: UNet2DConditionModel, metadata: dict) -> bytes:
    """The LoRA as a safetensors file in diffusers' format; equal LoRAs give equal bytes.

    The file also contains `metadata`, and what diffusers needs to restore rank and alpha.
    """
    settings = unet.peft_config["default"].to_dict()
    adapter = {f"unet.{key}": settings[key] for key in ADAPTER_SETTINGS}
    about = {
        LORA_ADAPTER_METADATA_KEY: json.dumps(adapter, sort_keys=True, default=sorted),
        METADATA_KEY: json.dumps(metadata, sort_keys=True),
    }
    return _pack(_lora_weights(unet), about)


def export_lora(content: bytes) -> bytes:
    """Convert a file from `pack_lora`, also of an earlier version, to one that every diffusers from 0.32 on
    applies alike: B is multiplied by alpha / rank, and alpha becomes the rank.

    diffusers before 0.35 ignores the alpha in the metadata. A run's result is written in this form; its
    checkpoints keep the matrices as trained, since the product is rounded unless alpha / rank is a power of
    two, and resuming must be exact.
    """
    about, adapter = _read_about(content)
    ratio = adapter["unet.lora_alpha"] / adapter["unet.r"]
    adapter = {key: value for key, value in adapter.items() if key.partition(".")[2] in ADAPTER_SETTINGS}
    adapter["unet.lora_alpha"] = adapter["unet.r"]
    about[LORA_ADAPTER_METADATA_KEY] = json.dumps(adapter, sort_keys=True)
    weights = {key: value * ratio if ".lora.up." in key else value for key, value in load(content).items()}
    return _pack(weights, about)


def to_kohya(content: bytes, name: str) -> bytes:
    """Convert a file from `pack_lora` or `export_lora` to kohya's format, for ComfyUI, A1111 and Forge, which
    show `name`."""
    about, adapter = _read_about(content)
    rank, alpha = adapter["unet.r"], float(adapter["unet.lora_alpha"])
    names = {".lora.down.": ".lora_A.", ".lora.up.": ".lora_B."}  # as the converter expects
    weights = load(content)
    for theirs, peft in names.items():
        weights = {key.replace(theirs, peft): value for key, value in weights.items()}
    weights = convert_state_dict_to_kohya(weights)
    for key in weights:
        if key.endswith(".alpha"):  # the converter writes the rank
            weights[key] = torch.tensor(alpha)
    about = {
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "ss_base_model_version": "sd_v1",
        "ss_network_alpha": str(alpha),
        "ss_network_dim": str(rank),
        "ss_network_module": "networks.lora",
        "ss_output_name": name,
        METADATA_KEY: about[METADATA_KEY],
    }
    return _pack(weights, about)


def _read_about(content: bytes) -> tuple[dict[str, str], dict]:
    """The metadata of a file from `pack_lora`, and peft's settings, which are a part of it."""
    length = int.from_bytes(content[:8], "little")
    about = json.loads(content[8 : 8 + length])["__metadata__"]
    return about, json.loads(about[LORA_ADAPTER_METADATA_KEY])


def _pack(weights: dict[str, Tensor], about: dict[str, str]) -> bytes:
    tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    content = save(tensors, metadata={"format": "pt"} | about)
    # safetensors writes the metadata in random order; sorted here, so that equal LoRAs give equal bytes.
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


@torch.no_grad()
def unpack_lora(unet: UNet2DConditionModel, content: bytes) -> None:
    """Copy the values of a `pack_lora` file into the LoRA of `unet`; raises `UserError` if they do not
    fit."""
    saved, weights = _load(content), _lora_weights(unet)
    if {key: value.shape for key, value in saved.items()} != {key: w.shape for key, w in weights.items()}:
        raise UserError("the checkpoint's LoRA was trained for another model; choose another --output_dir.")
    for key, value in weights.items():
        value.copy_(saved[key])


def check_packed(content: bytes) -> None:
    """Raise `UserError` unless `content` is a file from `pack_lora`."""
    _load(content)
    try:
        about = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        is_ours = METADATA_KEY in about
    except (ValueError, LookupError, TypeError, RecursionError):
        is_ours = False
    if not is_ours:
        raise UserError("the checkpoint's LoRA has no settings of a training in its metadata.")


def _load(content: bytes) -> dict[str, Tensor]:
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"the checkpoint's LoRA is not a safetensors file ({error}).") from error


def _lora_weights(unet: UNet2DConditionModel) -> dict[str, Tensor]:  # not copies
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    return {f"unet.{key}": value for key, value in weights.items()}


def lora_file(path: str | Path) -> Path:
    """The file of a LoRA, given itself or its folder; raises `UserError` if it cannot be read or has another
    kind of name."""
    path = Path(path)
    file = path / LORA_FILE if is_folder(path) else path
    if not exists(file):
        others = sorted(other.name for other in path.glob("*.safetensors"))
        hint = f" {path} holds {', '.join(others[:3])}: name the file itself." if others else ""
        raise UserError(f"no LoRA at {file}. Train one (bash train_refl_lora.sh), or name another.{hint}")
    if file.suffix != ".safetensors":
        raise UserError(
            f"{file} is not called .safetensors. Convert pickles (.bin, .pt, .ckpt), which can run code and "
            "are not read; rename a safetensors file."
        )
    return check_file(file)


def read_metadata(path: str | Path) -> dict:
    """The metadata that `pack_lora` wrote; {} for a LoRA from elsewhere. Raises `UserError`."""
    file = lora_file(path)
    with open_safetensors(file) as tensors:
        content = (tensors.metadata() or {}).get(METADATA_KEY, "{}")
    place = f"{file}, metadata {METADATA_KEY}"
    return check_types(parse_json(content, place), METADATA, place, "Training writes them anew.")


def check_lora_file(file: Path) -> None:
    """Raise `UserError` unless `file` is a LoRA in safetensors: pairs of matrices of finite numbers, and
    metadata that diffusers and peft understand."""
    weights, about = read_safetensors(file)
    advice = "Get this LoRA again from its source, or train it again."
    if not weights:
        raise UserError(f"{file} is empty. {advice}")
    check_finite(weights, file, advice)
    for name, value in weights.items():
        for one, other in MATRICES.items():
            if one in name and name.replace(one, other) not in weights:
                raise UserError(f"{file} is not complete: {name} has no partner. {advice}")
        if any(part in name for part in MATRICES) and value.ndim not in (2, 4):
            raise UserError(f"{file}: {name} is not a matrix. {advice}")
    if LORA_ADAPTER_METADATA_KEY in about:
        place = f"{file}, metadata {LORA_ADAPTER_METADATA_KEY}"
        adapter = parse_json(about[LORA_ADAPTER_METADATA_KEY], place)
        check_types(adapter, {}, place, advice)
        types = {key: ADAPTER_TYPES.get(key.rpartition(".")[2], Any) for key in adapter}
        check_types(adapter, types, place, advice)


def guidance_of(metadata: dict, in_training: bool = False) -> float | None:
    """The guidance to draw with, or that of the training; None for a LoRA from elsewhere."""
    scale = None if in_training else metadata.get("draw_guidance_scale")
    scale = metadata.get("guidance_scale") if scale is None else scale
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool) and math.isfinite(scale)
    return float(scale) if is_number else None

"""Check that a LoRA of any origin is applied wholly; name its kind, or what does not fit, if it is not."""

import re
from collections import Counter
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from refl.system.errors import UserError

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn

SUPPORTED = (
    "Supported are LoRAs of Stable Diffusion 1, of linear layers and convolutions, in diffusers' or kohya's "
    "format."
)
KINDS = {  # by what is found in its keys
    r"dora_scale|lora_magnitude_vector": "a DoRA",
    r"\.hada_": "a LyCORIS file (LoHa)",
    r"\.lokr_": "a LyCORIS file (LoKr)",
    r"\.b?oft_|\.[ab][12]\.weight|\.on_input": "a LyCORIS file (OFT, GLoRA or (IA)^3)",
    r"lora_mid": "a LyCORIS file (with Tucker decomposition)",
    r"\.diff(_b)?$": "a file of whole weights' differences",
    r"^base_model\.model\.": "in peft's own format (save it by save_lora_weights of diffusers)",
    r"lora_te[23]_|text_encoder_[23]|lora_unet_(input|output)_blocks": "a LoRA of another model (SDXL)",
    r"^(lora_)?transformer[._]|double_blocks|joint_blocks": "a LoRA of another model (a transformer)",
}


def check_kind(file: Path) -> None:
    """Raise `UserError` that names the kind of a file which is none of `SUPPORTED`."""
    keys = _keys(file)
    for pattern, kind in KINDS.items():
        if found := [key for key in keys if re.search(pattern, key)]:
            raise UserError(
                f"{file} is {kind}, which is not supported: {len(found)} of its {len(keys)} tensors cannot "
                f"be applied, such as {found[0]}. {SUPPORTED}"
            )
    if not any("lora" in key for key in keys):
        example = f", but {keys[0]} and {len(keys) - 1} others" if keys else ""
        raise UserError(f"{file} is not a LoRA: it holds no matrices of one{example}. {SUPPORTED}")


def check_applied(file: Path, models: Iterable[nn.Module]) -> None:
    """Raise `UserError` unless the matrices and alphas of `file` are those that `models` have now.

    Compares values, so it needs to know nothing of the file's names.
    """
    adapters = [
        (name, matrix.data)
        for model in models
        for name, matrix in model.named_parameters()
        if ".lora_" in name or "lora_magnitude" in name
    ]
    dtype = adapters[0][1].dtype if adapters else torch.float32
    in_file, alphas = [], Counter()
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            value = tensors.get_tensor(key)
            if key.endswith(".alpha"):
                alphas[value.item()] += 1
            else:
                in_file.append((key, value.to(dtype)))
    faults = []
    if missing := _difference(in_file, adapters):
        faults.append(f"{len(missing)} of its {len(in_file)} matrices fit no layer, such as {missing[0]}")
    if strange := _difference(adapters, in_file):
        faults.append(f"{len(strange)} of {len(adapters)} matrices are not in the file, such as {strange[0]}")
    if faults:
        raise UserError(f"{file} does not fit this model: {', and '.join(faults)}. {SUPPORTED}")
    layers = (module for model in models for module in model.modules() if isinstance(module, BaseTunerLayer))
    applied = Counter(alpha for layer in layers for alpha in layer.lora_alpha.values())
    if alphas and alphas != applied:
        raise UserError(
            f"{file} does not fit this model: it has {alphas.total()} alphas for {applied.total()} layers, "
            "or others than those that were applied."
        )


def _keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _difference(first: list[tuple[str, Tensor]], second: list[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors of `first` whose values are not among those of `second`."""
    left, found = Counter(_digest(value) for _, value in second), []
    for name, value in first:
        digest = _digest(value)
        if not left[digest]:
            found.append(name)
        left[digest] -= bool(left[digest])
    return found


def _digest(value: Tensor) -> tuple[torch.Size, bytes]:
    if value.is_meta:  # a layer of the model for which the file had nothing
        return value.shape, b""
    content = value.detach().cpu().contiguous().view(torch.uint8).numpy()
    return value.shape, sha256(content).digest()

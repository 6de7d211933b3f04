"""Merge a LoRA into a copy of its model, for programs that cannot load LoRAs.

python -m refl merge --lora_path checkpoint/refl_lora --output_dir checkpoint/merged
python -m refl merge --lora_scale 0.5 --output_dir checkpoint/half_merged
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from refl.model.folder import check_model, required_files
from refl.model.pipeline import load_lora, load_pipeline
from refl.system.errors import UserError
from refl.system.files import check_output_folder, require
from refl.system.options import read as read_options
from refl.system.weights import check_finite, open_safetensors

import torch


@dataclass
class Options:
    """Write a copy of a model with a LoRA merged into it."""

    pretrained_model_name_or_path: str = "checkpoint/stable-diffusion-v1-4"
    """Folder of the model, in diffusers' layout."""
    lora_path: str = "checkpoint/refl_lora"
    """A LoRA for this model, file or folder, in diffusers' or kohya's format."""
    lora_scale: float = 1.0
    """Factor on the LoRA."""
    output_dir: str = "checkpoint/merged"
    """A new folder. It appears once it is complete."""


def merge(options: Options) -> Path:
    """Write the folder and return it. The UNet keeps the precision of the model's. Raises `UserError`."""
    source, output = Path(options.pretrained_model_name_or_path), Path(options.output_dir)
    require(required_files(source))
    check_model(source, 1)
    if os.path.lexists(output):
        raise UserError(f"--output_dir {output} exists; name a new folder.")
    check_output_folder(output)
    pipeline = load_pipeline(source, "ddpm", torch.float32, "cpu")
    load_lora(pipeline, options.lora_path, 1.0)
    pipeline.fuse_lora(lora_scale=options.lora_scale)
    pipeline.unload_lora_weights()
    unet = pipeline.unet.to(dtype=_dtype(source / "unet"), memory_format=torch.contiguous_format)
    check_finite(unet.state_dict(), "the merged UNet", "Try a lower --lora_scale.")

    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        is_weight = shutil.ignore_patterns("diffusion_pytorch_model*")
        shutil.copytree(source, partial, ignore=lambda folder, names: (
            is_weight(folder, names) if Path(folder) == source / "unet" else set()
        ))  # fmt: skip
        unet.save_pretrained(partial / "unet")
        partial.rename(output)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{output} cannot be written: {error}.") from error
    return output


def _dtype(folder: Path) -> torch.dtype:
    """Precision of the weights in a folder; float32 if they are not safetensors."""
    whole, parts = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*.safetensors"
    for file in (*folder.glob(whole), *folder.glob(parts)):
        with open_safetensors(file) as tensors:
            return tensors.get_tensor(next(iter(tensors.keys()))).dtype
    return torch.float32


def main() -> None:
    """Merge by the options of the command line."""
    options = read_options(Options, prog="python -m refl merge")
    print(f"{options.lora_path} x {options.lora_scale:g} merged into {merge(options)}")

"""Merge a LoRA into a copy of its model, for programs that cannot load LoRAs.

python -m refl merge --lora_path checkpoint/refl_lora --output_dir checkpoint/merged
python -m refl merge --lora_scale 0.5 --output_dir checkpoint/half_merged
"""

import fnmatch
import shutil
from dataclasses import dataclass
from pathlib import Path

from refl.model.folder import check_model, required_files
from refl.model.pipeline import load_lora, load_pipeline
from refl.system.files import require
from refl.system.options import read as read_options
from refl.system.ownership import check_new_folder, check_place, new_folder
from refl.system.weights import check_finite, open_safetensors

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from transformers import CLIPTextModel


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
    """Write the folder and return it. UNet and text encoder keep their precision. Raises `UserError`."""
    source, output = Path(options.pretrained_model_name_or_path), Path(options.output_dir)
    require(required_files(source))
    check_model(source, 1)
    check_place(output, {"--pretrained_model_name_or_path": source}, {})
    check_new_folder(output)
    pipeline = load_pipeline(source, "ddpm", torch.float32, "cpu")
    load_lora(pipeline, options.lora_path, 1.0)
    has_text_part = any(isinstance(module, BaseTunerLayer) for module in pipeline.text_encoder.modules())
    pipeline.fuse_lora(components=["unet", "text_encoder"], lora_scale=options.lora_scale)
    pipeline.unload_lora_weights()
    unet = pipeline.unet.to(dtype=_dtype(source / "unet"), memory_format=torch.contiguous_format)
    check_finite(unet.state_dict(), "the merged UNet", "Try a lower --lora_scale.")
    replaced = {source / "unet": "diffusion_pytorch_model*"}  # files that are not copied
    if has_text_part:
        replaced[source / "text_encoder"] = "*model*.[sb]*"  # .safetensors and its index, .bin

    with new_folder(output) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True, ignore=lambda folder, names: (
            fnmatch.filter(names, replaced.get(Path(folder), ""))
        ))  # fmt: skip
        unet.save_pretrained(partial / "unet")
        if has_text_part:
            text_encoder = pipeline.text_encoder.to(_dtype(source / "text_encoder"))
            _save_text_encoder(text_encoder, partial / "text_encoder")
    return output


def _save_text_encoder(text_encoder: CLIPTextModel, folder: Path) -> None:
    """Write the weights by the names that Stable Diffusion's have, from which transformers 5 drops the first
    part and earlier versions and other programs do not."""
    weights = {
        f"text_model.{name.removeprefix('text_model.')}": value.contiguous()
        for name, value in text_encoder.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _dtype(folder: Path) -> torch.dtype:
    """Precision of the weights in a folder; float32 if they are not safetensors."""
    for file in sorted(folder.glob("*model.safetensors")) + sorted(folder.glob("*model-*.safetensors")):
        with open_safetensors(file) as tensors:
            return tensors.get_tensor(next(iter(tensors.keys()))).dtype
    return torch.float32


def main() -> None:
    """Merge by the options of the command line."""
    options = read_options(Options, prog="python -m refl merge")
    print(f"{options.lora_path} x {options.lora_scale:g} merged into {merge(options)}")

"""Model families: a folder in diffusers' layout becomes an object that encodes, denoises and decodes.

Add one: write a class like `StableDiffusion` and its loaders in a new file, and name them in `FAMILIES` by
the pipeline class of the folder's model_index.json.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from refl.model.stable_diffusion import StableDiffusion, load_empty_stable_diffusion, load_stable_diffusion
from refl.system.errors import UserError
from refl.system.reading import exists, read_object

import torch

Family = StableDiffusion  # the interface: every family has these attributes and methods


@dataclass(frozen=True)
class FamilySpec:
    """How to load a family's models."""

    load: Callable[[str | Path, torch.dtype, str | torch.device], Family]
    """(folder, dtype, device) -> the model, frozen. Raises `UserError`."""
    load_empty: Callable[[str | Path], Family]
    """(folder) -> UNet and VAE on the meta device, for counting memory. Raises `UserError`."""


FAMILIES = {"StableDiffusionPipeline": FamilySpec(load_stable_diffusion, load_empty_stable_diffusion)}


def find(folder: str | Path) -> FamilySpec:
    """The family named in the folder's model_index.json; Stable Diffusion without that file.

    Raises `UserError` for a family that is not supported.
    """
    index = Path(folder) / "model_index.json"
    if not exists(index):
        return FAMILIES["StableDiffusionPipeline"]
    name = read_object(index, {"_class_name": str}).get("_class_name")
    if name not in FAMILIES:
        raise UserError(f"{index}: {name} is not supported; supported: {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def load(folder: str | Path, dtype: torch.dtype, device: str | torch.device) -> Family:
    """Load the model in `folder`, frozen, in `dtype`. Raises `UserError`."""
    return find(folder).load(folder, dtype, device)

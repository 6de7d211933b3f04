"""Model families: a folder in diffusers' layout becomes an object that encodes, denoises and decodes.

Add one: write a class like `StableDiffusion` and its loader in a new file, and name the loader in `FAMILIES`
by the pipeline class of the folder's model_index.json.
"""

import json
from collections.abc import Callable
from pathlib import Path

from refl.model.stable_diffusion import StableDiffusion, load_stable_diffusion
from refl.system.errors import UserError

import torch

Family = StableDiffusion  # the interface: every family has these attributes and methods
FamilyLoader = Callable[[str | Path, torch.dtype, str | torch.device], Family]  # (folder, dtype, device)

FAMILIES: dict[str, FamilyLoader] = {"StableDiffusionPipeline": load_stable_diffusion}


def load(folder: str | Path, dtype: torch.dtype, device: str | torch.device) -> Family:
    """Load the model in `folder`, frozen, in `dtype`; without a model_index.json, Stable Diffusion.

    Raises `UserError`, also for a family that is not supported.
    """
    index = Path(folder) / "model_index.json"
    if not index.exists():
        return load_stable_diffusion(folder, dtype, device)
    try:
        name = json.loads(index.read_bytes())["_class_name"]
        loader = FAMILIES[name]
    except KeyError as error:
        raise UserError(f"{index}: {error} is not supported; supported: {', '.join(FAMILIES)}.") from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{index} cannot be read ({error}). Copy it again from its source.") from error
    return loader(folder, dtype, device)

"""A small decoder, such as TAESD, that stands in for the VAE's while the gradient is taken.

diffusers' AutoencoderTiny, distilled from the VAE whose latents it decodes; for SD-1.4 it is published as
madebyollin/taesd.
"""

from pathlib import Path

from refl.model.folder import read_config
from refl.system.errors import UserError

import torch
from diffusers import AutoencoderTiny


def load_tiny_decoder(folder: str | Path, dtype: torch.dtype, device: str | torch.device) -> AutoencoderTiny:
    """Load the decoder in `folder`, frozen, in `dtype`. Raises `UserError`."""
    try:
        model, info = AutoencoderTiny.from_pretrained(folder, torch_dtype=dtype, output_loading_info=True)
    except Exception as error:  # a library's, of many kinds
        raise UserError(f"--tiny_decoder_path {folder} cannot be loaded: {error}") from error
    if missing := sorted(name for name in info["missing_keys"] if name.startswith("decoder.")):
        raise UserError(
            f"--tiny_decoder_path {folder}: {len(missing)} weights are missing, such as {missing[0]}."
        )
    model.encoder = None
    return model.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)


def load_empty_tiny_decoder(folder: str | Path) -> AutoencoderTiny:
    """The decoder on the meta device, for counting memory. Raises `UserError`."""
    with torch.device("meta"):
        model = AutoencoderTiny.from_config(read_config(folder, "tiny_decoder"))
    model.encoder = None
    return model.requires_grad_(False)

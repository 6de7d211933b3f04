"""Compile frozen models with torch.compile."""

import torch
from torch import nn

# Each size of a batch is compiled by itself: with dynamic sizes inductor fails (torch 2.13). A rollout has
# one size for each number of samples that are left, with and without the LoRA, and each step of a gradient
# has one.
MOST_VARIANTS = 64


def compile_models(unet: nn.Module, decoder: nn.Module, backend: str = "inductor") -> None:
    """Compile `unet` and the VAE's `decoder` in place, when they are first called with each size.

    Their parameters, names and classes stay as they are. Compiled, the lean layers are torch's plain ones,
    whose activations the compiler saves or recomputes as it sees fit. The results differ from those of the
    models as they are by rounding.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VARIANTS)
    for model in (unet, decoder):
        model.compile(backend=backend, dynamic=False)

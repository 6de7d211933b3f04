"""Compile the UNet with torch.compile."""

import torch
from torch import nn

# Each size of a batch is compiled by itself: with dynamic sizes inductor fails (torch 2.13). A rollout has
# one size for each number of samples that are left, with and without the LoRA, and each step of a gradient
# has one.
MOST_VARIANTS = 64


def compile_unet(unet: nn.Module, backend: str = "inductor") -> None:
    """Compile `unet` in place, when it is first called with each size; the result differs by rounding.

    Its parameters, names and classes stay as they are. Compiled, the lean layers are torch's plain ones: the
    compiler chooses which activations to save.

    The decoder must not be compiled: of a residual block, nearest upsampling and another residual block, as
    diffusers has them, inductor makes a gradient that is zero (torch 2.13 on the CPU; the images are right).
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VARIANTS)
    unet.compile(backend=backend, dynamic=False)

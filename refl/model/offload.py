"""Move frozen models to the GPU only while they are used, from pinned host memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def visit(device: torch.device, *models: torch.nn.Module) -> Iterator[None]:
    """What `models` keep elsewhere is on `device` for a block, and then where it was, as it was: it must not
    be changed there."""
    home = {}
    try:
        for model in models:
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.device.type != device.type:
                    home[tensor] = tensor.data
                    tensor.data = tensor.data.to(device, non_blocking=True)
        yield
    finally:
        for tensor, data in home.items():
            tensor.data = data


def pin(model: torch.nn.Module) -> None:
    """Let what `model` keeps on the CPU be memory that a GPU copies fastest."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.pin_memory()

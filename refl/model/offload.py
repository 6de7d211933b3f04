"""Move frozen models to the GPU only while they are used, from pinned host memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def on_device(device: torch.device, *models: torch.nn.Module) -> Iterator[None]:
    """Temporarily move parameters and buffers of `models` to `device`; restore the originals on exit.

    Changes that are made to them inside the block are lost.
    """
    originals = {}
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    try:
        for tensor in tensors:
            if tensor.device.type != device.type:
                originals[tensor] = tensor.data
                tensor.data = tensor.data.to(device, non_blocking=True)
        yield
    finally:
        for tensor, data in originals.items():
            tensor.data = data


def pin(model: torch.nn.Module) -> None:
    """Move what `model` keeps on the CPU to pinned memory, which a GPU copies fastest."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.pin_memory()


def pinned_size(*models: torch.nn.Module) -> int:
    """Bytes that `pin` takes for the frozen tensors of `models`: torch rounds each up to a power of two."""
    tensors = {tensor for model in models for tensor in (*model.parameters(), *model.buffers())}
    return sum(1 << (tensor.nbytes - 1).bit_length() for tensor in tensors if not tensor.requires_grad)

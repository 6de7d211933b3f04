"""The device that a person asks for, models that visit it, and the memory that it took."""

import resource
import sys

from refl.system.errors import UserError

import torch

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by accelerate's names


def find(name: str | None) -> torch.device:
    """The device of a name such as "cuda:1" or "cpu"; None: a GPU if there is one. Raises `UserError`."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"--device {name}: not a device that can be used on this machine ({reason})."
        ) from error
    return device


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; a GPU copies it while it does other things."""
    is_copied = device.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if is_copied else tensor).to(device, non_blocking=True)


def peak_memory(device: torch.device) -> float:
    """Most memory held so far, GiB: the GPU's by torch's allocator, or the process's own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)

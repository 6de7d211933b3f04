"""Devices and precisions: which GPUs are visible, what they can compute in, and how much memory was used."""

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


def weight_dtype(mixed_precision: str) -> torch.dtype:
    """The precision of the frozen models for one of accelerate's names; raises `UserError` for others."""
    mixed_precision = mixed_precision.lower()  # a variable may have it in capitals
    if mixed_precision not in DTYPES:
        raise UserError(
            f"mixed precision {mixed_precision} is not supported; use --mixed_precision {', '.join(DTYPES)}. "
            "It may come from `accelerate config` or `accelerate launch --mixed_precision`."
        )
    return DTYPES[mixed_precision]


def best_precision() -> str:
    """Precision for the visible GPUs: "bf16" if all are Ampere or newer, else "fp16"; "no" without GPUs."""
    gpus = range(torch.cuda.device_count())
    if not gpus:
        return "no"
    return "bf16" if all(torch.cuda.get_device_capability(gpu) >= (8, 0) for gpu in gpus) else "fp16"


def set_tf32(allowed: bool) -> None:
    """Allow TF32 in float32 matrix products and convolutions, or forbid it in both.

    torch's default is to forbid it in products and to allow it in convolutions. These flags keep torch's
    newer `fp32_precision` settings in agreement, which setting those does not do the other way round.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; copies to a GPU do not block."""
    is_copied = device.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if is_copied else tensor).to(device, non_blocking=True)


def peak_memory(device: torch.device) -> float:
    """Peak memory so far, GiB: allocated by torch on a GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)

"""The device that a person asks for."""

from refl.errors import UserError

import torch


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

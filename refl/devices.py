"""The device that a person asks for."""

from refl.errors import UserError

import torch


def find(name: str | None) -> torch.device:
    """The device of a name such as "cuda:1" or "cpu"; None: a GPU if there is one. Raises `UserError`."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not a device of this machine.") from error
    return device

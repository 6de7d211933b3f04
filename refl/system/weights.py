"""Read files of weights: safetensors, and torch's own without code in them."""

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from refl.system.errors import UserError
from refl.system.reading import check_file

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


@contextmanager
def open_safetensors(path: str | Path) -> Iterator[safe_open]:
    """The header of a safetensors file, and access to its tensors; raises `UserError`, also for a file that
    is not complete."""
    check_file(path)
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is damaged or is not a safetensors file ({error}). Copy it again from its source."
        ) from error


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; raises `UserError`."""
    with open_safetensors(path) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}, tensors.metadata() or {}  # noqa: SIM118


def read_weights(path: Path, within: str | None = None) -> dict[str, Tensor]:
    """Read a file of tensors, memory-mapped where its format allows; raises `UserError`.

    A checkpoint of a training may have the tensors in its entry `within`.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    check_file(path)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # the unpickler and the zip reader raise many kinds
        raise UserError(
            f"{path} is damaged or is not a file of weights ({type(error).__name__}). "
            "Copy it again from its source."
        ) from error
    if isinstance(weights, dict) and isinstance(weights.get(within), dict):
        weights = weights[within]
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} contains something other than a table of weights.")
    return weights


def check_finite(weights: Mapping[str, Tensor], place: object, advice: str) -> None:
    """Raise `UserError` for weights that are not finite numbers."""
    wrong = [name for name, value in weights.items() if not value.isfinite().all()]
    if wrong:
        raise UserError(
            f"{place}: {len(wrong)} of {len(weights)} weights are not finite numbers, such as {wrong[0]}. "
            f"{advice}"
        )

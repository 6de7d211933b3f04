"""Write files atomically, fingerprint them, and check folders and files before a run."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from refl.system.errors import UserError

SAMPLES, SAMPLE_SIZE = 64, 4096  # number of samples of a file, and bytes of each


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Write a file atomically: beside `path`, synced to the disk, then renamed."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    write_synced(partial, content.encode() if isinstance(content, str) else content)
    partial.replace(path)
    sync_folder(path.parent)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and sync it to the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """Read a JSON file; raises `UserError`."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from error


def fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 of the names, sizes and samples of files: tells trained weights apart without reading
    gigabytes. Raises `OSError`."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.parent.name}/{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for index in range(SAMPLES):
                file.seek(max(0, size - SAMPLE_SIZE) * index // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_SIZE))
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Sync the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require(files: dict[Path, str]) -> None:
    """Raise `UserError` that names all missing files at once, each with its source: an address, or a
    repository on the Hugging Face Hub."""
    missing = [
        f"  {path}  ({source if '://' in source else f'on the Hugging Face Hub: {source}'})"
        for path, source in files.items()
        if not path.exists()
    ]
    if missing:
        raise UserError("weights are missing:\n" + "\n".join(missing) + "\nSee checkpoint/README.md.")


def check_output_folder(folder: str | Path) -> Path:
    """Check that `folder` can be created and written to; return its nearest ancestor that exists, or itself.

    Raises `UserError`.
    """
    folder = Path(folder)
    if "\0" in str(folder):
        raise UserError(f"{str(folder)!r} cannot be used for output: it contains a null character.")
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise UserError(f"{folder} cannot be used for output: {existing} is not a folder.")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror} ({existing}).") from error
    return existing

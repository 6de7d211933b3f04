"""Files that are written whole, or not at all."""

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from refl.system.errors import UserError

SAMPLES, SAMPLE_SIZE = 64, 4096  # of a large file, bytes


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Write `content` beside `path`, wait until it is on the disk, then put it in the place of `path`."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    write_synced(partial, content.encode() if isinstance(content, str) else content)
    partial.replace(path)
    sync_folder(path.parent)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 of names, sizes and, for large files, samples: enough to tell trained weights from others
    without reading gigabytes. Raises `OSError`."""
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
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output_folder(folder: str | Path) -> Path:
    """`folder` exists or can be made, and a file can be written in it; returns what there is of it."""
    folder = Path(folder)
    if "\0" in str(folder):
        raise UserError(f"{str(folder)!r} cannot be used for output: a name has no null in it.")
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise UserError(f"{folder} cannot be used for output: {existing} is not a folder.")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror} ({existing}).") from error
    return existing


# -------------------------------------------------------------------------------------------- checks of a run

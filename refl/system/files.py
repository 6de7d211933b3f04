"""Write files atomically, fingerprint them, and check folders and files before a run."""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from refl.system.errors import UserError
from refl.system.reading import exists

SAMPLES, SAMPLE_SIZE = 64, 4096  # number of samples of a file, and bytes of each


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Write a file atomically: beside `path`, synced to the disk, then renamed."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        write_synced(partial, content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def writing(folder: Path, advice: str = "") -> Iterator[None]:
    """Raise `UserError` if a file in `folder` cannot be written, because the disk is full for example."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}.{advice}") from error


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and sync it to the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


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
        if not exists(path)
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
    try:
        os.lstat(folder)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # no permission on the way, or a name that is too long
        raise UserError(f"{folder} cannot be used for output: {error.strerror}.") from error
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise UserError(f"{folder} cannot be used for output: {existing} is not a folder.")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror} ({existing}).") from error
    return existing

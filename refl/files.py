"""Files that are written whole, or not at all."""

import os
from pathlib import Path


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


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

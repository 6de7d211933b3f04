"""Files that are written whole, or not at all."""

import os
from pathlib import Path


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Write `content` beside `path`, wait until it is on the disk, then put it in the place of `path`."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)

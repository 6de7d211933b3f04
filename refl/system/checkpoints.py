"""Checkpoints: written whole or not at all, verified when they are read.

A checkpoint is a folder `checkpoint-N`, N optimizer steps into a run: files, and checksums.json with the
SHA-256 of each. It is written beside its place, put on the disk, then renamed, so that whatever is called
`checkpoint-N` is whole unless the disk spoilt it; and then its checksums tell.
"""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

from refl.system.errors import UserError
from refl.system.files import sync_folder, write_synced

CHECKSUMS, STATE = "checksums.json", "state.json"


class Damaged(UserError):
    """A checkpoint that is not as it was written."""


def write(folder: Path, step: int, files: dict[str, bytes]) -> Path:
    """Write `folder`/checkpoint-`step`; returns it. Raises `OSError`, and then nothing of it is left."""
    target = folder / f"checkpoint-{step}"
    partial = target.with_name(target.name + ".partial")
    checksums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, content in files.items():
            write_synced(partial / name, content)
        write_synced(partial / CHECKSUMS, json.dumps(checksums, indent=2).encode())
        sync_folder(partial)
        if target.exists():  # one that was found damaged
            shutil.rmtree(target.rename(target.with_name(target.name + ".damaged.partial")))
        partial.rename(target)
        sync_folder(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def read(path: Path) -> dict[str, bytes]:
    """The files of a checkpoint; raises `Damaged` for one that is not as it was written, `UserError` for one
    that cannot be read."""
    try:
        checksums = json.loads((path / CHECKSUMS).read_bytes())
        files = {name: (path / name).read_bytes() for name in checksums}
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise Damaged(f"{path} is not a whole checkpoint ({error}).") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != checksums[name]:
            raise Damaged(f"{path / name} is damaged: it is not what was written.")
    return files


def newest(folder: Path) -> dict[str, bytes] | None:
    """The files of the newest whole checkpoint in `folder`; damaged ones are named and passed over.

    None if there is no checkpoint at all; raises `UserError` if there are some and none is whole.
    """
    found = sorted(steps(folder), reverse=True)
    for step in found:
        try:
            return read(folder / f"checkpoint-{step}")
        except Damaged as error:
            print(f"warning: {error} Passed over.", file=sys.stderr, flush=True)
    if found:
        raise UserError(f"no checkpoint in {folder} is whole; --resume_from_checkpoint none starts anew.")
    return None


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, whole or damaged."""
    names = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*"))
    return [int(match[1]) for match in names if match]


def prune(folder: Path, step: int, limit: int) -> None:
    """Once that of `step` is whole: delete those after it, another run's, and all but `limit` up to it."""
    for path in folder.glob("checkpoint-*.partial"):
        shutil.rmtree(path, ignore_errors=True)
    found = sorted(steps(folder))
    kept = [number for number in found if number <= step][-limit:]
    for number in found:
        if number not in kept:
            # Renamed first: a checkpoint that is half deleted is never taken for one.
            path = folder / f"checkpoint-{number}"
            shutil.rmtree(path.rename(path.with_name(path.name + ".partial")), ignore_errors=True)


# -------------------------------------------------------------------------------------------- what is in them

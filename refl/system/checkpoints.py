"""Checkpoints: written atomically, verified when they are read.

A checkpoint is a folder `checkpoint-N`, N optimizer steps into a run: files, and checksums.json with the
SHA-256 of each. It is written under another name, synced to the disk, then renamed, so that a folder called
`checkpoint-N` is complete unless the disk damaged it, which its checksums reveal.
"""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

from refl.system.errors import UserError
from refl.system.files import sync_folder, write_synced
from refl.system.reading import check_folder, is_folder

CHECKSUMS, STATE = "checksums.json", "state.json"


class Damaged(UserError):
    """A checkpoint that is incomplete or differs from what was written."""


def write(folder: Path, step: int, files: dict[str, bytes]) -> Path:
    """Write `folder`/checkpoint-`step` and return it. Raises `OSError` and then leaves nothing behind."""
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
        if target.exists():  # a damaged one
            shutil.rmtree(target.rename(target.with_name(target.name + ".damaged.partial")))
        partial.rename(target)
        sync_folder(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def read(path: Path) -> dict[str, bytes]:
    """Read and verify the files of a checkpoint; raises `Damaged`, or `UserError` if it cannot be read."""
    if is_folder(path):
        check_folder(path)
    try:
        checksums = json.loads((path / CHECKSUMS).read_bytes())
        files = {name: (path / name).read_bytes() for name in checksums}
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise Damaged(f"{path} is not a complete checkpoint ({error}).") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != checksums[name]:
            raise Damaged(f"{path / name} is damaged: its checksum differs.")
    return files


def newest(folder: Path) -> dict[str, bytes] | None:
    """The files of the newest valid checkpoint in `folder`; warns of damaged ones and skips them.

    None if there is no checkpoint; raises `UserError` if all are damaged.
    """
    saved = sorted(steps(folder), reverse=True)
    for step in saved:
        try:
            return read(folder / f"checkpoint-{step}")
        except Damaged as error:
            print(f"warning: {error} Skipping it.", file=sys.stderr, flush=True)
    if saved:
        raise UserError(
            f"all checkpoints in {folder} are damaged; --resume_from_checkpoint none starts anew."
        )
    return None


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, valid or damaged."""
    names = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*"))
    return [int(match[1]) for match in names if match]


def prune(folder: Path, step: int, limit: int) -> None:
    """After the checkpoint of `step`: delete later ones, of another run, and keep the last `limit` up to
    it."""
    for path in folder.glob("checkpoint-*.partial"):
        shutil.rmtree(path, ignore_errors=True)
    saved = sorted(steps(folder))
    kept = [number for number in saved if number <= step][-limit:]
    for number in saved:
        if number not in kept:
            # Renamed first, so that a partly deleted checkpoint is never read.
            path = folder / f"checkpoint-{number}"
            shutil.rmtree(path.rename(path.with_name(path.name + ".partial")), ignore_errors=True)

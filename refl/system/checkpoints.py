"""Checkpoints: written atomically, verified when they are read.

A checkpoint is a folder `checkpoint-N`, N optimizer steps into a run: files, and checksums.json with the
SHA-256 of each. It is written inside the output folder's `.refl`, synced to the disk, then renamed, so that a
folder called `checkpoint-N` is complete unless the disk damaged it, which its checksums reveal. Folders and
files of that name that this program did not write are never read, replaced or deleted.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

from refl.system.errors import UserError
from refl.system.files import sync_folder, write_synced
from refl.system.ownership import PRIVATE, OutputFolder
from refl.system.reading import check_folder, is_folder

CHECKSUMS, STATE = "checksums.json", "state.json"


class Damaged(UserError):
    """A checkpoint that is incomplete or differs from what was written."""


def write(folder: Path, step: int, files: dict[str, bytes]) -> Path:
    """Write `folder`/checkpoint-`step` and return it. Raises `OSError` and then leaves nothing behind."""
    target, private = folder / f"checkpoint-{step}", folder / PRIVATE
    partial = private / target.name
    if os.path.lexists(target) and step not in steps(folder):
        raise FileExistsError(f"{target} is in its place, which this program did not write")
    checksums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    try:
        clear_partial(folder)
        partial.mkdir(parents=True)
        for name, content in files.items():
            write_synced(partial / name, content)
        summary = json.dumps(checksums, indent=2).encode()
        write_synced(partial / CHECKSUMS, summary)
        sync_folder(partial)
        OutputFolder(folder).record(f"{target.name}/{CHECKSUMS}", summary)
        if target.exists():  # a damaged one
            _delete(target)
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
        checksums = dict(json.loads((path / CHECKSUMS).read_bytes()))
        if any(Path(name).name != name for name in checksums):
            raise ValueError(f"a name in {CHECKSUMS} is not one of a file in it")
        files = {name: (path / name).read_bytes() for name in checksums}
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, RecursionError) as error:
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
            f"all checkpoints in {folder} are damaged; --resume_from_checkpoint none starts anew and "
            "replaces them."
        )
    return None


def steps(folder: Path) -> list[int]:
    """Steps of the program's own checkpoints in `folder`, valid or damaged."""
    return _find(folder)[0]


def foreign(folder: Path) -> list[Path]:
    """What is called `checkpoint-N` in `folder` and was not written by this program."""
    return _find(folder)[1]


def _find(folder: Path) -> tuple[list[int], list[Path]]:
    recorded = {Path(name).parts[0] for name in OutputFolder(folder).written}
    own, others = [], []
    for path in folder.glob("checkpoint-*"):
        if not (match := re.fullmatch(r"checkpoint-(0|[1-9]\d*)", path.name)):
            continue
        is_known = not recorded and is_checkpoint(path)  # of a version that kept no records
        if path.is_dir() and (path.name in recorded or is_known):
            own.append(int(match[1]))
        else:
            others.append(path)
    return own, others


def is_checkpoint(path: Path) -> bool:
    """Whether a folder looks like a checkpoint of this program, perhaps a damaged one."""
    return (path / CHECKSUMS).is_file() or (path / STATE).is_file()


def prune(folder: Path, step: int, limit: int) -> None:
    """After the checkpoint of `step`: delete later ones, of another run, and keep the last `limit` up to
    it."""
    clear_partial(folder)
    saved = sorted(steps(folder))
    kept = [number for number in saved if number <= step][-limit:]
    for number in saved:
        if number not in kept:
            _delete(folder / f"checkpoint-{number}")


def clear_partial(folder: Path) -> None:
    """Delete checkpoints that a kill left incomplete."""
    for path in (folder / PRIVATE).glob("checkpoint-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _delete(path: Path) -> None:
    # Renamed first, so that a partly deleted checkpoint is never read.
    (path.parent / PRIVATE).mkdir(exist_ok=True)
    shutil.rmtree(path.rename(path.parent / PRIVATE / f"{path.name}.deleted"), ignore_errors=True)

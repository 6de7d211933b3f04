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
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from refl.errors import UserError
from refl.files import sync_folder, write_synced

import torch
from safetensors.torch import load, save
from torch import Tensor

CHECKSUMS, STATE = "checksums.json", "state.json"


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
            shutil.rmtree(target)
        partial.rename(target)
        sync_folder(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def read(path: Path) -> dict[str, bytes]:
    """The files of a checkpoint; raises `UserError` for one that is not as it was written."""
    try:
        checksums = json.loads((path / CHECKSUMS).read_bytes())
        files = {name: (path / name).read_bytes() for name in checksums}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a whole checkpoint ({error}).") from error
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != checksums[name]:
            raise UserError(f"{path / name} is damaged: it is not what was written.")
    return files


def newest(folder: Path) -> dict[str, bytes] | None:
    """The files of the newest whole checkpoint in `folder`; damaged ones are named and passed over."""
    for step in sorted(steps(folder), reverse=True):
        try:
            return read(folder / f"checkpoint-{step}")
        except UserError as error:
            print(f"warning: {error} Passed over.", file=sys.stderr, flush=True)
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


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds beside the LoRA and the optimizer's tensors."""

    step: int = 0  # optimizer steps, skipped ones included
    updates: int = 0  # those that moved the LoRA; the learning rate is a function of it
    nonfinite: int = 0  # those skipped because of numbers that were not finite
    nonfinite_in_a_row: int = 0
    validated_step: int | None = None
    validation: float | None = None  # the mean reward then
    first_validation: float | None = None
    scaler: dict = field(default_factory=dict)  # GradScaler's state

    def forget_nonfinite_steps(self) -> None:
        """Go back to the last step that was not skipped; nothing else has changed since."""
        self.step -= self.nonfinite_in_a_row
        self.nonfinite -= self.nonfinite_in_a_row
        self.nonfinite_in_a_row = 0


def pack_state(progress: Progress, decides: dict, options: dict) -> bytes:
    """The file `STATE`; `decides` is all that the LoRA depends on, `options` is for people."""
    state = {"progress": asdict(progress), "decides": decides, "options": options}
    state["versions"] = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
    return (json.dumps(state, indent=2) + "\n").encode()


def resume(
    folder: Path, where: str, decides: dict, allow_changed: bool
) -> tuple[Progress, dict[str, bytes] | None]:
    """How far the run in `folder` is, and its checkpoint's files; a new run and None where there is none.

    `where` is "latest", "none", or a checkpoint's folder. Raises `UserError` if what the LoRA depends on is
    not what it was, unless that is allowed.
    """
    files = None
    if where != "none":
        files = newest(folder) if where == "latest" else read(Path(where))
    if files is None:
        return Progress(), None
    state = json.loads(files[STATE])
    progress, before = Progress(**state["progress"]), state["decides"]
    changed = [
        f"  {name}: {before.get(name)} -> {decides.get(name)}"
        for name in sorted(decides.keys() | before.keys())
        if before.get(name) != decides.get(name)
    ]
    if changed and not allow_changed:
        raise UserError(
            f"{folder} holds a run of {progress.step} steps with other options:\n"
            + "\n".join(changed)
            + "\nTake another --output_dir, start anew with --resume_from_checkpoint none, or go on all the "
            "same with --allow_changed_options."
        )
    print(f"going on after step {progress.step}", flush=True)
    return progress, files


def pack_optimizer(optimizer: torch.optim.Optimizer) -> bytes:
    """The optimizer's tensors as a safetensors file; its options are not in it."""
    state = optimizer.state_dict()["state"]
    return save(
        {
            f"{index}.{name}": torch.as_tensor(value).detach().cpu().clone().contiguous()
            for index, values in state.items()
            for name, value in values.items()
        }
    )


def unpack_optimizer(optimizer: torch.optim.Optimizer, content: bytes) -> None:
    """Put the tensors of `pack_optimizer` back; the optimizer keeps its options."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in load(content).items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

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
SHAPES = ("rank", "use_8bit_adam")  # options without which a checkpoint's tensors do not fit
# With --early_stop: without the same, validations could not be compared.
WATCHED = (
    "early_stop", "held_out_reward", "validation_prompts", "num_validation_images",
    "validation_images_per_prompt",
)  # fmt: skip


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


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds beside the LoRA and the optimizer's tensors."""

    step: int = 0  # optimizer steps, skipped ones included
    updates: int = 0  # those that moved the LoRA; the learning rate is a function of it
    nonfinite: int = 0  # those skipped because of numbers that were not finite
    nonfinite_in_a_row: int = 0
    validation: float | None = None  # the last mean reward
    first_validation: float | None = None
    guard: dict = field(default_factory=dict)  # of --early_stop, after the last validation
    scaler: dict = field(default_factory=dict)  # GradScaler's state after the last step that was not skipped

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
    not what it was, unless that is allowed; without some of it, it cannot be.
    """
    files = None
    if where != "none":
        files = newest(folder) if where == "latest" else read(Path(where))
    if files is None:
        return Progress(), None
    try:
        state = json.loads(files[STATE])
        progress, before = Progress(**state["progress"]), state["decides"]
    except (KeyError, TypeError) as error:
        raise UserError(f"the checkpoint in {folder} is of another version of this program.") from error
    names = sorted(decides.keys() | before.keys())
    changed = {
        name: f"  {name}: {before.get(name)} -> {decides.get(name)}"
        for name in names
        if before.get(name) != decides.get(name)
    }
    needed = SHAPES + (WATCHED if decides.get("early_stop") else ())
    is_possible = changed.keys().isdisjoint(needed)
    if changed and not (is_possible and allow_changed):
        ways = ["Take another --output_dir", "replace that run with --resume_from_checkpoint none"]
        if is_possible:
            ways.append("go on all the same with --allow_changed_options")
        raise UserError(
            f"{folder} holds a run of {progress.step} steps with other options:\n"
            + "\n".join(changed.values())
            + f"\n{', '.join(ways[:-1])}, or {ways[-1]}."
        )
    return progress, files


def pack_optimizer(optimizer: torch.optim.Optimizer) -> bytes:
    """The optimizer's state as a safetensors file; its options are not in it."""
    return save(
        {
            f"{index}.{name}": torch.as_tensor(value).detach().cpu().clone().contiguous()
            for index, matrix in enumerate(_matrices(optimizer))
            for name, value in optimizer.state[matrix].items()
        }
    )


def unpack_optimizer(optimizer: torch.optim.Optimizer, content: bytes) -> None:
    """Put the state of `pack_optimizer` back; the optimizer keeps its options."""
    matrices = _matrices(optimizer)
    for key, value in load(content).items():
        index, _, name = key.partition(".")
        matrix = matrices[int(index)]
        if value.ndim == 0:  # the count of steps: torch's a float tensor on the CPU, bitsandbytes' an int
            optimizer.state[matrix][name] = value if value.is_floating_point() else int(value)
        else:
            optimizer.state[matrix][name] = value.to(matrix.device)


def _matrices(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [matrix for group in optimizer.param_groups for matrix in group["params"]]

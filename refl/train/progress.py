"""The training state inside a checkpoint: progress, optimizer, and whether a run may resume from it."""

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from refl.model.lora import LORA_FILE, check_packed
from refl.system.checkpoints import STATE, newest, read
from refl.system.errors import UserError
from refl.train.guard import Guard

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

OPTIMIZER_FILE = "optimizer.safetensors"
BEST_LORA = "best_lora_weights.safetensors"  # the best LoRA so far, inside a checkpoint
SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}  # of GradScaler
INPUTS = "inputs"  # entry of a fingerprint: the content of the files that a run computes with
SHAPES = ("rank", "use_8bit_adam")  # options that a checkpoint's tensors depend on
# With --early_stop: if these changed, validations could not be compared.
COMPARED = (
    "early_stop", "held_out_reward", "validation_prompts", "num_validation_images",
    "validation_images_per_prompt",
)  # fmt: skip


@dataclass
class Progress:
    """How far a run has come: the part of a checkpoint that is neither LoRA nor optimizer state."""

    step: int = 0  # optimizer steps, skipped ones included
    updates: int = 0  # steps that changed the LoRA; the learning rate is a function of it
    nonfinite: int = 0  # steps skipped because loss or gradient was not finite
    nonfinite_in_a_row: int = 0
    validation: float | None = None  # last mean reward
    first_validation: float | None = None
    guard: dict = field(default_factory=dict)  # state of --early_stop after the last validation
    scaler: dict = field(default_factory=dict)  # GradScaler's state after the last step that was not skipped

    def record_step(self, is_finite: bool, is_overflow: bool, scaler: dict) -> None:
        """Count an optimizer step; `is_overflow`: a float16 overflow, which the scaler repairs."""
        self.step += 1
        self.updates += is_finite
        is_sound = is_finite or is_overflow
        self.nonfinite += not is_sound
        self.nonfinite_in_a_row = 0 if is_sound else self.nonfinite_in_a_row + 1
        if is_sound:
            self.scaler = scaler

    def forget_nonfinite_steps(self) -> None:
        """Return to the last step that was not skipped; nothing else has changed since."""
        self.step -= self.nonfinite_in_a_row
        self.nonfinite -= self.nonfinite_in_a_row
        self.nonfinite_in_a_row = 0


def pack_state(progress: Progress, fingerprint: dict, options: dict) -> bytes:
    """The file `STATE`; `fingerprint` holds everything that the LoRA depends on, `options` is for people."""
    state = {"progress": asdict(progress), "fingerprint": fingerprint, "options": options}
    state["versions"] = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
    return (json.dumps(state, indent=2) + "\n").encode()


def resume(
    folder: Path, where: str, fingerprint: dict, allow_changed: bool
) -> tuple[Progress, dict[str, bytes] | None]:
    """Progress and files of the checkpoint to resume from; a new run's progress and None without one.

    `where` is "latest", "none", or a checkpoint's folder. Raises `UserError` if the fingerprint differs and
    `allow_changed` is False, or if it differs in something that the checkpoint cannot do without.
    """
    files = None
    if where != "none":
        files = newest(folder) if where == "latest" else read(Path(where))
    if files is None:
        return Progress(), None
    try:
        progress, before = _unpack(files)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"the checkpoint in {folder if where == 'latest' else where} is whole, but not as this version "
            f"writes it ({error}). Take another --output_dir, or replace that run with "
            "--resume_from_checkpoint none."
        ) from error
    before, fingerprint = _flatten(before, fingerprint), _flatten(fingerprint, before)
    names = sorted(fingerprint.keys() | before.keys())
    changed = {
        name: f"  {name}: {before.get(name)} -> {fingerprint.get(name)}"
        for name in names
        if before.get(name) != fingerprint.get(name)
    }
    needed = SHAPES + (COMPARED if fingerprint.get("early_stop") else ())
    can_resume = changed.keys().isdisjoint(needed)
    if changed and not (can_resume and allow_changed):
        ways = ["Take another --output_dir", "replace that run with --resume_from_checkpoint none"]
        if can_resume:
            ways.append("resume anyway with --allow_changed_options")
        raise UserError(
            f"{folder} holds a run of {progress.step} steps with other options:\n"
            + "\n".join(changed.values())
            + f"\n{', '.join(ways[:-1])}, or {ways[-1]}."
        )
    return progress, files


def _unpack(files: dict[str, bytes]) -> tuple[Progress, dict]:
    """Progress and fingerprint in a checkpoint; raises errors of many types if something in it is wrong."""
    if missing := {LORA_FILE, OPTIMIZER_FILE, STATE} - files.keys():
        raise LookupError(f"it has no {min(missing)}")
    state = json.loads(files[STATE])
    progress, fingerprint = Progress(**state["progress"]), state["fingerprint"]
    for name in ("step", "updates", "nonfinite", "nonfinite_in_a_row"):
        if type(number := getattr(progress, name)) is not int or number < 0:
            raise TypeError(f"{name} is {number!r}")
    for name in ("validation", "first_validation"):
        if not isinstance(value := getattr(progress, name), float | int | None):
            raise TypeError(f"{name} is {value!r}")
    if not all(isinstance(table, dict) for table in (progress.guard, progress.scaler, fingerprint)):
        raise TypeError("guard, scaler or fingerprint is not a table")
    inputs = fingerprint.get(INPUTS) or {}
    if not (isinstance(inputs, dict) and all(isinstance(digest, str) for digest in inputs.values())):
        raise TypeError("its inputs are not a table of digests")
    if progress.scaler and SCALER - progress.scaler.keys():
        raise LookupError("its scaler is incomplete")
    Guard.from_state(progress.guard)
    for name in (LORA_FILE, BEST_LORA):
        if name in files:
            check_packed(files[name])
    return progress, fingerprint


def _flatten(fingerprint: dict, other: dict) -> dict:
    """A fingerprint with the content of its inputs as entries of their own, for names that both have.

    A checkpoint of an earlier version, or of a run with another reward, does not have all of them.
    """
    own, others = (one.get(INPUTS) or {} for one in (fingerprint, other))
    flat = {name: value for name, value in fingerprint.items() if name != INPUTS}
    return flat | {f"files of {name}": own[name][:12] for name in own if name in others}


def pack_optimizer(optimizer: torch.optim.Optimizer) -> bytes:
    """Pack the optimizer's state, without its hyperparameters, as a safetensors file."""
    return save(
        {
            f"{index}.{name}": torch.as_tensor(value).detach().cpu().clone().contiguous()
            for index, matrix in enumerate(_matrices(optimizer))
            for name, value in optimizer.state[matrix].items()
        }
    )


def unpack_optimizer(optimizer: torch.optim.Optimizer, content: bytes) -> None:
    """Restore the state from `pack_optimizer`; hyperparameters stay as they are. Raises `UserError` for
    another state than that of this optimizer's matrices."""
    matrices = _matrices(optimizer)
    try:
        state = load(content)
        places = [(matrices[int(key.partition(".")[0])], key.partition(".")[2]) for key in state]
        misfits = [
            key
            for (key, value), (matrix, name) in zip(state.items(), places, strict=True)
            if name.startswith("exp_avg") and value.shape != matrix.shape
        ]
        if misfits:
            raise ValueError(f"the shape of {misfits[0]} is another")
        if state and len({id(matrix) for matrix, _ in places}) != len(matrices):
            raise ValueError("some matrices have no state")
    except (SafetensorError, LookupError, ValueError) as error:
        raise UserError(f"the checkpoint's {OPTIMIZER_FILE} does not fit this run ({error}).") from error
    for (matrix, name), value in zip(places, state.values(), strict=True):
        if value.ndim == 0:  # step count: in torch a float tensor on the CPU, in bitsandbytes an int
            optimizer.state[matrix][name] = value if value.is_floating_point() else int(value)
        else:
            optimizer.state[matrix][name] = value.to(matrix.device)


def _matrices(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [matrix for group in optimizer.param_groups for matrix in group["params"]]

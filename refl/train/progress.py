"""The training state inside a checkpoint: progress, optimizer, and whether a run may resume from it."""

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from refl.system.checkpoints import STATE, newest, read
from refl.system.errors import UserError

import torch
from safetensors.torch import load, save
from torch import Tensor

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
        state = json.loads(files[STATE])
        progress, before = Progress(**state["progress"]), state["fingerprint"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"the checkpoint in {folder} was written by another version of this program. Take another "
            "--output_dir, or replace that run with --resume_from_checkpoint none."
        ) from error
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
    """Restore the state from `pack_optimizer`; hyperparameters stay as they are."""
    matrices = _matrices(optimizer)
    for key, value in load(content).items():
        index, _, name = key.partition(".")
        matrix = matrices[int(index)]
        if value.ndim == 0:  # step count: in torch a float tensor on the CPU, in bitsandbytes an int
            optimizer.state[matrix][name] = value if value.is_floating_point() else int(value)
        else:
            optimizer.state[matrix][name] = value.to(matrix.device)


def _matrices(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [matrix for group in optimizer.param_groups for matrix in group["params"]]

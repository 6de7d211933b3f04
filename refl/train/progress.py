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

SHAPES = ("rank", "use_8bit_adam")  # options without which a checkpoint's tensors do not fit
# With --early_stop: without the same, validations could not be compared.
WATCHED = (
    "early_stop", "held_out_reward", "validation_prompts", "num_validation_images",
    "validation_images_per_prompt",
)  # fmt: skip


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

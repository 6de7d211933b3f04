"""A run's output folder: its progress, checkpoints, best LoRA and result.

output_dir/
  checkpoint-N/                       the state after N optimizer steps; resume uses the newest whole one
  best/                               the best LoRA so far, with --early_stop
  pytorch_lora_weights.safetensors    the result, with options.json and a model card
"""

import json
import sys
from pathlib import Path

from refl.model.lora import KOHYA_FILE, LORA_FILE, export_lora, pack_lora, to_kohya, unpack_lora
from refl.report import card, outputs
from refl.report.log import Log
from refl.reward import rewards
from refl.system import checkpoints
from refl.system.distributed import is_peer_lost
from refl.system.errors import UserError
from refl.system.files import check_output_folder, writing
from refl.system.ownership import ADVICE, OutputFolder, take
from refl.system.signals import Stopped, StopSignals
from refl.train import identity
from refl.train.batches import Inputs
from refl.train.guard import Guard, ValidationMeans
from refl.train.models import Models
from refl.train.options import Options, run_fingerprint, to_save
from refl.train.progress import BEST_LORA, INPUTS, OPTIMIZER_FILE, Progress, pack_state, resume
from refl.train.update import Updater
from refl.train.validation import Validation

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

ENOUGH_IMAGES = 64  # for --early_stop to tell a change from chance


class Run:
    """What a run has reached and what it leaves on the disk. Only the main process writes."""

    def __init__(self, options: Options, inputs: Inputs, accelerator: Accelerator):
        """Lock the folder and find the checkpoint to resume from; raises `UserError` if the run cannot be
        resumed, if another process uses the folder, or if a file in the way is not the program's own."""
        self.options, self.inputs, self.accelerator = options, inputs, accelerator
        self.folder = Path(options.output_dir)
        self.output: OutputFolder | None = None  # of the main process
        self.fingerprint = run_fingerprint(
            options,
            accelerator.mixed_precision,
            accelerator.num_processes,
            inputs.prompts,
            inputs.validation_prompts,
            inputs.captioned,
        ) | {INPUTS: identity.of_inputs(options)}
        self.progress, self.checkpoint = self._resume()
        self.first_step = self.saved_step = self.progress.step
        self.guard = Guard.from_state(self.progress.guard if options.early_stop else {})
        self.progress.guard = self.guard.state()
        has_best = self.checkpoint and options.early_stop
        self.best_lora: bytes | None = self.checkpoint.get(BEST_LORA) if has_best else None

    def _resume(self) -> tuple[Progress, dict[str, bytes] | None]:
        """`progress.resume` on the main process, broadcast to the others, a `UserError` included."""
        outcome = None
        if self.accelerator.is_main_process:
            source, allow_changed = self.options.resume_from_checkpoint, self.options.allow_changed_options
            try:
                self.output = take(self.folder, outputs.RUN)
                self._check_checkpoints()
                outcome = resume(self.folder, source, self.fingerprint, allow_changed)
                if outcome[0].step < self.options.max_train_steps:
                    self._check_places()
            except UserError as error:
                outcome = error
        [outcome] = broadcast_object_list([outcome])
        if isinstance(outcome, UserError):
            raise outcome
        return outcome

    def _check_checkpoints(self) -> None:
        """Raise `UserError` if the folder has checkpoints of another program or copied from another run."""
        for path in checkpoints.foreign(self.folder):
            if path.is_dir():
                raise UserError(
                    f"{path} was not written by this program in this folder. {ADVICE} To resume from a "
                    f"checkpoint copied from another run: --resume_from_checkpoint, from another place."
                )
            _warn(f"{path} is not a checkpoint; it is ignored, and none will be saved under its name.")

    def _check_places(self) -> None:
        """Raise `UserError` if a file that this run will write cannot be, or would replace one of others."""
        options = self.options
        loras = [LORA_FILE, *([KOHYA_FILE] if options.also_kohya else [])]
        names = [*loras, outputs.OPTIONS, card.FILE, *outputs.CARD_IMAGES[:-1]]
        names += [f"{outputs.BEST}/{name}" for name in loras] if options.early_stop else []
        self.output.check(names)
        if options.report_to != "none":
            check_output_folder(self.folder / options.logging_dir)

    # ---- where the run stands

    @property
    def is_resumed(self) -> bool:
        """Whether it started from a checkpoint."""
        return self.checkpoint is not None

    @property
    def is_finished(self) -> bool:
        """Whether a checkpoint of its last step was found."""
        return self.is_resumed and bool(
            self.progress.step >= self.options.max_train_steps or self.guard.reason
        )

    @property
    def remaining(self) -> range:
        """Optimizer steps still to take."""
        return range(self.progress.step, self.options.max_train_steps)

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether this step is one of those after which a checkpoint is saved."""
        every = self.options.checkpointing_steps
        return bool(every) and self.progress.step % every == 0

    def announce(self) -> None:
        """Print from where the run resumes; or the rewards' scales, and how --early_stop would be surer."""
        num_images = len(self.inputs.validation_prompts)
        if self.is_resumed:
            self.accelerator.print(f"resuming after step {self.progress.step}")
            return
        if scales := rewards.scales(self.options.reward):
            self.accelerator.print(f"{scales}; --reward_target {self.options.reward_target}")
        if self.options.early_stop and (
            num_images < ENOUGH_IMAGES or self.options.validation_images_per_prompt == 1
        ):
            self.accelerator.print(
                f"note: --early_stop compares {num_images} images, and diversity only with 2 or more of each "
                f"prompt. More reliable: --num_validation_images {ENOUGH_IMAGES // 2} "
                "--validation_images_per_prompt 2"
            )

    def open_log(self) -> Log:
        """The main process's log, without points that an earlier process wrote after its last checkpoint."""
        if not self.accelerator.is_main_process:
            return Log(None)
        if self.options.report_to == "none":
            return Log(None)
        step = self.progress.step
        log = Log(self.folder / self.options.logging_dir, step, step + 1 if self.is_resumed else 0)
        if not self.is_resumed:
            log.options(to_save(self.options))
        return log

    def restore(self, models: Models, updater: Updater) -> None:
        """Restore LoRA and optimizer from the checkpoint, if there is one."""
        if self.checkpoint:
            unpack_lora(models.base.unet, self.checkpoint[LORA_FILE])
            updater.restore(self.checkpoint[OPTIMIZER_FILE])

    def lora(self, models: Models) -> bytes:
        """The LoRA as a file, with the settings that drawing should follow in its metadata."""
        options = self.options
        metadata = {
            "step": self.progress.step,
            "rank": options.rank,
            "lora_alpha": options.alpha,
            "base_model": options.pretrained_model_name_or_path,
            "reward": options.reward,
            "resolution": self.inputs.resolution,
            "guidance_scale": options.guidance_scale,
            "draw_guidance_scale": options.drawn_with,
            "guidance_in": options.guidance_in,
            "lora_in_uncond": options.lora_in_uncond,
            "sampler": "ddpm",
            "num_inference_steps": options.num_inference_steps,
        }
        return pack_lora(models.base.unet, metadata)

    # ---- checkpoints

    def save_checkpoint(self, models: Models, updater: Updater) -> None:
        """Save the state of this step, then delete old checkpoints; a full disk is a warning."""
        if not self.accelerator.is_main_process:
            self.saved_step = self.progress.step
            return
        files = {
            LORA_FILE: self.lora(models),
            OPTIMIZER_FILE: updater.pack(),
            checkpoints.STATE: pack_state(self.progress, self.fingerprint, to_save(self.options)),
        }
        if self.best_lora:
            files[BEST_LORA] = self.best_lora
        step = self.progress.step
        try:
            checkpoints.write(self.folder, step, files)
        except OSError as error:
            _warn(
                f"checkpoint-{step} could not be saved: {error}. Earlier checkpoints are whole. Free some "
                "space: the next checkpoint will be tried as usual."
            )
            return
        self.saved_step = step
        try:
            checkpoints.prune(self.folder, step, self.options.checkpoints_total_limit)
        except OSError as error:
            _warn(f"old checkpoints could not be deleted: {error}.")

    def check_nonfinite_steps(self) -> None:
        """Raise `UserError` after too many skipped steps in a row, and return to the state before them."""
        limit = self.options.max_nonfinite_steps
        if self.progress.nonfinite_in_a_row < limit:
            return
        self.progress.forget_nonfinite_steps()
        raise UserError(
            f"{limit} steps in a row had a loss or a gradient that is not finite. The state before them, "
            f"after step {self.progress.step}, is kept. Resume from an earlier checkpoint with "
            "--resume_from_checkpoint, a lower --learning_rate or --mixed_precision no, and "
            "--allow_changed_options."
        )

    def report_stop(self, stopped: Stopped) -> None:
        """Print where a stopped run will resume."""
        again = "the same command"
        if self.options.resume_from_checkpoint != "latest":
            again += " without --resume_from_checkpoint"
        self.accelerator.print(
            f"stopped by {stopped.name} after {self.progress.step} steps; {again} resumes after step "
            f"{self.saved_step}"
        )

    def ending(self, error: RuntimeError, signals: StopSignals) -> Stopped | UserError:
        """How a run ends when another process has ended; raises any other error again."""
        if not is_peer_lost(error):
            raise error
        if signals.received:
            return Stopped(signals.received)
        return UserError(
            f"another process ended, so this one stopped after step {self.progress.step}. The other printed "
            "the reason, if it could; the same command resumes from here."
        )

    # ---- validation

    def record_validation(self, validation: Validation, models: Models) -> None:
        """Record the reward; with --early_stop keep the best LoRA and decide whether to stop."""
        progress = self.progress
        if self.options.early_stop:
            held_out, diversity = validation.held_out, validation.diversity
            means = ValidationMeans(
                progress.step,
                rewards=validation.by_prompt(validation.rewards),
                saturated=validation.by_prompt(validation.saturated),
                held_out=None if held_out is None else validation.by_prompt(held_out),
                diversity=None if diversity is None else diversity.tolist(),
            )
            is_best = self.guard.update(means)
            progress.guard = self.guard.state()
            if is_best and self.accelerator.is_main_process:
                self.best_lora = self.lora(models)
                self.write_best()
        progress.validation = validation.means["reward"]
        if progress.first_validation is None:
            progress.first_validation = progress.validation

    def write_best(self) -> None:
        """Write the best LoRA so far, if there is one, to the folder best/; delete that of a replaced run."""
        if not self.accelerator.is_main_process:
            return
        if not self.best_lora:
            if not self.is_resumed:
                with writing(self.folder):
                    self.output.delete(f"{outputs.BEST}/{LORA_FILE}")
                    self.output.delete(f"{outputs.BEST}/{KOHYA_FILE}")
            return
        try:
            self._write(self._lora_files(self.best_lora, f"{outputs.BEST}/"))
        except UserError as error:
            _warn(f"{error} The next checkpoint will hold it.")

    # ---- the result

    def finish(self, models: Models, seconds: float) -> None:
        """Write the result and print what was reached."""
        if not self.accelerator.is_main_process:
            return
        self._write_result(self.best_lora or self.lora(models))
        progress, best = self.progress, self.guard.best
        is_last = best is None or best.step == progress.step
        which = "" if is_last else f" is that of step {best.step}, the best,"
        num_steps = progress.step - self.first_step
        print(f"{num_steps} steps in {seconds:.0f} s; LoRA{which} in {self.folder / LORA_FILE}")
        if progress.validation is not None:
            reached = progress.validation if is_last else float(np.mean(best.rewards))
            print(f"validation reward {progress.first_validation:+.3f} -> {reached:+.3f}")

    def finish_again(self) -> None:
        """Say that the run is finished; write its result where it was ended before that, or has changed."""
        if not self.accelerator.is_main_process:
            return
        result = self.best_lora or self.checkpoint[LORA_FILE]
        files = {self.folder / name: content for name, content in self._lora_files(result).items()}
        with writing(self.folder):
            is_written = all(file.is_file() and file.read_bytes() == own for file, own in files.items())
        if not (is_written and (self.folder / card.FILE).exists()):
            self._write_result(result)
        stopped = f", where {self.guard.reason}" if self.guard.reason else ""
        print(f"finished before: {self.progress.step} steps{stopped}; LoRA in {self.folder / LORA_FILE}")

    def _write_result(self, lora: bytes) -> None:
        options = json.dumps(to_save(self.options), indent=2) + "\n"
        self._write(self._lora_files(lora) | {outputs.OPTIONS: options})
        if not self.options.also_kohya:  # an earlier LoRA's
            with writing(self.folder):
                self.output.delete(KOHYA_FILE)
        card.write_if_possible(self.folder)

    def _lora_files(self, lora: bytes, folder: str = "") -> dict[str, bytes]:
        """The LoRA's files for other programs, by name: diffusers' format and, with --also_kohya, kohya's."""
        files = {f"{folder}{LORA_FILE}": export_lora(lora)}
        if self.options.also_kohya:
            run = self.folder.absolute().name
            files[f"{folder}{KOHYA_FILE}"] = to_kohya(files[f"{folder}{LORA_FILE}"], run)
        return files

    def _write(self, files: dict[str, bytes | str]) -> None:
        with writing(self.folder, " Free some space and give the same command again."):
            for name, content in files.items():
                self.output.write(name, content)


def _warn(text: str) -> None:
    """Print a warning above the progress bar."""
    tqdm.write(f"WARNING: {text}", file=sys.stderr)

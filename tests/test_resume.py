"""A run that is stopped, in whatever way and wherever, and started again is the run that was not stopped."""

import json
import os
import shutil
import signal
from collections import Counter

import refl_lora
from refl.model import stable_diffusion
from refl.model.lora import read_metadata
from refl.model.pipeline import load_pipeline
from refl.system import checkpoints
from refl.system.errors import UserError
from refl.system.signals import SIGNALS
from refl.train import run as run_module
from refl.train.metrics import Metrics
from refl.train.validation import Validator

import pytest
import torch
from conftest import weight_options
from safetensors.torch import load
from test_scripts import LORA, events, run_in_process
from torch.utils.tensorboard import SummaryWriter

SCHEDULE = "--max_train_steps 6 --lr_scheduler cosine --lr_warmup_steps 2 --learning_rate 1e-2".split()


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def options(tiny, tmp_path_factory) -> list[str]:
    """Options of a run of 6 steps with 2 micro-steps each, validated before, in the middle and after."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a red cat\na blue dog\nthree green apples\na hill at night\n")
    return [
        *weight_options(tiny), f"--prompts={prompts}", f"--validation_prompts={prompts}", *SCHEDULE,
        *"--num_inference_steps 4 --min_stop 2 --max_stop 3 --gradient_accumulation_steps 2".split(),
        *"--num_validation_images 3 --validation_steps 3 --checkpointing_steps 2".split(),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def straight(options, module_patch, tmp_path_factory):
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("straight")
    train(module_patch, folder, *options)
    return folder


@pytest.fixture(autouse=True)
def handlers():
    """Signals are handled after a test as they were before."""
    before = [(number, signal.getsignal(number)) for number in SIGNALS]
    yield
    for number, handler in before:
        signal.signal(number, handler)


class Killed(BaseException):
    """As abrupt as a test in one process can be."""


def train(monkeypatch, output, *options):
    run_in_process(refl_lora, monkeypatch, *options, f"--output_dir={output}")
    return (output / LORA).read_bytes()


def break_at(monkeypatch, module, name, call, what=Killed):
    """The `call`-th call of `module`.`name` raises `what`, or calls it."""
    original, calls = getattr(module, name), []

    def breaking(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            if isinstance(what, type):
                raise what
            what()
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, breaking)


# A checkpoint is 3 files and their checksums; 2 are written before the end.
KILLS = {
    "before anything is saved": (refl_lora, "rollout", 3),
    "in the rollout": (refl_lora, "rollout", 5),
    "in the decoder": (stable_diffusion, "decode", 20),
    "in the update": (refl_lora.torch.nn.utils, "clip_grad_norm_", 4),
    "in the log": (Metrics, "__call__", 3),
    "in validation": (Validator, "__call__", 2),
    "in the first file of a checkpoint": (checkpoints, "write_synced", 5),
    "in the last file of a checkpoint": (checkpoints, "write_synced", 8),
    "between a checkpoint's files and its name": (checkpoints, "sync_folder", 3),
    "before old ones are deleted": (checkpoints, "prune", 2),
    "while old ones are deleted": (checkpoints.shutil, "rmtree", 4),
    "before the last checkpoint": (checkpoints, "write", 3),
    "before the LoRA is written": (run_module, "write_whole", 1),
    "before the options are written": (run_module, "write_whole", 2),
}


@pytest.mark.parametrize("where", KILLS)
def test_killed_and_resumed_is_as_if_never_killed(options, straight, tmp_path, monkeypatch, where):
    with monkeypatch.context() as context:
        break_at(context, *KILLS[where])
        with pytest.raises(Killed):
            train(context, tmp_path, *options, "--checkpoints_total_limit=1")
    train(monkeypatch, tmp_path, *options)
    assert_same_run(tmp_path, straight)


def assert_same_run(run, straight):
    """The same bytes, the same curves."""
    assert (run / LORA).read_bytes() == (straight / LORA).read_bytes()
    for name in ("optimizer.safetensors", LORA):
        assert (run / "checkpoint-6" / name).read_bytes() == (straight / "checkpoint-6" / name).read_bytes()
    assert points(run) == points(straight)


def points(run):
    """How often each step stands in each curve, and the curves that must repeat."""
    board = events(run / "logs")
    curves = {
        tag: [(point.step, point.value) for point in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
        if tag.split("/")[0] not in ("seconds", "images_per_second", "memory")
    }
    for tag, curve in curves.items():
        assert max(Counter(step for step, _ in curve).values()) == 1, tag
    assert [step for step, _ in curves["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in curves["validation/reward"]] == [0, 3, 6]
    return curves


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("place", "every", "step"),
    [
        (KILLS["in the rollout"], 0, 2),
        (KILLS["in the update"], 0, 4),
        (KILLS["in validation"], 0, 3),
        ((checkpoints, "prune", 1), 4, 4),
    ],
)
def test_a_signal_saves_and_stops(
    options, straight, tmp_path, monkeypatch, capsys, number, place, every, step
):
    # What is done of a step is left where it can be done again; an update, once begun, is finished and saved.
    with monkeypatch.context() as context:
        break_at(context, *place, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stopped:
            train(context, tmp_path, *options, f"--checkpointing_steps={every}")
    assert stopped.value.code == 128 + number
    assert (
        f"stopped by {number.name} after {step} steps; the same command resumes after step {step}"
        in capsys.readouterr().out
    )
    assert checkpoints.steps(tmp_path) == [step]
    train(monkeypatch, tmp_path, *options)
    assert_same_run(tmp_path, straight)


def test_a_finished_run_says_so(options, straight, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    train(monkeypatch, straight, *options)
    assert "finished before: 6 steps; LoRA in" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*")} == before


def test_a_damaged_checkpoint_is_passed_over(options, straight, tmp_path, monkeypatch, capsys):
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run" / LORA).unlink()
    state = tmp_path / "run" / "checkpoint-6" / "optimizer.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    train(monkeypatch, tmp_path / "run", *options)
    printed = capsys.readouterr()
    assert "optimizer.safetensors is damaged" in printed.err and "resuming after step 4" in printed.out
    assert_same_run(tmp_path / "run", straight)
    with pytest.raises(UserError, match="nowhere is not a whole checkpoint"):
        train(monkeypatch, tmp_path / "run", *options, "--resume_from_checkpoint=nowhere")


def test_options_that_change_the_result_are_refused(options, straight, tmp_path, monkeypatch):
    shutil.copytree(straight, tmp_path / "run")
    other = tmp_path / "other.txt"
    other.write_text("something else\n")
    changes = ["--learning_rate=0.5", "--rank=2", "--seed=3", "--max_train_steps=8", f"--prompts={other}"]
    with pytest.raises(UserError, match="holds a run of 6 steps with other options") as refused:
        train(monkeypatch, tmp_path / "run", *options, *changes, "--validation_steps=5")
    for line in ("learning_rate: 0.01 -> 0.5", "rank: 4 -> 2", "seed: 0 -> 3", "max_train_steps: 6 -> 8"):
        assert f"\n  {line}\n" in str(refused.value)
    assert "  prompts: " in str(refused.value) and "validation_steps" not in str(refused.value)


def test_changed_options_can_be_allowed(options, straight, tmp_path, monkeypatch):
    shutil.copytree(straight, tmp_path / "run")
    changes = ["--learning_rate=0.5", "--max_train_steps=8", "--lr_scheduler=constant", "--lr_warmup_steps=0"]
    train(monkeypatch, tmp_path / "run", *options, *changes, "--allow_changed_options")
    rates = [point.value for point in events(tmp_path / "run" / "logs").Scalars("learning_rate")]
    assert rates[6:] == [0.5, 0.5]


def test_more_steps_and_other_logging_are_harmless(options, tmp_path, monkeypatch):
    constant = ["--lr_scheduler=constant", "--lr_warmup_steps=0"]
    longer = train(monkeypatch, tmp_path / "longer", *options, *constant)
    train(monkeypatch, tmp_path / "run", *options, *constant, "--max_train_steps=3")
    changes = ["--validation_steps=0", "--checkpoints_total_limit=9", "--decode_batch_size=2"]
    extended = train(monkeypatch, tmp_path / "run", *options, *constant, *changes)
    longer, extended = (load(content) for content in (longer, extended))
    assert all((longer[key] - extended[key]).abs().max() < 1e-6 for key in longer)


def test_starting_anew_leaves_nothing_of_the_old_run(options, straight, tmp_path, monkeypatch):
    shutil.copytree(straight, tmp_path / "run")
    train(
        monkeypatch,
        tmp_path / "run",
        *options,
        "--seed=1",
        "--resume_from_checkpoint=none",
        "--max_train_steps=4",
    )
    assert sorted(checkpoints.steps(tmp_path / "run")) == [2, 4]
    assert (tmp_path / "run" / LORA).read_bytes() != (straight / LORA).read_bytes()
    assert [point.step for point in events(tmp_path / "run" / "logs").Scalars("loss")] == [1, 2, 3, 4]


def test_going_on_from_a_certain_checkpoint(options, straight, tmp_path, monkeypatch):
    train(monkeypatch, tmp_path, *options, f"--resume_from_checkpoint={straight / 'checkpoint-4'}")
    assert (tmp_path / LORA).read_bytes() == (straight / LORA).read_bytes()


def test_a_checkpoint_is_a_lora_for_diffusers(straight, tiny):
    pipeline = load_pipeline(tiny / "stable-diffusion-v1-4", "ddim", torch.float32, "cpu")
    pipeline.load_lora_weights(straight / "checkpoint-4")
    assert read_metadata(straight / "checkpoint-4")["step"] == 4


def test_a_full_disk_does_not_stop_training(options, straight, tmp_path, monkeypatch, capsys):
    def full():
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        break_at(context, checkpoints, "write_synced", 6, full)  # in the second checkpoint
        break_at(context, SummaryWriter, "add_scalar", 30, full)
        break_at(context, run_module, "write_whole", 1, full)
        with pytest.raises(UserError, match="cannot be written: .*No space left.* the same command again"):
            train(context, tmp_path, *options)
    train(monkeypatch, tmp_path, *options)
    message = capsys.readouterr().err
    assert message.count("WARNING: the curves end here") == 1
    assert "WARNING: checkpoint-4 could not be saved" in message and "No space left" in message
    assert sorted(checkpoints.steps(tmp_path)) == [2, 6]
    assert (tmp_path / LORA).read_bytes() == (straight / LORA).read_bytes()


def test_fp16_goes_on_with_its_scale(options, tmp_path, monkeypatch):
    # A scale that overflows at first is float16's business: those steps move nothing and are not counted.
    half = [*options, "--mixed_precision=fp16", "--grad_scale=100"]
    train(monkeypatch, tmp_path / "straight", *half)
    with monkeypatch.context() as context:
        break_at(context, *KILLS["before the last checkpoint"])
        with pytest.raises(Killed):
            train(context, tmp_path / "run", *half)
    assert checkpoints.steps(tmp_path / "run") and train(monkeypatch, tmp_path / "run", *half)
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    states = [
        json.loads((tmp_path / run / "checkpoint-6/state.json").read_text()) for run in ("run", "straight")
    ]
    progress = states[0]["progress"]
    assert progress == states[1]["progress"] and progress["nonfinite"] == 0
    assert progress["updates"] < 6 and progress["scaler"]["scale"] < 65536

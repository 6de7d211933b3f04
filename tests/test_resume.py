"""A run that is stopped, in whatever way and wherever, and started again is the run that was not stopped."""

import json
import os
import shutil
import signal
from collections import Counter
from functools import partial

import refl_lora
from refl.model import stable_diffusion
from refl.model.lora import read_metadata
from refl.model.pipeline import load_pipeline
from refl.system import checkpoints, ownership, randomness
from refl.system.errors import UserError
from refl.system.ownership import OutputFolder
from refl.train import identity
from refl.train.metrics import Metrics
from refl.train.options import Options
from refl.train.validation import Validator

import pytest
import torch
from conftest import (
    LORA,
    SMOOTH,
    assert_close_loras,
    events,
    run_in_process,
    weight_options,
    write_prompts,
)
from safetensors.torch import load, save
from tensorboard.summary.writer.record_writer import RecordWriter

SCHEDULE = "--max_train_steps 6 --lr_scheduler cosine --lr_warmup_steps 2 --learning_rate 1e-2".split()


@pytest.fixture(scope="module")
def options(shared, tiny) -> list[str]:
    """Options of a run of 6 steps with 2 micro-steps each, validated before, in the middle and after."""
    prompts = shared("prompts", write_prompts) / "prompts.txt"
    return [
        *weight_options(tiny), f"--prompts={prompts}", f"--validation_prompts={prompts}", *SCHEDULE,
        *"--num_inference_steps 4 --min_stop 2 --max_stop 3 --gradient_accumulation_steps 2".split(),
        *"--num_validation_images 3 --validation_steps 3 --checkpointing_steps 2".split(),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def straight(shared, options):
    """The folder of a run that nothing stopped."""

    def make(folder):
        with pytest.MonkeyPatch.context() as patch:
            train(patch, folder, *options)

    return shared("straight", make)


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
    "while old ones are deleted": (checkpoints.shutil, "rmtree", 1),
    "before the last checkpoint": (checkpoints, "write", 3),
    "before the LoRA is written": (OutputFolder, "write", 1),
    "before the options are written": (OutputFolder, "write", 2),
    "between a file's record and its name": (ownership, "sync_folder", 1),
}


DEFAULT_TIER = {
    "in the rollout",
    "in the update",
    "in validation",
    "in the first file of a checkpoint",
    "before old ones are deleted",
    "before the last checkpoint",
    "before the LoRA is written",
}


@pytest.mark.parametrize(
    "where", [pytest.param(where, marks=[pytest.mark.slow] * (where not in DEFAULT_TIER)) for where in KILLS]
)
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


# tests/test_signals.py has the other signals.
@pytest.mark.parametrize(
    ("place", "every", "step"),
    [
        (KILLS["in the rollout"], 0, 2),
        (KILLS["in the update"], 0, 4),
        (KILLS["in validation"], 0, 3),
        ((checkpoints, "prune", 1), 4, 4),
    ],
)
def test_a_signal_saves_and_stops(options, straight, tmp_path, monkeypatch, capsys, place, every, step):
    # What is done of a step is left where it can be done again; an update, once begun, is finished and saved.
    with monkeypatch.context() as context:
        break_at(context, *place, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as stopped:
            train(context, tmp_path, *options, f"--checkpointing_steps={every}")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert (
        f"stopped by SIGTERM after {step} steps; the same command resumes after step {step}"
        in capsys.readouterr().out
    )
    assert checkpoints.steps(tmp_path) == [step]
    train(monkeypatch, tmp_path, *options)
    assert_same_run(tmp_path, straight)


def test_a_finished_run_says_so(options, straight, monkeypatch, capsys):
    def times():
        return {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.name != "lock"}

    before = times()
    train(monkeypatch, straight, *options)
    assert "finished before: 6 steps; LoRA in" in capsys.readouterr().out
    assert times() == before


def test_a_damaged_checkpoint_is_passed_over(options, straight, tmp_path, monkeypatch, capsys):
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run" / LORA).unlink()
    state = tmp_path / "run" / "checkpoint-6" / "optimizer.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    train(monkeypatch, tmp_path / "run", *options)
    printed = capsys.readouterr()
    assert "optimizer.safetensors is damaged" in printed.err and "resuming after step 4" in printed.out
    assert_same_run(tmp_path / "run", straight)
    with pytest.raises(UserError, match="nowhere is not a complete checkpoint"):
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
    constant = ["--lr_scheduler=constant", "--lr_warmup_steps=0", *SMOOTH]
    longer = train(monkeypatch, tmp_path / "longer", *options, *constant)
    train(monkeypatch, tmp_path / "run", *options, *constant, "--max_train_steps=3")
    changes = ["--validation_steps=0", "--checkpoints_total_limit=9", "--decode_batch_size=2"]
    extended = train(monkeypatch, tmp_path / "run", *options, *constant, *changes)
    assert_close_loras(load(extended), load(longer))


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
        break_at(context, RecordWriter, "write", 30, full)
        break_at(context, OutputFolder, "write", 1, full)
        with pytest.raises(UserError, match="cannot be written: .*No space left.* the same command again"):
            train(context, tmp_path, *options)
    train(monkeypatch, tmp_path, *options)
    message = capsys.readouterr().err
    assert message.count("WARNING: the curves end here") == 1
    assert "WARNING: checkpoint-4 could not be saved" in message and "No space left" in message
    assert sorted(checkpoints.steps(tmp_path)) == [2, 6]
    assert (tmp_path / LORA).read_bytes() == (straight / LORA).read_bytes()


# -------------------------------------------------------------------------- checkpoints with another content


def rewrite(run, step, files):
    """Change files of a checkpoint, with checksums that fit; None leaves one out."""
    content = checkpoints.read(run / f"checkpoint-{step}")
    content |= {name: change(content.get(name)) for name, change in files.items()}
    shutil.rmtree(run / f"checkpoint-{step}")
    checkpoints.write(run, step, {name: value for name, value in content.items() if value is not None})


def state(**changes):
    """Change entries of state.json, each by a function of it."""

    def change(content):
        found = json.loads(content)
        return json.dumps(found | {name: change(found[name]) for name, change in changes.items()}).encode()

    return {"state.json": change}


def progress(**changes):
    return state(progress=lambda found: found | changes)


def tensors(name, *changes):
    """Replace the first tensors of a file: by a new name (None: the same) and value, or by nothing."""

    def change(content):
        found = load(content)
        for key, new in zip(sorted(found), changes, strict=False):
            found.pop(key)
            found |= {new[0] or key: new[1]} if new else {}
        return save(found, metadata={"refl": "{}"})

    return {name: change}


def of(content):
    return lambda _: content


OPTIMIZER, SMALL = "optimizer.safetensors", torch.zeros(2, 2)
OTHER_CONTENT = {
    "no state": {"state.json": of(None)},
    "no LoRA": {LORA: of(None)},
    "no optimizer": {OPTIMIZER: of(None)},
    "state empty": {"state.json": of(b"")},
    "state not text": {"state.json": of(b"\xff\xfe")},
    "state deep": {"state.json": of(b"[" * 100_000)},
    "state a list": {"state.json": of(b"[1]")},
    "progress a list": state(progress=of([1])),
    "unknown progress": progress(others=1),
    "step a text": progress(step="4"),
    "step a boolean": progress(step=True),
    "updates negative": progress(updates=-1),
    "validation a list": progress(validation=[1]),
    "guard a number": progress(guard=3),
    "guard of texts": progress(guard={"base": {"step": 1, "rewards": ["a"], "saturated": [0.0]}}),
    "guard a list": progress(guard={"best": [1]}),
    "scaler incomplete": progress(scaler={"scale": 1.0}),
    "fingerprint a list": state(fingerprint=of([])),
    "inputs a list": state(fingerprint=lambda found: found | {"inputs": [1]}),
    "LoRA a text": {LORA: of(b"text")},
    "LoRA without settings": {LORA: lambda content: save(load(content))},
    "LoRA of another shape": tensors(LORA, (None, SMALL)),
    "optimizer a text": {OPTIMIZER: of(b"text")},
    "optimizer of another shape": tensors(OPTIMIZER, (None, SMALL)),
    "optimizer of other names": tensors(OPTIMIZER, ("a.exp_avg", SMALL)),
    "optimizer of more matrices": tensors(OPTIMIZER, ("9999.exp_avg", SMALL)),
    "optimizer in part": tensors(OPTIMIZER, None, None, None),
    "best LoRA a text": {"best_lora_weights.safetensors": of(b"text")},
}


@pytest.mark.parametrize("name", OTHER_CONTENT)
def test_a_checkpoint_with_another_content_is_refused(options, straight, tmp_path, monkeypatch, name):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoint-6")
    rewrite(tmp_path, 4, OTHER_CONTENT[name])
    with pytest.raises(UserError, match="checkpoint"):
        train(monkeypatch, tmp_path, *options)
    assert sorted(checkpoints.steps(tmp_path)) == [2, 4]


# ----------------------------------------------------------------------------------------------- other inputs


def flip(file):
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle::4096] = bytes(byte ^ 1 for byte in content[middle::4096])
    file.write_bytes(content)


INPUTS = {
    "unet": "stable-diffusion-v1-4/unet/diffusion_pytorch_model.safetensors",
    "vae": "stable-diffusion-v1-4/vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "stable-diffusion-v1-4/text_encoder/model.safetensors",
    "tokenizer": "stable-diffusion-v1-4/tokenizer/vocab.json",
    "scheduler": "stable-diffusion-v1-4/scheduler/scheduler_config.json",
    "reward imagereward": "ImageReward.pt",
}


def test_a_resumed_run_notices_other_inputs(options, straight, tiny, tmp_path, monkeypatch, capsys):
    shutil.copytree(straight, tmp_path / "run")
    other, of_inputs = tmp_path / "tiny", identity.of_inputs
    shutil.copytree(tiny, other)
    moved = Options(
        reward_path=str(other), pretrained_model_name_or_path=str(other / "stable-diffusion-v1-4")
    )
    before = of_inputs(moved)
    assert before.keys() == INPUTS.keys()
    monkeypatch.setattr(identity, "of_inputs", lambda _: of_inputs(moved))
    for name, file in INPUTS.items():
        content = (other / file).read_bytes()
        flip(other / file)
        assert {key for key, value in of_inputs(moved).items() if value != before[key]} == {name}
        with pytest.raises(UserError, match=f"\n  files of {name}: [0-9a-f]+ -> [0-9a-f]+\n"):
            train(monkeypatch, tmp_path / "run", *options)
        (other / file).write_bytes(content)
    flip(other / INPUTS["unet"])
    train(monkeypatch, tmp_path / "run", *options, "--allow_changed_options")
    rewrite(tmp_path / "run", 6, state(fingerprint=lambda found: {**found, "inputs": None}))
    train(monkeypatch, tmp_path / "run", *options)  # as of an earlier version
    assert capsys.readouterr().out.count("finished before") == 2


def test_the_code_of_a_reward_is_one_of_the_inputs(tiny, tmp_path, monkeypatch):
    code = "def red(images, prompts): return images[:, 0].mean((1, 2))\n"
    (tmp_path / "coded_reward.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    options = Options(
        reward="coded_reward:red", pretrained_model_name_or_path=str(tiny / "stable-diffusion-v1-4")
    )
    before = identity.of_inputs(options)
    assert identity.of_inputs(options) == before
    (tmp_path / "coded_reward.py").write_text(code.replace("0", "1"))
    after = identity.of_inputs(options)
    assert {name for name in before if before[name] != after[name]} == {"reward coded_reward.red"}


# ------------------------------------------------------------------------------- numbers that are not finite


NAN_FROM = """
calls = []
def red(images, prompts):  # called 3 times for validation, then 4 times for each step
    calls.append(1)
    return images[:, 0].mean((1, 2)) * (float("nan") if len(calls) > 3 + 2 * 4 else 1)
"""


def test_too_many_nonfinite_steps_end_the_run_at_the_last_good_state(options, tmp_path, monkeypatch, capsys):
    (tmp_path / "nan_from.py").write_text(NAN_FROM)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="3 steps in a row had a loss or a gradient .* after step 2, is kept"):
        train(monkeypatch, tmp_path / "run", *options, "--reward=nan_from:red", "--max_nonfinite_steps=3")
    assert capsys.readouterr().err.count("skipped: not finite") == 3
    assert checkpoints.steps(tmp_path / "run") == [2] and checkpoints.newest(tmp_path / "run")


# With --grad_scale 9 to 18 the tiny model's gradients overflow at scales of 65536 and 32768, not below.
HALF = ["--mixed_precision=fp16", "--grad_scale=13", "--max_grad_norm=inf"]


@pytest.mark.slow
def test_fp16_resumes_with_its_scale(options, tmp_path, monkeypatch):
    # A scale that overflows at first is float16's business: those steps move nothing and are not counted.
    half = [*options, *HALF]
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
    assert progress["updates"] == 4 and progress["scaler"]["scale"] == 65536 / 4


def test_fp16_overflows_skips_and_trains_as_from_the_lower_scale(options, tmp_path, monkeypatch):
    """The same images at each step: those skipped for a gradient that overflows leave no trace."""
    noise, scaler = randomness.noise, torch.amp.GradScaler
    monkeypatch.setattr(randomness, "noise", lambda key, *rest: noise((key[0],), *rest))
    monkeypatch.setattr(randomness, "stop_index", lambda *_: 2)
    one = tmp_path / "one.txt"
    one.write_text("a red cat\n")
    same = ["--lr_scheduler=constant", "--lr_warmup_steps=0", "--validation_steps=0", f"--prompts={one}"]
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def watched(*arguments):
        norms.append(clip(*arguments))
        return norms[-1]

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    overflowing = train(monkeypatch, tmp_path / "run", *options, *same, *HALF)
    skipped = sum(not norm.isfinite() for norm in norms)
    assert skipped == 2 and all(norm.isfinite() for norm in norms[skipped:])
    losses = [point.value for point in events(tmp_path / "run" / "logs").Scalars("loss")]
    assert len(losses) == 6  # the loss was finite: it was the backward pass that overflowed
    progress = json.loads((tmp_path / "run/checkpoint-6/state.json").read_text())["progress"]
    assert (progress["updates"], progress["nonfinite"]) == (6 - skipped, 0)
    assert progress["scaler"]["scale"] == 65536 / 2**skipped

    norms.clear()
    monkeypatch.setattr(torch.amp, "GradScaler", partial(scaler, init_scale=65536 / 2**skipped))
    lower = train(monkeypatch, tmp_path / "low", *options, *same, *HALF, f"--max_train_steps={6 - skipped}")
    assert len(norms) == 6 - skipped and all(norm.isfinite() for norm in norms)
    overflowing, lower = load(overflowing), load(lower)
    assert all(torch.equal(overflowing[name], value) for name, value in lower.items())
    assert max(value.abs().max() for name, value in lower.items() if ".lora.up." in name) > 1e-3

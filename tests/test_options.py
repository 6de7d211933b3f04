"""Values of options that no machine could train with, and files of options: presets and those of runs."""

import json
import re
from dataclasses import asdict

import refl_lora
from refl.system.errors import UserError
from refl.train import options as module
from refl.train.options import Options, check_values, read_options, to_save

import pytest
from conftest import ROOT, run_command

WRONG = {
    "be 1 or more": {
        "rank": 0, "train_batch_size": 0, "gradient_accumulation_steps": 0, "decode_batch_size": 0,
        "rollout_batch_size": 0, "max_train_steps": 0, "num_inference_steps": 0, "num_validation_images": 0,
        "validation_images_per_prompt": 0, "checkpoints_total_limit": 0, "max_nonfinite_steps": 0,
    },
    "be 0 or more": {
        "lr_warmup_steps": -1, "min_stop": -1, "seed": -1, "validation_steps": -1, "checkpointing_steps": -1,
        "noise_distance_weight": -1, "pretrain_weight": float("nan"), "adam_weight_decay": float("inf"),
    },
    "be positive": {
        "learning_rate": float("nan"), "grad_scale": -1, "guidance_scale": 0, "draw_guidance_scale": 0,
        "adam_epsilon": 0, "lora_alpha": 0, "max_grad_norm": 0,
    },
    "be at least 0 and below 1": {"adam_beta1": 1, "adam_beta2": -0.1, "lora_shrinkage": 1},
    "be a number, or None": {"reward_target": float("nan")},
    "pip install bitsandbytes": {"use_8bit_adam": True},
}  # fmt: skip


@pytest.mark.parametrize("demand", WRONG)
def test_values_that_are_wrong_alone(demand, monkeypatch):
    monkeypatch.setattr("refl.train.options.find_spec", lambda name: None)
    for name, value in WRONG[demand].items():
        with pytest.raises(UserError, match=f"--{name} {value}: must .*{demand}"):
            check_values(Options(**{name: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_stop": 40}, "--max_stop 40: must be below --num_inference_steps 40"),
        ({"min_stop": 3, "max_stop": 2}, "--max_stop 2: must not be below --min_stop 3"),
        (
            {"train_batch_size": 3, "decode_batch_size": 2},
            "--decode_batch_size 2: must divide --train_batch_size 3",
        ),
        (
            {"low_memory": True, "decode_batch_size": 2},
            "--decode_batch_size 2: must be 1 with --low_memory",
        ),
        (
            {"guidance_scale": 1.0, "guidance_in": "rollout"},
            "--guidance_in rollout: must go with a --guidance_scale other than 1",
        ),
        (
            {"train_batch_size": 10**5},
            "--gradient_accumulation_steps 4: must be at most 10,000 divided by --train_batch_size 100000",
        ),
        ({"num_validation_images": 10**6}, "must be at most 10,000 divided by --num_validation_images"),
        ({"lr_warmup_steps": 5}, "take --lr_scheduler constant_with_warmup"),
        ({"early_stop": True, "validation_steps": 0}, "have --validation_steps above 0"),
    ],
)
def test_values_that_do_not_go_together(changes, message):
    with pytest.raises(UserError, match=message):
        check_values(Options(**changes))


def test_the_defaults_are_right():
    check_values(Options())


# ------------------------------------------------------------------------------------------- files of options


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder of presets in place of presets/, with the preset `own` of these options."""

    def write(content, name="own"):
        (tmp_path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path / f"{name}.json"

    monkeypatch.setattr(module, "PRESETS", tmp_path)
    return write


def test_every_preset_is_valid_and_in_the_help(monkeypatch, capsys):
    presets = sorted(path.stem for path in (ROOT / "presets").glob("*.json"))
    assert {"low_memory", "published"} <= set(presets)
    shown = run_command(refl_lora, monkeypatch, capsys, "--help").stdout
    for name in presets:
        check_values(read_options(["--preset", name]))
        description = json.loads((ROOT / "presets" / f"{name}.json").read_text())["description"]
        assert len(description) < 100 and f"  {name}: {description}\n" in shown


def test_the_published_preset_is_algorithm_1():
    published = read_options(["--preset=published"])
    images = published.train_batch_size * published.gradient_accumulation_steps * published.max_train_steps
    assert 2 * images == 6400 and published.guidance_scale == published.drawn_with == 1
    assert (published.num_inference_steps, published.min_stop, published.max_stop) == (40, 30, 39)


def test_the_guidance_to_draw_with_is_above_that_of_the_training():
    assert Options(guidance_scale=3.0).drawn_with == 4.5 and Options(guidance_scale=1.0).drawn_with == 1.0
    assert Options(guidance_scale=3.0, draw_guidance_scale=1.0).drawn_with == 1.0


def test_which_file_wins(files):
    run = asdict(Options(rank=2, seed=2, learning_rate=2.0, check=True, preset="other"))
    path = files(run, "options")
    files({"description": "mine", "seed": 3, "learning_rate": 3.0, "lora_alpha": None, "early_stop": True})
    read = read_options(["--preset", "own", f"--options_file={path}", "--learning_rate=4"])
    assert (read.rank, read.seed, read.learning_rate) == (2, 3, 4.0)
    assert read.early_stop and read.lora_alpha is None and not read.check
    assert not {"preset", "options_file", "description"} & to_save(read).keys()
    assert read_options(["--preset=own", "--no_early_stop"]).early_stop is False


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "own.json, line 1: not valid JSON"),
        ("[1]", "own.json cannot be read"),
        ({"rank": "many"}, "own.json: --rank=many is not an option or not a value"),
        ({"seed": 1, "ranks": 3}, "own.json: --ranks=3 is not an option or not a value"),
        ({"help": True}, "own.json: --help is not an option or not a value"),
        ({"rank": 0}, "--rank 0 (in ./own.json): must be 1 or more"),
        ({"rank": 10**12}, "--rank 1000000000000 (in ./own.json): must be a finite number, at most 4,096"),
        ({"learning_rate": float("nan")}, "--learning_rate nan (in ./own.json): must be a finite number"),
        ({"reward": "nothing"}, "--reward nothing (in ./own.json): nothing is not a reward"),
        ({"prompts": ["a"]}, "own.json: --prompts=['a'] is not an option or not a value"),
        ({"prompts": {}}, "own.json: --prompts={} is not an option or not a value"),
        ("[" * 100_000, "own.json, line 1: not valid JSON (nested too deeply)"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_the_file(files, tmp_path, content, message):
    path = files(content)
    message = message.replace("./", f"{tmp_path}/")
    for arguments in (["--preset", "own"], ["--options_file", str(path)]):
        with pytest.raises(UserError, match=re.escape(message)):
            check_values(read_options(arguments))


def test_hyphens_in_a_file(files):
    """Options of a command do not come from a file, however they are spelled."""
    path = files({"resume-from-checkpoint": "none", "learning-rate": 3.0})
    read = read_options([f"--options_file={path}"])
    assert (read.resume_from_checkpoint, read.learning_rate) == ("latest", 3.0)


def test_the_command_line_is_not_blamed_on_a_file(files):
    files({"rank": 2, "seed": 0})
    with pytest.raises(UserError, match="--rank 0: must"):
        check_values(read_options(["--preset=own", "--rank=0"]))


def test_an_unknown_preset_is_told_those_that_exist(monkeypatch, capsys):
    run = run_command(refl_lora, monkeypatch, capsys, "--preset", "nothing")
    assert run.returncode == 2 and run.stdout == "", run.stdout
    assert re.fullmatch(r"error: --preset nothing: no such preset; .*low_memory, published\.\n", run.stderr)

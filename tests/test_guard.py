"""Over-optimisation: when the guard stops training, the best LoRA, regularisers, pretraining images."""

import json
import math
import re
import shutil
from dataclasses import replace

import refl_lora
from refl.model.lora import read_metadata
from refl.reward import rewards
from refl.system import checkpoints
from refl.system.errors import UserError
from refl.train import captioned
from refl.train.guard import Guard, ValidationMeans, is_lower
from refl.train.models import Models
from refl.train.validation import Validator

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_scripts import LORA, events, run_in_process

RNG = np.random.default_rng(0)
NOISE = RNG.normal(0, 1, 64)  # of the images: the same at each validation
START = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def same_numbers():
    """Each test draws the same numbers, whichever ran before it."""
    RNG.bit_generator.state = START


def means(step, reward, held_out=0.0, saturated=0.1, diversity=1.0, spread=0.1) -> ValidationMeans:
    """A validation of 64 images with these means; `spread` is the standard deviation between validations."""
    scores = [NOISE + RNG.normal(mean, spread, 64) for mean in (reward, held_out)]
    saturated = np.abs(RNG.normal(saturated, spread / 10, 64))
    diversity = RNG.normal(diversity, spread, 32)
    return ValidationMeans(step, *map(list, (scores[0], saturated, scores[1], diversity)))


# ------------------------------------------------------------------------------------------------- the guard


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (means(30, 0.8, held_out=0.1), "the held-out reward fell"),
        (means(30, 0.8, held_out=0.6, diversity=0.1), "diversity fell to 1.%"),
        (means(30, 0.8, held_out=0.6, saturated=0.4), "saturated colours rose from 10% to 40%"),
        (means(30, 0.8, held_out=0.1, diversity=0.1), "the held-out reward fell .* and diversity fell"),
        (means(30, 0.8, held_out=0.6), None),  # better in everything
        (
            means(30, 0.8, held_out=0.49, diversity=0.7, saturated=0.12),
            None,
        ),  # within chance or tolerance
        (means(30, 0.1, held_out=0.1), None),  # the reward fell as well: no over-optimisation
    ],
)
def test_it_stops_when_the_reward_rises_and_something_else_gets_worse(last, reason):
    guard = Guard()
    for validation in (means(0, 0), means(10, 0.3, 0.3), means(20, 0.5, 0.5)):
        assert guard.update(validation) and guard.reason is None
    assert guard.best.step == 20
    is_best = guard.update(last)
    assert is_best == (reason is None and np.mean(last.held_out) > np.mean(guard.base.held_out) + 0.5)
    assert guard.best.step == (30 if is_best else 20)
    assert guard.reason is None  # once may be chance
    guard.update(replace(last, step=40))
    assert guard.reason is None if reason is None else re.search(reason, guard.reason)


def test_one_bad_validation_is_forgiven():
    guard = Guard()
    for validation in (means(0, 0), means(10, 0.3, -0.5), means(20, 0.5, 0.5), means(30, 0.8, -0.5)):
        guard.update(validation)
        assert guard.reason is None
    guard.update(means(40, 0.8, -0.5))
    assert guard.reason and guard.best.step == 20


def test_validations_that_are_not_finite_are_ignored():
    guard = Guard()
    assert not guard.update(means(0, math.nan)) and guard.base is None
    guard.update(means(10, 0))
    assert not guard.update(means(20, 1, math.nan)) and not guard.update(means(30, math.inf, 1))
    assert guard.best.step == 10 and guard.reason is None


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 31.821), (5, 3.365), (10, 2.764), (31, 2.453)]
)  # printed tables of Student's t, one-sided, 1 %
def test_is_lower_from_the_tabulated_quantile_on(freedom, quantile):
    spread = np.linspace(-1, 1, freedom + 1)
    spread /= spread.std(ddof=1) / len(spread) ** 0.5  # standard error 1
    for factor in (0.999, 1.001):
        assert is_lower(spread - factor * quantile, np.zeros(freedom + 1)) == (factor > 1)


def test_is_lower_of_a_constant_difference():
    assert is_lower([0.0] * 8, [1.0] * 8) and not is_lower([1.0] * 8, [0.0] * 8)


def test_prompts_that_differ_widely_in_diversity_do_not_hide_its_loss():
    guard, rng = Guard(), np.random.default_rng(0)
    guard.update(replace(means(0, 0), diversity=list(rng.exponential(0.15, 32))))
    for step, share, is_stopped in ((10, 0.5, False), (20, 0.15, False), (30, 0.15, True)):
        last = replace(means(step, step / 10, 1.0), diversity=list(rng.exponential(0.15 * share, 32)))
        guard.update(last)
        assert bool(guard.reason) == is_stopped, guard.reason
    assert re.search(r"diversity fell to \d+%", guard.reason)


def test_false_alarms_are_rare():
    """An unchanged model is called worse in about one validation in a hundred."""
    reference = NOISE
    false_alarms = sum(is_lower(reference + RNG.normal(0, 0.5, 64), reference) for _ in range(400))
    assert 0 <= false_alarms <= 12
    assert all(is_lower(reference - 0.5 + RNG.normal(0, 0.5, 64), reference) for _ in range(50))


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 1.0]])
def test_too_few_or_equal_values_are_not_lower(values):
    assert not is_lower(values, values)


def test_state_survives_json():
    guard = Guard()
    for validation in (means(0, 0), means(10, 0.3, 0.3), means(20, 0.8, -0.5)):
        guard.update(validation)
    assert guard.worse == 1
    guard.update(means(30, 0.9, -0.5))
    assert guard.reason
    assert Guard.from_state(json.loads(json.dumps(guard.state()))) == guard
    assert Guard.from_state({}) == Guard()


# ------------------------------------------------------------------------------------------------ in training


@pytest.fixture
def hacked(training_options, tmp_path, monkeypatch):
    """Options of a run whose reward can only rise if the held-out one falls."""
    (tmp_path / "two_rewards.py").write_text(
        "def red(images, prompts): return images[:, 0].mean((1, 2))\n"
        "def not_red(images, prompts): return -images[:, 0].mean((1, 2)).detach()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return [
        *training_options,
        *"--reward two_rewards:red --held_out_reward two_rewards:not_red --reward_target None".split(),
        *"--learning_rate 3e-2 --validation_steps 2 --validation_images_per_prompt 2".split(),
        *"--num_validation_images 4 --max_train_steps 8 --checkpointing_steps 3 --early_stop".split(),
    ]


def test_training_stops_early_and_keeps_the_best(hacked, tmp_path, monkeypatch, capsys):
    run_in_process(refl_lora, monkeypatch, *hacked)
    text = capsys.readouterr().out
    stopped = int(
        re.search(r"stopped early after step (\d): the reward still rises, but the held-out", text)[1]
    )
    assert stopped < 8 and "LoRA is that of step 0, the best," in text
    before, after = re.search(r"validation reward (\S+) -> (\S+)", text).groups()
    assert before == after  # that LoRA's
    out = tmp_path / "out"
    assert (out / LORA).read_bytes() == (out / "best" / LORA).read_bytes()
    assert read_metadata(out)["step"] == 0
    logs = events(out / "logs")
    curves = {tag: [point.value for point in logs.Scalars(f"validation/{tag}")] for tag in
              ("reward", "two_rewards.not_red", "saturated")}  # fmt: skip
    assert curves["reward"][-1] > curves["reward"][0]
    np.testing.assert_allclose(
        curves["reward"], [-value for value in curves["two_rewards.not_red"]], rtol=1e-5
    )
    with pytest.raises(KeyError):
        logs.Scalars("validation/diversity")  # of no reward that has features
    card = (out / "README.md").read_text()
    assert "chose the LoRA of step 0" in card and f"stopped the run after step {stopped}: the reward" in card
    # Again: it is finished, and mends what is missing.
    (out / LORA).unlink()
    run_in_process(refl_lora, monkeypatch, *hacked)
    assert f"finished before: {stopped} steps, where the reward still rises" in capsys.readouterr().out
    assert (out / LORA).read_bytes() == (out / "best" / LORA).read_bytes()
    # Who does not believe it goes on without it.
    run_in_process(refl_lora, monkeypatch, *hacked, "--no_early_stop", "--allow_changed_options")
    assert f"{8 - stopped} steps in" in capsys.readouterr().out
    assert read_metadata(out)["step"] == 8
    assert "chose the LoRA" not in (out / "README.md").read_text()


def test_a_resumed_guard_is_the_one_that_was_not_stopped(hacked, tmp_path, monkeypatch):
    run_in_process(refl_lora, monkeypatch, *hacked)
    state = json.loads(sorted((tmp_path / "out").glob("checkpoint-*"))[-1].joinpath("state.json").read_text())
    stopped = state["progress"]["step"]
    again = [*hacked, "--output_dir", tmp_path / "again", "--checkpointing_steps", 1]
    write = checkpoints.write

    def write_and_die(*arguments):
        write(*arguments)
        raise KeyboardInterrupt

    for _ in range(stopped):
        shutil.rmtree(tmp_path / "again" / "best", ignore_errors=True)  # it is in the checkpoint
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoints, "write", write_and_die)
            run_in_process(refl_lora, patch, *again)
    run_in_process(refl_lora, monkeypatch, *again)
    other = json.loads((tmp_path / "again" / f"checkpoint-{stopped}" / "state.json").read_text())
    assert other["progress"]["guard"] == state["progress"]["guard"]
    assert (tmp_path / "again" / "best" / LORA).read_bytes() == (
        tmp_path / "out" / "best" / LORA
    ).read_bytes()
    with pytest.raises(UserError, match="validation_steps"):
        run_in_process(refl_lora, monkeypatch, *again, "--validation_steps", 1)
    # What validations are compared by cannot change at all.
    with pytest.raises(UserError, match="num_validation_images: 4 -> 2") as caught:
        run_in_process(refl_lora, monkeypatch, *again, "--num_validation_images=2", "--allow_changed_options")
    assert "--allow_changed_options" not in str(caught.value)


def test_a_broken_held_out_reward_costs_no_steps(hacked, tmp_path, monkeypatch):
    source = "def broken(images, prompts): return images[:, 0].mean((1, 2)).detach() * float('nan')\n"
    (tmp_path / "broken_reward.py").write_text(source)
    options = [*hacked, "--held_out_reward", "broken_reward:broken", "--checkpointing_steps=0"]
    validate, calls = Validator.__call__, []

    def validate_later(validator, step, log):
        calls.append(step)
        if step == 0:  # before the first step it would be noticed at once
            [rewards, held_out], validator.scorers = validator.scorers, [validator.scorers[0]] * 2
            validation = validate(validator, step, log)
            validator.scorers = [rewards, held_out]
            return validation
        return validate(validator, step, log)

    monkeypatch.setattr(Validator, "__call__", validate_later)
    with pytest.raises(UserError, match="broken"):
        run_in_process(refl_lora, monkeypatch, *options)
    assert checkpoints.steps(tmp_path / "out") == [2]


def test_validation_shows_diversity_and_shrinkage_shrinks(training_options, tmp_path, monkeypatch):
    options = [*training_options, "--validation_images_per_prompt", 3, "--learning_rate", "1e-2"]
    run_in_process(refl_lora, monkeypatch, *options)
    [first, last] = events(tmp_path / "out" / "logs").Scalars("validation/diversity")
    assert 0 < first.value < 2 and 0 < last.value < 2
    shrunk = [
        *options,
        "--lora_shrinkage",
        "0.5",
        "--max_train_steps",
        1,
        "--output_dir",
        tmp_path / "shrunk",
    ]
    run_in_process(refl_lora, monkeypatch, *shrunk)
    run_in_process(
        refl_lora, monkeypatch, *options, "--max_train_steps", 1, "--output_dir", tmp_path / "plain"
    )
    shrunk, plain = (load_file(tmp_path / name / LORA) for name in ("shrunk", "plain"))
    for name, value in plain.items():
        torch.testing.assert_close(shrunk[name], value / 2 if ".up." in name else value, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("guidance_scale", "guidance_in", "drawn_with"),
    [(0.5, "rollout", None), (3.0, "gradient", None), (3.0, "both", None), (3.0, "gradient", 5.0),
     (3.0, "both", 1.0), (1.0, "both", 5.0)],
)  # fmt: skip
def test_validation_is_guided_throughout(
    training_options, monkeypatch, guidance_scale, guidance_in, drawn_with
):
    scales, predict, validate = [], Models.predict_together, Validator.__call__

    def counted(models, inputs):
        scales.extend(scale for *_, scale in inputs)
        return predict(models, inputs)

    monkeypatch.setattr(Models, "predict_together", counted)

    def watched(*arguments):
        before = len(scales)
        validation = validate(*arguments)
        assert set(scales[before:]) == {drawn_with or 1.5 * guidance_scale}
        return validation

    monkeypatch.setattr(Validator, "__call__", watched)
    guided = ["--guidance_scale", guidance_scale, "--guidance_in", guidance_in, "--max_train_steps", 1]
    guided += ["--draw_guidance_scale", drawn_with]
    run_in_process(refl_lora, monkeypatch, *training_options, *guided)
    assert (1.0 in scales) == (guidance_in != "both" or 1.0 in (guidance_scale, drawn_with))
    assert guidance_scale in scales


def test_diversity_is_the_mean_distance_of_all_pairs():
    features = torch.nn.functional.normalize(torch.randn(5, 4, 7), dim=-1)
    pairs = [[1 - own[i] @ own[j] for i in range(4) for j in range(4) if i != j] for own in features]
    expected = torch.tensor(pairs).mean(1)
    torch.testing.assert_close(rewards.diversity(features), expected, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------- images


@pytest.fixture
def folder(tmp_path):
    """Three images with captions beside them."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index, size in enumerate([(64, 64), (100, 80), (70, 200)]):
        Image.fromarray(RNG.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f" an image,\n number {index} ")
    return folder


def test_captions_are_read_from_either_kind_of_file(folder):
    expected = [(folder / f"{index}.png", f"an image, number {index}") for index in range(3)]
    assert captioned.read_captioned(folder) == expected
    lines = [json.dumps({"file_name": file.name, "text": text}) for file, text in reversed(expected)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    assert captioned.read_captioned(folder) == expected[::-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "1.txt").unlink(), "missing caption. Write it to .*1.txt"),
        (
            lambda f: (f / "metadata.jsonl").write_text('{"file_name": "0.png"}'),
            "metadata.jsonl, line 1: no text. Expected: ",
        ),
        (lambda f: (f / "metadata.jsonl").write_text("[]"), "metadata.jsonl, line 1 .* is not a JSON object"),
        (
            lambda f: (f / "metadata.jsonl").write_text('\n{"file_name": "9.png", "text": "a"}'),
            "no such image: .*9.png",
        ),
        (lambda f: [file.unlink() for file in f.iterdir()], "no image in this folder"),
        (lambda f: (f / "0.png").write_bytes(b"no image"), "0.png cannot be read: not an image"),
    ],
)
def test_mistakes_in_a_folder_of_images_are_named(folder, training_options, monkeypatch, change, message):
    change(folder)
    with pytest.raises(UserError, match=message):
        run_in_process(refl_lora, monkeypatch, *training_options, "--pretrain_data", folder)


def test_images_are_cropped_to_their_centre(folder):
    square = captioned.read_square(folder / "0.png", 64)
    exact = torch.from_numpy(np.array(Image.open(folder / "0.png"))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(square, exact, rtol=0, atol=1e-6)
    assert captioned.read_square(folder / "2.png", 48).shape == (3, 48, 48)
    assert captioned.read_square(folder / "2.png", 48).abs().max() <= 1


def test_pretraining_is_part_of_a_run_and_resumes(folder, training_options, tmp_path, monkeypatch):
    options = [*training_options, "--pretrain_data", folder, "--pretrain_weight", "0.5", "--max_train_steps"]
    run_in_process(refl_lora, monkeypatch, *options, 3)
    losses = events(tmp_path / "out" / "logs").Scalars("regularisers/pretraining")
    assert len(losses) == 3 and all(0.1 < loss.value < 10 for loss in losses)
    for steps in (1, 3):
        run_in_process(refl_lora, monkeypatch, *options, steps, "--output_dir", tmp_path / "again")
    assert (tmp_path / "out" / LORA).read_bytes() == (tmp_path / "again" / LORA).read_bytes()
    run_in_process(refl_lora, monkeypatch, *training_options, "--output_dir", tmp_path / "without")
    assert (tmp_path / "out" / LORA).read_bytes() != (tmp_path / "without" / LORA).read_bytes()
    (folder / "1.txt").write_text("another caption")
    with pytest.raises(UserError, match="pretrain_data"):
        run_in_process(refl_lora, monkeypatch, *options, 4)
    assert checkpoints.steps(tmp_path / "out")

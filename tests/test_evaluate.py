"""evaluate.py: the same noise for all, the statistics against other ways to have them, what is written."""

import csv
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import evaluate
from refl.model import drawing
from refl.model.lora import LORA_FILE, add_lora
from refl.model.pipeline import generate, load_lora, load_pipeline
from refl.model.stable_diffusion import load_stable_diffusion
from refl.report import page, settings, statistics
from refl.report.cases import Lora, find_cases, find_loras, image_seed
from refl.report.results import REWARD, Results, best_comparisons, compare
from refl.system.errors import UserError

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script, save_lora, visible, weight_options
from PIL import Image
from safetensors.torch import load_file, save_file
from test_diffusion import move_lora
from test_scripts import run_in_process

OUTPUTS = ["evaluation.json", "grid.png", "images", "images.csv", "prompts.csv", "report.html"]
LAUNCH = (
    "-m refl launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 "
    "--mixed_precision no --dynamo_backend no evaluate.py"
).split()


# ------------------------------------------------------------------------------------------------- statistics


def test_intervals_are_those_of_the_normal_approximation():
    values = np.random.default_rng(1).normal(0.3, 2, (4000, 1))
    mean, low, high = statistics.bootstrap(values)[:, 0]
    error = 1.96 * values.std() / len(values) ** 0.5
    assert mean == values.mean()
    assert (low, high) == pytest.approx((mean - error, mean + error), abs=0.03 * error)


def test_intervals_are_those_of_plain_resampling():
    values = np.random.default_rng(2).exponential(size=9)  # few and skewed: not normal
    generator = np.random.default_rng(3)
    means = [generator.choice(values, len(values)).mean() for _ in range(20_000)]
    _, low, high = statistics.bootstrap(values)
    assert (low, high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(4)
    _, low, high = statistics.bootstrap(generator.normal(size=(60, 400)))  # 400 studies of 60 prompts
    assert 0.91 < ((low < 0) & (high > 0)).mean() < 0.98


def test_intervals_of_what_does_not_vary():
    assert statistics.bootstrap(np.array([[0.5, 1.5]])).tolist() == [[0.5, 1.5]] * 3  # one prompt
    assert not statistics.bootstrap(np.zeros((5, 2, 3))).any()


def test_intervals_do_not_depend_on_memory(monkeypatch):
    values = np.random.default_rng(5).normal(size=(30, 2))
    whole = statistics.bootstrap(values)
    monkeypatch.setattr(statistics, "MAX_VALUES", 100)
    np.testing.assert_allclose(statistics.bootstrap(values), whole, atol=0.03)


def test_all_columns_are_resampled_together():
    column = np.random.default_rng(6).normal(size=40)
    one, three_times, shifted = statistics.bootstrap(np.stack([column, 3 * column, column + 1], 1)).T
    np.testing.assert_allclose(three_times, 3 * one)
    np.testing.assert_allclose(shifted, one + 1)


def test_outcomes_count_every_pair():
    difference = np.array([[0.02, -0.02, 0.01], [-0.01, 0.0, 5.0]])
    assert statistics.outcomes(difference, 0.01) == {"win": 2, "tie": 3, "loss": 1}


def test_seeds_are_all_different():
    seeds = {image_seed(s, i, j) for s in range(3) for i in range(20) for j in range(10)}
    assert len(seeds) == 600 and image_seed(0, 3, 1) == image_seed(0, 3, 1)


# ------------------------------------------------------------------------------------------------- the script


def make_lora(tiny, folder: Path, rank: int, scale: float = 0.5, **metadata) -> Path:
    parts = load_stable_diffusion(tiny / "stable-diffusion-v1-4", torch.float32, "cpu")
    lora = add_lora(parts.unet, rank, rank, seed=0)
    move_lora(lora, scale)
    folder.mkdir(parents=True)
    save_lora(parts.unet, folder, {"step": rank, **metadata})
    return folder


# With HOLD naming an evaluation's folder, scoring waits there to be killed.
HELD_OUT = """
import os, time
from pathlib import Path

def red(images, prompts):
    while "HOLD" in os.environ and list(Path(os.environ["HOLD"]).glob("images/*/*.png")):
        time.sleep(0.02)
    return images[:, 0].mean((1, 2))
"""


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """A folder of two LoRAs of different ranks, a reward, prompts; and the options to evaluate them."""
    folder = tmp_path_factory.mktemp("world")
    make_lora(tiny, folder / "lora", 5)
    make_lora(tiny, folder / "lora" / "checkpoint-2", 2)
    (folder / "held_out.py").write_text(HELD_OUT)
    (folder / "prompts.txt").write_text("a red cat\na blue dog\n<b>three</b> apples\n")
    return folder


@pytest.fixture
def options(tiny, world, monkeypatch):
    monkeypatch.syspath_prepend(str(world))
    return [
        *weight_options(tiny), f"--prompts={world / 'prompts.txt'}", "--held_out_reward=held_out:red:2",
        *"--num_images_per_prompt 2 --num_inference_steps 2 --batch_size 4".split(),
        *"--guidance_scale 2 --base_guidance_scale None".split(),
    ]  # fmt: skip


@pytest.fixture
def count_drawn(monkeypatch):
    """Seeds of all images drawn from now on."""
    seeds, generate = [], drawing.generate

    def counting(pipeline, prompts, own, *arguments):
        seeds.extend(own)
        return generate(pipeline, prompts, own, *arguments)

    monkeypatch.setattr(drawing, "generate", counting)
    return seeds


def read_rows(file: Path) -> list[dict]:
    with open(file, newline="") as content:
        return list(csv.DictReader(content))


def test_what_is_written(options, world, tiny, tmp_path, monkeypatch, capsys):
    loras = world / "lora", world / "lora" / "checkpoint-2"
    run_in_process(evaluate, monkeypatch, *options, "--output_dir", tmp_path, "--lora_paths", *loras)
    shown = capsys.readouterr().out
    assert "win / tie / loss" in shown and f"report: {tmp_path / 'report.html'}" in shown
    assert "intervals over 3 prompts are too narrow" in shown
    assert visible(tmp_path) == sorted([*OUTPUTS, "settings.json"])

    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["measures"] == ["reward", "held_out.red", "saturated", "diversity"]
    base, *others = found["cases"]
    assert [(c["name"], c["step"]) for c in others] == [("lora", 5), ("lora/checkpoint-2", 2)]
    assert base["name"] == "base" and base["lora_path"] is None and base["against_base"] is None
    rows = read_rows(tmp_path / "images.csv")
    assert len(rows) == 3 * 3 * 2 and [row["seed"] for row in rows[:6]] == [row["seed"] for row in rows[6:12]]
    assert all((tmp_path / "images" / case["folder"] / "2_1.png").exists() for case in found["cases"])
    for case in others:  # the figures, from the table of images
        scores = [[float(r["held_out.red"]) for r in rows if r["case"] == n] for n in (case["name"], "base")]
        own, without = np.array(scores)
        against = case["against_base"]["held_out.red"]
        assert case["means"]["held_out.red"]["mean"] == pytest.approx(own.mean())
        assert against["difference"] == pytest.approx((own - without).mean(), abs=1e-7)
        assert against["low"] <= against["difference"] <= against["high"]
        assert (
            against["win"] == (own - without > 0.01).sum() and against["loss"] == (without - own > 0.01).sum()
        )
        assert "win" not in case["against_base"]["diversity"]
    by_prompt = read_rows(tmp_path / "prompts.csv")
    assert len(by_prompt) == 3 * 3 and by_prompt[0]["reward_difference"] == ""
    red = [float(row["held_out.red"]) for row in rows[10:12]]
    assert float(by_prompt[5]["held_out.red"]) == pytest.approx(np.mean(red))

    # A LoRA of another rank in place of the former draws what a fresh pipeline with it draws.
    for lora, name in zip(loras, ("lora", "checkpoint-2"), strict=True):
        (folder,) = (tmp_path / "images").glob(f"{name}-*")
        assert len(list(folder.iterdir())) == 6
        pipeline = load_pipeline(tiny / "stable-diffusion-v1-4", "pndm", torch.float32, "cpu")
        load_lora(pipeline, lora, 1.0)
        drawn = generate(pipeline, ["a blue dog"], [image_seed(0, 1, 1)], 2, 2.0)[0]
        saved = np.asarray(Image.open(folder / "1_1.png"), int)
        assert abs(saved - (drawn * 255).round().permute(1, 2, 0).numpy()).max() <= 1


class Page(html.parser.HTMLParser):
    """Tags that are open, images, and all that a page would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.images, self.fetched = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)
        if tag == "img":
            self.images.append(attrs)
        sources = [attrs.get(key) or "" for key in ("src", "href", "xlink:href")]
        self.fetched += [source for source in sources if source and not source.startswith(("data:", "#"))]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "br", "img"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize(
    "measure, low, high, expected",
    [
        ("reward", 0.1, 0.2, "better"),
        ("reward", -0.2, -0.1, "worse"),
        ("reward", -0.1, 0.1, ""),
        ("diversity", -0.2, -0.1, "worse"),
        ("diversity", 0.1, 0.2, ""),
        ("saturated", 0.1, 0.2, "worse"),
        ("saturated", -0.2, -0.1, ""),
    ],
)
def test_losses_are_marked_like_gains(measure, low, high, expected):
    against = {"low": low, "high": high} | ({"win": 1} if measure == "reward" else {})
    assert page.significance(against, measure) == expected


def test_the_command_in_the_report_finds_the_rewards_again(monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--output_dir", "my results"])
    monkeypatch.setenv("PYTHONPATH", "demo")
    assert settings.occasion()["command"] == "PYTHONPATH=demo python evaluate.py --output_dir 'my results'"
    monkeypatch.delenv("PYTHONPATH")
    assert settings.occasion()["command"] == "python evaluate.py --output_dir 'my results'"


def test_a_sweep_and_its_report(options, world, tmp_path, monkeypatch, capsys, count_drawn):
    sweep = ["--sweep_lora_scale", "0,0.5,1", "--sweep_guidance", "1,2", "--num_prompts", "2"]
    run_in_process(
        evaluate, monkeypatch, *options, *sweep, "--output_dir", tmp_path, "--lora_paths", world / "lora"
    )
    shown = capsys.readouterr().out
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    cases = evaluation["cases"]
    assert [case["name"] for case in cases] == [
        "base guidance 1", "base guidance 2", "lora scale 0.5 guidance 1", "lora scale 0.5 guidance 2",
        "lora scale 1 guidance 1", "lora scale 1 guidance 2",
    ]  # fmt: skip
    assert len(count_drawn) == 6 * 2 * 2  # scale 0 is the base, not drawn twice
    differences = [case["against_base"]["reward"]["difference"] for case in cases[2:]]
    assert differences[1] == pytest.approx(
        cases[3]["means"]["reward"]["mean"] - cases[1]["means"]["reward"]["mean"], abs=1e-6
    )
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert not page.open and not page.fetched and "<script" not in text and len(text) < 10_000_000
    assert text.startswith("<!doctype html>") and "prefers-color-scheme: dark" in text
    assert len(page.images) >= 8 and all(image["alt"] and "base64," in image["src"] for image in page.images)
    for measure in ("reward", "held_out.red", "diversity"):
        assert f"{measure} by scale and guidance" in text
    table = text[text.index("<h2>All cases</h2>") :].partition("</table>")[0]
    assert table.count("<tr>") == 1 + len(cases) and all(
        f"<td>{case['name']}</td>" in table for case in cases
    )
    best = evaluation["best_against_best"]
    assert best["criterion"] == "held_out.red" and len(best["loras"]) == 2  # scales
    assert "highest held_out.red" in shown and "Best against best" in text
    assert "own guidance" not in text  # the base model at its own guidance is among the best
    # Without the sweep: the same images, none drawn again.
    count_drawn.clear()
    run_in_process(
        evaluate, monkeypatch, *options, "--num_prompts=2", "--output_dir", tmp_path, "--lora_paths",
        world / "lora",
    )  # fmt: skip
    assert not count_drawn


def test_each_lora_is_drawn_with_its_guidance_and_no_base_is_left_out(
    options, tiny, tmp_path, monkeypatch, capsys
):
    loras = [
        make_lora(tiny, tmp_path / "one", 2, guidance_scale=1.0),
        make_lora(tiny, tmp_path / "three", 3, guidance_scale=2.0, draw_guidance_scale=3.0),
        make_lora(tiny, tmp_path / "other", 4),
    ]
    run = [*options, "--guidance_scale=None", "--base_guidance_scale=7.5", "--output_dir", tmp_path / "out"]
    run_in_process(evaluate, monkeypatch, *run, "--lora_paths", *loras)
    shown = capsys.readouterr().out
    assert f"guidance 3 (named by the LoRA's file): {loras[1]}\n" in shown
    assert f"guidance 7.5 (the default; the LoRA's file names none): {loras[2]}\n" in shown
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    bases = ["base guidance 1", "base guidance 3", "base guidance 7.5"]
    names = [*bases, "one guidance 1", "three guidance 3", "other guidance 7.5"]
    assert [case["name"] for case in evaluation["cases"]] == names
    rows = read_rows(tmp_path / "out" / "images.csv")
    scores = {name: [float(row["reward"]) for row in rows if row["case"] == name] for name in names}
    for case, base in zip(evaluation["cases"][3:], bases, strict=True):
        own = np.array(scores[case["name"]])
        for against, other in (("against_base", base), ("against_default_base", bases[2])):
            if against == "against_default_base" and base == other:
                assert case[against] is None
                continue
            expected = (own - scores[other]).mean()
            found = case[against]["reward"]
            assert found["difference"] == pytest.approx(expected, abs=1e-6)
            assert found["low"] <= found["difference"] <= found["high"]
            assert found["win"] == (own - scores[other] > 0.01).sum()
            difference = f"{found['difference']:+.3f}"
            assert re.search(rf"{re.escape(difference)} .*%", shown), difference
            assert difference in (tmp_path / "out" / "report.html").read_text()
    assert "Against the base model at its own guidance, 7.5" in (tmp_path / "out" / "report.html").read_text()
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.height > 3 * 256  # both bases above the LoRA

    run_in_process(evaluate, monkeypatch, *run, "--guidance_scale=7.5", "--lora_paths", loras[0])
    shown = capsys.readouterr().out
    assert "guidance 7.5 (--guidance_scale; the LoRA's file names 1)\n" in shown
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [case["name"] for case in evaluation["cases"]] == ["base", "one"]


def made_up_results(criterion: str) -> Results:
    """Two LoRAs and the base model at three guidances, with scores from a fixed random stream."""
    loras = [Lora(name, name, name, None) for name in "ab"]
    cases = find_cases(loras, 1.0, [1, 1], 7.5, sweep_guidance="1,2,3")
    generator = np.random.default_rng(0)
    scores = {name: generator.normal(size=(len(cases), 20, 2)) for name in (REWARD, "judge")}
    return Results(cases, 4, ["p"] * 20, [], [REWARD, "judge"], scores, None, 7.5, criterion)


@pytest.mark.parametrize("criterion", [REWARD, "judge"])
def test_the_best_is_compared_with_the_best(criterion):
    results = made_up_results(criterion)
    means = results.scores[criterion].mean((1, 2))
    evaluation = compare(results, dict.fromkeys(results.rewards, 0.01))
    best = evaluation["best_against_best"]
    assert best["criterion"] == criterion and best["base"] == means[:4].argmax()  # 7.5 is a chance as well
    assert [own["case"] for own in best["loras"]] == [4 + means[4:7].argmax(), 7 + means[7:].argmax()]
    for (case, base, differences), own in zip(best_comparisons(evaluation), best["loras"], strict=True):
        assert evaluation["cases"].index(case) == own["case"]
        assert evaluation["cases"].index(base) == best["base"]
        for name, scores in results.scores.items():
            by_image = scores[own["case"]] - scores[best["base"]]
            _, low, high = statistics.bootstrap(by_image.mean(1))
            found = differences[name]
            assert found["difference"] == pytest.approx(by_image.mean())
            assert (found["low"], found["high"]) == pytest.approx((low, high))
            assert {key: found[key] for key in ("win", "tie", "loss")} == statistics.outcomes(by_image, 0.01)
    for case in evaluation["cases"][4:]:
        assert case["against_default_base"]["judge"]["difference"] == pytest.approx(
            case["means"]["judge"]["mean"] - evaluation["cases"][3]["means"]["judge"]["mean"]
        )


def test_curves_by_training_step_and_names_that_are_not_markup(options, world, tmp_path, monkeypatch):
    loras = sorted(path.parent for path in (world / "lora").rglob("*.safetensors"))
    run_in_process(evaluate, monkeypatch, *options, "--output_dir", tmp_path, "--lora_paths", *loras)
    text = (tmp_path / "report.html").read_text()
    assert "reward by training step" in text and "by scale and guidance" not in text
    assert "&lt;b&gt;three&lt;/b&gt; apples" in text and "<b>three" not in text


def test_what_is_there_is_not_drawn_again(options, world, tmp_path, monkeypatch, count_drawn):
    run = [*options, "--output_dir", tmp_path, "--lora_paths", world / "lora"]
    run_in_process(evaluate, monkeypatch, *run)
    first = json.loads((tmp_path / "evaluation.json").read_text())
    files = sorted(tmp_path.glob("images/*/*.png"))
    times = {file: file.stat().st_mtime_ns for file in files}
    for file in files[3:5]:
        file.unlink()
        times.pop(file)
    count_drawn.clear()
    run_in_process(evaluate, monkeypatch, *run)
    assert len(count_drawn) == 2
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    again = json.loads((tmp_path / "evaluation.json").read_text())
    for before, after in zip(first["cases"], again["cases"], strict=True):
        assert before["means"]["reward"]["mean"] == pytest.approx(after["means"]["reward"]["mean"], abs=1e-2)

    # More prompts, more images of each, another LoRA.
    (tmp_path / "more.txt").write_text((world / "prompts.txt").read_text() + "a hill at night\n")
    count_drawn.clear()
    more = ["--prompts", tmp_path / "more.txt", "--num_images_per_prompt", "3"]
    run_in_process(evaluate, monkeypatch, *run, world / "lora" / "checkpoint-2", *more)
    assert len(count_drawn) == 2 * (4 * 3 - 3 * 2) + 4 * 3
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())

    # Anything else is another evaluation.
    with pytest.raises(
        UserError, match="--sampler was pndm, is now ddim; --seed was 0, is now 1. Choose another"
    ):
        run_in_process(evaluate, monkeypatch, *run, "--sampler", "ddim", "--seed", "1")
    (tmp_path / "other.txt").write_text("a red cat\na blue dot\n")
    with pytest.raises(UserError, match="prompt 1 was 'a blue dog', is now 'a blue dot'"):
        run_in_process(evaluate, monkeypatch, *run, "--prompts", tmp_path / "other.txt")
    assert json.loads((tmp_path / "settings.json").read_text())["prompts"][3] == "a hill at night"

    damaged = files[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(UserError, match=f"{damaged.name}: not the image that was drawn there. Delete it"):
        run_in_process(evaluate, monkeypatch, *run)


def test_weights_are_known_by_content(options, tiny, world, tmp_path, monkeypatch, count_drawn):
    model, prompts = tmp_path / "model", tmp_path / "twice.txt"
    shutil.copytree(tiny / "stable-diffusion-v1-4", model)
    prompts.write_text("a red cat\na red cat\n")
    run = [*options, "--output_dir", tmp_path / "out", "--lora_paths", world / "lora", "--prompts", prompts,
           "--pretrained_model_name_or_path", model, "--num_images_per_prompt=1"]  # fmt: skip
    run_in_process(evaluate, monkeypatch, *run)
    assert len(count_drawn) == 2  # twice the same prompt is one
    weights = next((model / "unet").glob("*.safetensors"))
    tensors = load_file(weights)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name] *= 1.5
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="the model's files was .*Choose another --output_dir"):
        run_in_process(evaluate, monkeypatch, *run)

    [lora] = find_loras([str(world / "lora")])
    pipeline = SimpleNamespace(get_list_adapters=dict)
    monkeypatch.setattr(evaluate, "unload_lora", lambda pipeline: None)
    with pytest.raises(UserError, match="has changed since"):
        evaluate.set_lora(pipeline, replace(lora, digest="0"), 1.0, True)


def test_each_training_has_a_curve_of_its_own():
    def case(path, step, reward):
        mean = {"mean": reward, "low": reward - 1, "high": reward + 1}
        own = {"lora_path": path, "step": step, "lora_scale": 1.0, "guidance_scale": 1.0}
        return own | {"means": {"reward": mean}, "against_base": path and {"reward": mean}}

    cases = [case(None, None, 0), case("a/checkpoint-50", 50, 1), case("a", 100, 2),
             case("b/checkpoint-50", 50, 3), case("c/checkpoint-50", 50, 4)]  # fmt: skip
    evaluation = {"measures": ["reward"], "cases": cases}
    [one] = page.curves(evaluation)
    cases += [case("b/best", 70, 5)]
    [two] = page.curves(evaluation)
    texts = [set(re.findall(r"<text[^>]*>([^<]*)</text>", svg)) for svg in (one, two)]
    assert not {"a", "b"} & texts[0] and {"a", "b"} <= texts[1] and "c" not in texts[1]  # a legend for two


def test_a_lora_that_does_nothing_changes_nothing(options, tiny, tmp_path, monkeypatch):
    lora = make_lora(tiny, tmp_path / "nothing", 2, scale=0.0)
    run_in_process(evaluate, monkeypatch, *options, "--output_dir", tmp_path / "out", "--lora_paths", lora)
    case = json.loads((tmp_path / "out" / "evaluation.json").read_text())["cases"][1]
    for measure, against in case["against_base"].items():
        assert (against["difference"], against["low"], against["high"]) == pytest.approx((0, 0, 0), abs=1e-6)
        assert against.get("tie", 6) == 6, measure


@pytest.mark.slow
def test_two_processes_go_on_after_a_kill_and_find_what_one_finds(options, world, tmp_path, monkeypatch):
    run = [*options, "--lora_paths", world / "lora", "--num_images_per_prompt", "3"]
    two = [*map(str, run), "--output_dir", tmp_path / "two"]
    settings = {"PYTHONPATH": str(world), "HOLD": str(tmp_path / "two")}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    killed = subprocess.Popen(
        [sys.executable, "evaluate.py", *two], cwd=ROOT, env={**os.environ, **settings}, **quiet
    )
    while not list(tmp_path.glob("two/images/*/*.png")) and killed.poll() is None:
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "two" / "report.html").exists()

    two = run_script(sys.executable, *LAUNCH, *two, PYTHONPATH=str(world))
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("win / tie / loss") == 1 and two.stderr.count("scoring: 100%") <= 2
    run_in_process(evaluate, monkeypatch, *run, "--output_dir", tmp_path / "one")
    rows = [read_rows(tmp_path / name / "images.csv") for name in ("one", "two")]
    assert len(rows[0]) == 2 * 3 * 3
    for one, two in zip(*rows, strict=True):
        assert one["seed"] == two["seed"] and one["prompt"] == two["prompt"]
        assert float(one["held_out.red"]) == pytest.approx(float(two["held_out.red"]), abs=1e-3)
    found = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two")]
    assert [case["name"] for case in found[0]["cases"]] == [case["name"] for case in found[1]["cases"]]


def test_without_features_or_pairs_there_is_no_diversity(options, world, tmp_path, monkeypatch, capsys):
    run = [*options, "--lora_paths", world / "lora"]
    own = ["--reward", "held_out:red", "--held_out_reward", "None", "--reward_path", tmp_path / "nowhere"]
    run_in_process(evaluate, monkeypatch, *run, *own, "--output_dir", tmp_path / "own")
    assert "no diversity: no reward has image features" in capsys.readouterr().out
    one = ["--num_images_per_prompt", "1", "--num_prompts", "1"]
    run_in_process(evaluate, monkeypatch, *run, *one, "--output_dir", tmp_path / "one")
    assert "no diversity: --num_images_per_prompt must be 2" in capsys.readouterr().out
    found = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    assert found["measures"] == ["reward", "held_out.red", "saturated"]


def test_names_are_short_and_no_lora_counts_twice(world, tiny, tmp_path, capsys):
    folder = tmp_path / "run"
    make_lora(tiny, folder, 2, about=1)
    make_lora(tiny, folder / "base", 2, about=2)
    (folder / "same.safetensors").write_bytes((folder / LORA_FILE).read_bytes())
    paths = [str(folder), str(folder / "base" / LORA_FILE), str(folder / "same.safetensors")]
    assert [lora.name for lora in find_loras(paths)] == ["run", "run/base"]
    assert "same.safetensors is the same LoRA as" in capsys.readouterr().out
    assert [lora.name for lora in find_loras(paths[1:2])] == ["LoRA base"]


def test_as_trained_is_one_way(options, world, tiny, tmp_path, monkeypatch):
    trained = {"guidance_scale": 3.0, "sampler": "ddim", "num_inference_steps": 2, "lora_in_uncond": False}
    lora = make_lora(tiny, tmp_path / "lora", 2, **trained, draw_guidance_scale=5.0)
    other = make_lora(tiny, tmp_path / "other", 2, **trained | {"sampler": "ddpm"})
    run = [*options, "--guidance_scale=None", "--as_trained", "--output_dir", tmp_path / "out"]
    run += ["--lora_paths", lora]
    with pytest.raises(UserError, match="lora was trained with --sampler ddim, .*other with --sampler ddpm"):
        run_in_process(evaluate, monkeypatch, *run, other)
    assert not (tmp_path / "out").exists()
    run_in_process(evaluate, monkeypatch, *run, "--num_prompts", "1")
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (settings["sampler"], settings["lora_in_uncond"]) == ("ddim", False)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["cases"][0]["guidance_scale"] == 3.0


MISTAKES = {
    "--lora_paths nowhere": "no LoRA at nowhere",
    "--lora_paths README.md": "README.md is not called .safetensors",
    "--prompts README.md": "prompts are read from",
    "--num_prompts 0": "--num_prompts 0: must be 1 or more",
    "--num_images_per_prompt 0": "--num_images_per_prompt 0: must be 1 or more",
    "--tie_margin -1": "--tie_margin -1.0: must be 0 or more",
    "--sweep_lora_scale 1,x": "--sweep_lora_scale 1,x: expected numbers",
    "--sweep_lora_scale 0": "nothing to compare",
    "--lora_scale 0": "nothing to compare",
    "--sweep_guidance nan": "must be a finite number",
    "--held_out_reward imagereward": "imagereward is in --reward, so it is not held out",
    "--held_out_reward held_out:blue": "there is no blue",
    "--reward_path nowhere": "nowhere/ImageReward.pt",
    "--output_dir README.md/out": "README.md is not a folder",
    "--output_dir /proc/refl": "cannot be written",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(options, world, tmp_path, monkeypatch, mistake):
    run = [*options, "--output_dir", tmp_path / "out", "--lora_paths", world / "lora"]
    with pytest.raises(UserError, match=MISTAKES[mistake]):
        run_in_process(evaluate, monkeypatch, *run, *mistake.split())
    assert not (tmp_path / "out").exists()


def test_a_reward_that_fails_does_so_before_the_drawing(options, world, tmp_path, monkeypatch, count_drawn):
    (world / "broken.py").write_text("def red(images, prompts): return images.mean()\n")
    with pytest.raises(UserError, match="the reward broken.red of --(held_out_)?reward returned a tensor"):
        run_in_process(
            evaluate, monkeypatch, *options, "--held_out_reward", "broken:red", "--output_dir",
            tmp_path / "out", "--lora_paths", world / "lora",
        )  # fmt: skip
    assert not count_drawn and not (tmp_path / "out").exists()


def test_a_lora_that_does_not_fit_is_found_before_the_drawing(
    options, world, tmp_path, monkeypatch, count_drawn
):
    weights = {name: torch.cat([w, w], -1) for name, w in load_file(world / "lora" / LORA_FILE).items()}
    save_file(weights, tmp_path / "other.safetensors", metadata={"format": "pt"})
    loras = world / "lora", tmp_path / "other.safetensors"
    with pytest.raises(UserError, match="does not fit this model"):
        run_in_process(
            evaluate, monkeypatch, *options, "--output_dir", tmp_path / "out", "--lora_paths", *loras
        )
    assert not count_drawn


@pytest.mark.slow
def test_a_mistake_is_one_message_for_two_processes(options, world, tmp_path):
    command = [sys.executable, *LAUNCH, *options, "--lora_paths", "nowhere", "--output_dir", tmp_path]
    run = run_script(*command, PYTHONPATH=str(world))
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert run.stderr.count("error: ") == run.stderr.count("error: no LoRA at nowhere") == 1


def test_a_full_disk_is_said(options, world, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("refl.system.ownership.write_synced", full)
    run = [*options, "--output_dir", tmp_path, "--lora_paths", world / "lora"]
    with pytest.raises(UserError, match="No space left on device. The same command resumes from here"):
        run_in_process(evaluate, monkeypatch, *run)

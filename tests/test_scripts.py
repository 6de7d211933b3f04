"""The scripts as users run them: what they write, what they log, what they say of mistakes."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
import stat
import sys

import inference
import inference_lora
import refl_lora
from refl.model import drawing
from refl.model.lora import KOHYA_FILE, read_metadata
from refl.report.log import LAYOUT, layout
from refl.reward import imagereward
from refl.system.errors import UserError
from refl.system.ownership import PRIVATE
from refl.train import models
from refl.train.options import Options

import numpy as np
import pytest
import torch
from conftest import (
    LORA,
    ROOT,
    SMOOTH,
    assert_close_loras,
    events,
    run_command,
    run_in_process,
    run_script,
    visible,
    weight_options,
)
from PIL import Image
from safetensors.torch import load_file

# -------------------------------------------------------------------------------------------------- training


def train_both_ways(tiny, folder):
    """Train with two processes by the wrapper into world2, and with one process of twice the batch into
    world1."""
    (folder / "prompts.json").write_text(
        json.dumps([{"text": f"a thing, number {index}"} for index in range(7)])
    )
    (folder / "scripts_reward.py").write_text("def red(images, prompts): return images[:, 0].mean((1, 2))\n")
    common = [
        *weight_options(tiny),
        f"--prompts={folder / 'prompts.json'}",
        "--reward=imagereward:0.9,scripts_reward:red:0.1",
        *"--num_inference_steps 4 --min_stop 1 --max_stop 3 --max_train_steps 3".split(),
        *"--rank 3 --lora_alpha 6 --guidance_scale 1 --draw_guidance_scale 2".split(),
        *"--gradient_accumulation_steps 2 --num_validation_images 3 --validation_steps 2".split(),
        *"--lr_scheduler cosine --lr_warmup_steps 1 --learning_rate=1e-2".split(),
        *SMOOTH,
    ]
    run = run_script(
        "bash", "train_refl_lora.sh", *common, "--output_dir", folder / "world2", "--train_batch_size=2",
        NUM_PROCESSES="2", PYTHONPATH=str(folder),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    # The bar of one process only.
    assert "ReFL: 100%" in run.stderr and run.stderr.count("ReFL: 100%") < 6
    assert run.stdout.count("LoRA in") == 1 and "validation reward" in run.stdout
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        run_in_process(refl_lora, patch, *common, "--output_dir", folder / "world1", "--train_batch_size=4")


@pytest.fixture(scope="module")
def trained(shared, tiny):
    """The folders world2 and world1 of one run with two processes and the same run with one."""
    return shared("trained", lambda folder: train_both_ways(tiny, folder))


def test_a_run_writes_these_files_and_no_others(trained):
    files = {path.relative_to(trained / "world2").as_posix() for path in (trained / "world2").rglob("*.*")}
    assert files & {PRIVATE, f"{PRIVATE}/written-0.sha256"}
    files -= {PRIVATE, f"{PRIVATE}/written-0.sha256"}
    assert {re.sub(r"events\.out.*", "events", file) for file in files} == {
        LORA, KOHYA_FILE, "options.json", "logs/events",
        "README.md", "curves.png", "validation_before.png", "validation_after.png",
        *(f"checkpoint-3/{name}" for name in (LORA, "optimizer.safetensors", "state.json", "checksums.json")),
    }  # fmt: skip
    metadata = read_metadata(trained / "world2")
    assert metadata.items() >= {
        "step": 3, "rank": 3, "lora_alpha": 6.0, "reward": "imagereward:0.9,scripts_reward:red:0.1",
        "guidance_scale": 1.0, "draw_guidance_scale": 2.0,
        "sampler": "ddpm", "num_inference_steps": 4, "resolution": 64,
    }.items()  # fmt: skip
    assert metadata["base_model"].endswith("stable-diffusion-v1-4")


def test_the_number_of_processes_does_not_matter(trained):
    two, one = (load_file(trained / f"world{processes}" / LORA) for processes in (2, 1))
    assert_close_loras(two, one)
    two, one = (events(trained / f"world{processes}" / "logs") for processes in (2, 1))
    for tag in (
        "reward/mean",
        "reward/std",
        "loss",
        "gradient_norm",
        "validation/reward",
        "validation/scripts_reward.red",
        "reward/imagereward",
        "reward/scripts_reward.red",
        "images/saturated",
    ):
        values = [[point.value for point in board.Scalars(tag)] for board in (two, one)]
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-6), tag


def test_tensorboard_holds_everything(trained):
    board = events(trained / "world2" / "logs")
    scalars = set(board.Tags()["scalars"])
    phases = ("rollout", "grad_step", "decode", "reward", "backward", "optimizer", "total")
    assert scalars >= {
        "loss", "reward/mean", "reward/std", "reward/min", "reward/max", "reward/above_target",
        "gradient_norm", "learning_rate", "images/saturated", "memory/peak_gib", "validation/reward",
        "reward/imagereward", "validation/imagereward",
        *(f"seconds/{phase}" for phase in phases), *(f"images_per_second/{phase}" for phase in phases),
    }  # fmt: skip
    by_stop = {tag: len(board.Scalars(tag)) for tag in scalars if tag.startswith("gradient_norm_by_stop/")}
    assert (
        by_stop.keys() <= {f"gradient_norm_by_stop/{stop}" for stop in (1, 2, 3)}
        and sum(by_stop.values()) >= 3
    )
    assert [point.step for point in board.Scalars("loss")] == [1, 2, 3]
    rates = [point.value for point in board.Scalars("learning_rate")]
    assert rates == pytest.approx([0, 1e-2, 0.5e-2], abs=1e-8)
    assert [point.step for point in board.Images("validation/images")] == [0, 2, 3]
    assert board.Images("validation/images")[0].height > 2 * 256  # two rows
    assert [histogram.step for histogram in board.Histograms("reward/histogram")] == [1, 2, 3]
    assert (
        board.Histograms("reward/histogram")[0].histogram_value.num == 8
    )  # 2 processes x 2 images x 2 micro-steps
    assert all(np.isfinite(point.value) for tag in scalars for point in board.Scalars(tag))
    assert "_hparams_/session_start_info" in board.summary_metadata
    assert "custom_scalars__config__" in board.summary_metadata
    options = json.loads((trained / "world2" / "options.json").read_text())
    for charts in layout(options).values():
        for title, (_, patterns) in charts.items():
            assert all(any(re.match(pattern, tag) for tag in scalars) for pattern in patterns), title
    assert layout({"validation_images_per_prompt": 2}) == LAYOUT
    assert not any(
        "validation" in title for charts in layout({"validation_steps": 0}).values() for title in charts
    )


def test_validation_is_shared_out_in_order(trained):
    # Three images on two processes: the sheet of them, with their rewards, must be that of one process.
    two, one = (
        np.asarray(Image.open(io.BytesIO(board.Images("validation/images")[0].encoded_image_string)), int)
        for board in (events(trained / f"world{processes}" / "logs") for processes in (2, 1))
    )
    # A batch of another shape rounds otherwise: a level of a colour, perhaps a caption's last digit.
    assert two.shape == one.shape and (abs(two - one) > 2).mean() < 0.002


def test_only_the_lora_moves(training_options, tmp_path, monkeypatch):
    kept = {}

    def remember(unet, *arguments):
        kept["unet"] = unet
        kept["before"] = {name: value.clone() for name, value in unet.state_dict().items()}
        return add_lora(unet, *arguments)

    add_lora = models.add_lora
    monkeypatch.setattr(models, "add_lora", remember)
    # At 64 pixels the UNet's middle has one token, and attention over it no gradient for queries and keys.
    options = "--resolution 128 --learning_rate 1e-2 --grad_scale 1 --max_train_steps 1".split()
    run_in_process(refl_lora, monkeypatch, *training_options, *options)
    after = {name.replace(".base_layer", ""): value for name, value in kept["unet"].state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in kept["before"].items())
    moved = [name for name in after if name not in kept["before"]]
    assert moved and all("lora_" in name for name in moved)
    # AdamW's first step moves each element whose gradient is not tiny by the learning rate.
    assert all(after[name].abs().max() > 0.5e-2 for name in moved if "lora_B" in name)
    trainable = [name for name, p in kept["unet"].named_parameters() if p.requires_grad]
    assert len(trainable) == len(moved)


def test_a_run_repeats_from_its_options_file(training_options, tmp_path, monkeypatch):
    run = [*training_options, "--seed", "3", "--lora_alpha", "2", "--resume_from_checkpoint", "none"]
    run_in_process(refl_lora, monkeypatch, *run)
    assert "resume_from_checkpoint" not in json.loads((tmp_path / "out" / "options.json").read_text())
    again = ["--options_file", tmp_path / "out" / "options.json", "--output_dir", tmp_path / "again"]
    run_in_process(refl_lora, monkeypatch, *again)
    assert (tmp_path / "out" / LORA).read_bytes() == (tmp_path / "again" / LORA).read_bytes()
    run_in_process(refl_lora, monkeypatch, *again, "--seed", "4", "--output_dir", tmp_path / "other")
    assert (tmp_path / "out" / LORA).read_bytes() != (tmp_path / "other" / LORA).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        "--gradient_checkpointing --decode_batch_size 2",
        "--guidance_scale 3 --reward_target None",
        "--guidance_scale 3 --guidance_in rollout --no_lora_in_uncond --normalize_by_stop",
        "--noise_distance_weight 0.1 --lora_shrinkage 0.01 --low_memory",
        "--rollout_steps 3 --rollout_sampler dpm++sde --plan draft_k --num_gradient_steps 2",
        "--rollout_sampler ddim --plan draft_lv --num_gradient_steps 2 --decode_resolution 32",
        "--mixed_precision bf16 --allow_tf32",
        "--mixed_precision fp16 --max_grad_norm inf",
        "--validation_steps 0 --report_to none --resolution 128",
        "--lr_scheduler linear --lr_warmup_steps 1 --max_grad_norm 0.1 --adam_beta1 0.5",
    ],
)
def test_options_train(training_options, tmp_path, monkeypatch, options):
    run_in_process(refl_lora, monkeypatch, *training_options, *options.split())
    weights = load_file(tmp_path / "out" / LORA)
    assert all(value.isfinite().all() for value in weights.values())
    assert max(value.abs().max() for name, value in weights.items() if ".lora.up." in name) > 0


def test_help_explains_every_option(monkeypatch, capsys):
    run = run_command(refl_lora, monkeypatch, capsys, "--help")
    assert run.returncode == 0
    for option in dataclasses.fields(Options):
        assert f"--{option.name}" in run.stdout


# ------------------------------------------------------------------------------------------------- inference


def draw_both_ways(tiny, trained, folder):
    """Run inference.py into sd14 and inference_lora.py into lora with the same options."""
    common = [
        f"--pretrained_model_name_or_path={tiny / 'stable-diffusion-v1-4'}",
        *"--num_images_per_prompt 3 --num_inference_steps 4 --seed 11 --batch_size 2 --prompt".split(),
        "a red cat",
        "two dogs",
    ]
    lora = ["--output_dir", folder / "lora", "--lora_path", trained / "world2", "--reward_path", tiny]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        run_in_process(inference, patch, "--output_dir", folder / "sd14", *common)
        run_in_process(inference_lora, patch, *lora, *common)
    assert "guidance 2 (named by the LoRA's file)" in printed.getvalue()
    assert "note: this LoRA was trained with" not in printed.getvalue()  # sampler and steps usually differ


@pytest.fixture(scope="module")
def drawn(shared, tiny, trained):
    """The folders sd14 and lora of the same images drawn without and with the LoRA."""
    return shared("drawn", lambda folder: draw_both_ways(tiny, trained, folder))


def test_inference_draws_the_same_images_with_and_without_lora(drawn, tiny):
    names = [f"{index}.png" for index in range(6)]
    assert visible(drawn / "sd14") == names
    assert visible(drawn / "lora") == [*names, "grid.png", "rewards.json"]
    images = [[np.asarray(Image.open(drawn / side / name)) for name in names] for side in ("sd14", "lora")]
    assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for side in images for image in side)
    assert len({image.tobytes() for image in images[0]}) == 6  # six seeds, six images
    assert all((before != after).any() for before, after in zip(*images, strict=True))
    rewards = json.loads((drawn / "lora" / "rewards.json").read_text())
    assert list(rewards["mean"]) == ["before, guidance 7.5", "before", "after"]
    # At its own guidance the base model draws the images of inference.py, up to rounding.
    scorer, rows = imagereward.load(tiny), rewards["images"]
    scores = [scorer.score(row["prompt"], drawn / "sd14" / row["file"]) for row in rows]
    own, other = (np.subtract([row[s] for row in rows], scores) for s in ("before, guidance 7.5", "before"))
    assert np.linalg.norm(own) < 0.2 * np.linalg.norm(other)
    assert [row["seed"] for row in rewards["images"]] == list(range(11, 17))
    assert [row["prompt"] for row in rewards["images"]] == ["a red cat"] * 3 + ["two dogs"] * 3
    assert rewards["mean"]["before"] == pytest.approx(np.mean([row["before"] for row in rewards["images"]]))
    grid = Image.open(drawn / "lora" / "grid.png")
    assert grid.width > 5 * 256 and grid.height > 6 * 256  # five columns, twice before above after


def test_inference_lora_at_scale_zero_is_inference(drawn, trained, tiny, tmp_path, monkeypatch):
    run_in_process(
        inference_lora, monkeypatch, "--lora_path", trained / "world2", "--lora_scale", "0", "--no_compare",
        "--output_dir", tmp_path, *weight_options(tiny), "--guidance_scale", "7.5",
        *"--num_images_per_prompt 3 --num_inference_steps 4 --seed 11 --prompt".split(),
        "a red cat", "two dogs",
    )  # fmt: skip
    for index in range(6):
        ours, base = (
            np.asarray(Image.open(folder / f"{index}.png"), int) for folder in (tmp_path, drawn / "sd14")
        )
        assert abs(ours - base).max() <= 1


def test_the_guidance_can_be_given(trained, tiny, tmp_path, monkeypatch, capsys):
    drawn, generate = [], drawing.generate

    def watched(pipeline, prompts, seeds, steps, guidance_scale, resolution):
        drawn.append((guidance_scale, any(pipeline.get_list_adapters().values())))
        return generate(pipeline, prompts, seeds, steps, guidance_scale, resolution)

    monkeypatch.setattr(drawing, "generate", watched)
    run = ["--lora_path", trained / "world2", *weight_options(tiny), "--output_dir", tmp_path]
    run += "--num_images_per_prompt 1 --num_inference_steps 2".split()
    for options, scales, said in (
        ([], [2, 2, 7.5], "guidance 2 (named"),
        (["--as_trained"], [1, 1, 7.5], "guidance 1 (named"),
        (
            ["--guidance_scale", "3", "--as_trained"],
            [3, 3, 7.5],
            "guidance 3 (--guidance_scale; the LoRA's file",
        ),
        (["--guidance_scale", "7.5"], [7.5, 7.5], "guidance 7.5 (--guidance_scale; the LoRA's file names 2)"),
        (["--base_guidance_scale", "None"], [2, 2], "guidance 2 (named"),
        (["--no_compare"], [2], "guidance 2 (named"),
    ):
        drawn.clear()
        run_in_process(inference_lora, monkeypatch, *run, *options)
        assert [scale for scale, _ in drawn] == scales
        assert said in capsys.readouterr().out


def test_inference_lora_does_without_the_reward(trained, tiny, tmp_path, monkeypatch, capsys):
    run_in_process(
        inference_lora, monkeypatch, "--lora_path", trained / "world2" / LORA, "--output_dir", tmp_path,
        weight_options(tiny)[0], "--reward_path", tmp_path / "nowhere",
        *"--num_images_per_prompt 1 --num_inference_steps 2".split(),
    )  # fmt: skip
    assert "no rewards shown" in capsys.readouterr().out
    assert visible(tmp_path) == ["0.png", "grid.png"]


def test_out_of_memory_halves_the_batch(tiny, tmp_path, monkeypatch):
    generate, sizes = drawing.generate, []

    def small_gpu(pipeline, prompts, *arguments):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(pipeline, prompts, *arguments)

    monkeypatch.setattr(drawing, "generate", small_gpu)
    options = [weight_options(tiny)[0], "--output_dir", tmp_path, "--num_inference_steps", "2"]
    run_in_process(inference, monkeypatch, *options, "--num_images_per_prompt", "7")
    assert sizes == [7, 4, 2, 2, 2, 1]
    assert len(list(tmp_path.glob("*.png"))) == 7


# -------------------------------------------------------------------------------------------------- mistakes


# One for each check; tests/test_options.py has the values that no machine could train with.
MISTAKES = {
    "--rank 0": "--rank 0: must be 1 or more",
    "--num_inference_steps 1001 --max_stop 1000": "this model has 1000 timesteps",
    "--resolution 100": "multiples of 64 pixels, such as 64 or 128",
    "--pretrain_data nowhere": "nowhere: no such folder",
    "--held_out_reward imagereward": "imagereward is in --reward, so it is not held out",
    "--held_out_reward hpsv3": "--held_out_reward hpsv3: hpsv3 is not a reward",
    "--reward hpsv3": "--reward hpsv3: hpsv3 is not a reward; name imagereward, pickscore,",
    "--prompts nowhere.txt": "nowhere.txt cannot be read: no such file",
    "--validation_prompts nowhere.txt": "nowhere.txt",
    "--output_dir README.md/out": "README.md is not a folder",
    "--output_dir /proc/refl": "cannot be written",
    "--options_file nowhere.json": "nowhere.json cannot be read",
    "--options_file tests/conftest.py": "conftest.py, line 1: not valid JSON",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_mistakes_in_options(training_options, tmp_path, monkeypatch, options):
    with pytest.raises(UserError, match=MISTAKES[options]):
        run_in_process(refl_lora, monkeypatch, *training_options, *options.split())
    assert not (tmp_path / "out").exists()


def test_missing_weights_are_named_all_at_once(tmp_path):
    run = run_script(
        "bash", "train_refl_lora.sh", "--pretrained_model_name_or_path", tmp_path / "model", "--reward_path",
        tmp_path / "reward", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert run.returncode == 2 and "Traceback" not in run.stderr
    for name in ("model", "reward/ImageReward.pt", "reward/med_config.json", "reward/bert-base-uncased"):
        assert str(tmp_path / name) in run.stderr
    for source in ("CompVis/stable-diffusion-v1-4", "THUDM/ImageReward", "google-bert/bert-base-uncased"):
        assert source in run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_truncated_weights_stop_two_processes_with_one_message(training_options, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "cut")
    file = tmp_path / "cut" / "ImageReward.pt"
    file.write_bytes(file.read_bytes()[:5000])
    options = [*training_options, *weight_options(tmp_path / "cut")]
    run = run_script("bash", "train_refl_lora.sh", *options, NUM_PROCESSES="2")
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert run.stderr.count("error: ") == 1 and "ImageReward.pt is damaged" in run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (refl_lora, ["--learning_rat", "1"], "--learning_rate"),
        (refl_lora, ["--learning_rate", "fast"], "learning_rate"),
        (refl_lora, ["--max_stop", "99"], "error: --max_stop 99"),
        (inference, ["--num_images", "1"], "--num_images_per_prompt"),
        (inference, ["--seed", "-1"], "error: --seed -1"),
        (inference, ["--seed", str(2**64)], "must be a finite number, at most 18,446"),
        (inference, ["--seed", str(2**64 - 1)], "the seeds of all images must be below 2^64"),
        (inference, ["--guidance_scale", "nan"], "error: --guidance_scale nan: must be a finite number"),
        (inference, ["--num_images_per_prompt", "9999999"], "at most 1,000,000 can be drawn"),
        (inference, ["--prompt"], "error: --prompt is empty; name one prompt"),
        (inference, ["--prompt", "a\ud800"], "--prompt: this prompt is not text in UTF-8"),
        (inference, ["--device", "cuda:99"], "not a device that can be used"),
        (inference, ["--prompts_file", "nowhere.csv"], "nowhere.csv"),
        (inference_lora, ["--lora_path", "nowhere"], "no LoRA at nowhere"),
        (inference_lora, ["--lora_path", "README.md"], "README.md is not called .safetensors"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    tiny, tmp_path, monkeypatch, capsys, script, options, message
):
    model = weight_options(tiny) if script is refl_lora else weight_options(tiny)[:1]
    run = run_command(script, monkeypatch, capsys, *model, "--output_dir", tmp_path / "out", *options)
    assert run.returncode == 2 and message in run.stderr + run.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["refl_lora.py", "inference.py", "inference_lora.py", "evaluate.py"])
def test_every_script_is_a_command(script, tmp_path):
    model = ["--pretrained_model_name_or_path", tmp_path / "nowhere"]
    run = run_script(sys.executable, script, *model, "--output_dir", tmp_path / "out")
    assert run.returncode == 2 and run.stderr.startswith("error: ") and "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------ the shell script


# torch.cuda as it is on a machine with four GPUs, of which CUDA_VISIBLE_DEVICES makes some visible.
FOUR_GPUS = """
import torch
capabilities = {0: (8, 0), 1: (7, 5), 2: (9, 0), 3: (7, 5), "GPU-8932f937": (8, 6)}
visible = [gpu for gpu in torch.cuda._parse_visible_devices() if gpu in capabilities]
torch.cuda.device_count = lambda: len(visible)
torch.cuda.get_device_capability = lambda gpu: capabilities[visible[gpu]]
"""


@pytest.fixture
def wrapper(tmp_path):
    """Runs train_refl_lora.sh where nvidia-smi exists, torch sees four GPUs, and Python only prints
    precision and arguments."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\n")
    (tools / "python").write_text(f"""#!/bin/sh
        case "$*" in
            *best_precision*) exec {sys.executable} -c '{FOUR_GPUS}'"$2" ;;
            -c*) ;;
            *) echo "$ACCELERATE_MIXED_PRECISION $@" ;;
        esac""")
    for tool in tools.iterdir():
        tool.chmod(0o755)

    def run(*options, **environment):
        environment = {"PATH": f"{tools}:/usr/bin:/bin", "PYTHON": "python", **environment}
        return run_script("bash", "train_refl_lora.sh", *options, **environment)

    return run


def test_processes_and_precision_are_those_of_the_visible_gpus(wrapper):
    def command(devices, given="--rank=8"):
        run = wrapper(*given.split(), CUDA_VISIBLE_DEVICES=devices, NUM_PROCESSES="")
        return run.stdout.splitlines()[-1]

    two = command("2,0")
    assert "--multi_gpu --gpu_ids all --num_processes 2" in two and "--main_process_port 0 " in two
    assert "--mixed_precision bf16" in two
    assert two.endswith("--learning_rate=1e-04 --grad_scale 0.01 --rank=8")
    assert "--mixed_precision fp16" in command("0,1")
    default = Options()
    assert (default.learning_rate, default.grad_scale) == (
        1e-4,
        0.01,
    )  # so a file without them changes nothing
    for file in ("--options-file a.json", "--preset=a"):
        one = command("GPU-8932f937,-1,1", given=f"--seed 1 {file} --rank=8")
        assert one.startswith("bf16 /")
        assert one.endswith(f"refl_lora.py --seed 1 {file} --rank=8")
    assert command("-1").startswith("no /")
    assert command("0", given="--rank 8 --help").endswith("refl_lora.py --help")


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        ("", {"NUM_PROCESSES": "x"}, "NUM_PROCESSES=x: must be a number"),
        ("", {"NUM_PROCESSES": "0"}, "NUM_PROCESSES=0: must be a number"),
        ("", {"PYTHON": "/nowhere/python"}, "requirements are not installed"),
        ("--num_machines 2", {}, "--num_machines 2 needs --main_process_ip and --main_process_port"),
        ("--num_machines 2 --machine_rank 2", {}, "--machine_rank 2 of --num_machines 2"),
        ("--num_machines two", {}, "--num_machines two: must be a whole number"),
        ("--main-process-port=x", {}, "--main_process_port x: must be a whole number"),
        ("--main_process_port 99999", {}, "--main_process_port 99999: must be below 65536"),
        ("--main_process_port", {}, "--main_process_port needs a value"),
        ("--num_machines 99999999999999999999", {}, "must be a whole number of at most five digits"),
        ("--num_machines 08 --machine_rank 09", {}, "--machine_rank 9 of --num_machines 8"),
        ("", {"NUM_PROCESSES": "99999999999999999999"}, "must be a number from 1 to "),
    ],
)
def test_mistakes_that_the_wrapper_finds(wrapper, options, environment, message):
    run = wrapper(*options.split(), **environment)
    assert run.returncode == 2 and message in run.stderr


def test_the_scripts_are_executable_as_named():
    for name in ("train_refl_lora.sh", "demo/run.sh", "tests/run.sh"):
        assert (ROOT / name).stat().st_mode & stat.S_IRUSR
        assert run_script("bash", "-n", name).returncode == 0

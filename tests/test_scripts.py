"""The scripts as users run them: what they write, what they log, what they say of mistakes."""

import json
import re
import shutil
import stat
import sys

import inference
import inference_lora
import refl_lora
from refl.model import drawing
from refl.model.lora import read_metadata
from refl.report.log import LAYOUT
from refl.system.errors import UserError

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script, weight_options
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

LORA = "pytorch_lora_weights.safetensors"


def run_in_process(script, monkeypatch, *options):
    monkeypatch.setattr("sys.argv", [script.__name__, *(str(option) for option in options)])
    script.main()


def events(folder) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0}).Reload()


# -------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """One run with two processes and one with one, of the same global batch, by the wrapper; their
    folders."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "prompts.json").write_text(
        json.dumps([{"text": f"a thing, number {index}"} for index in range(7)])
    )
    (folder / "own_rewards.py").write_text("def red(images, prompts): return images[:, 0].mean((1, 2))\n")
    common = [
        *weight_options(tiny),
        f"--prompts={folder / 'prompts.json'}",
        "--reward=imagereward:0.9,own_rewards:red:0.1",
        *"--num_inference_steps 4 --min_stop 1 --max_stop 3 --max_train_steps 3".split(),
        *"--rank 3 --lora_alpha 6".split(),
        *"--gradient_accumulation_steps 2 --num_validation_images 3 --validation_steps 2".split(),
        *"--lr_scheduler cosine --lr_warmup_steps 1 --learning_rate=1e-2".split(),
    ]
    for processes, batch in ((2, 2), (1, 4)):
        run = run_script(
            "bash", "train_refl_lora.sh", *common, "--output_dir", folder / f"world{processes}",
            "--train_batch_size", str(batch), NUM_PROCESSES=str(processes), PYTHONPATH=str(folder),
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert (
            "ReFL: 100%" in run.stderr and run.stderr.count("ReFL: 100%") < 6
        )  # the bar of one process only
        assert run.stdout.count("LoRA in") == 1 and "validation reward" in run.stdout
    return folder


def test_a_run_writes_these_files_and_no_others(trained):
    files = {path.relative_to(trained / "world2").as_posix() for path in (trained / "world2").rglob("*.*")}
    assert {re.sub(r"events\.out.*", "events", file) for file in files} == {
        LORA, "options.json", "logs/events",
        "README.md", "curves.png", "validation_before.png", "validation_after.png",
        *(f"checkpoint-3/{name}" for name in (LORA, "optimizer.safetensors", "state.json", "checksums.json")),
    }  # fmt: skip
    metadata = read_metadata(trained / "world2")
    assert metadata.items() >= {
        "step": 3, "rank": 3, "lora_alpha": 6.0, "reward": "imagereward:0.9,own_rewards:red:0.1",
        "guidance_scale": 1.0, "sampler": "ddpm", "num_inference_steps": 4, "resolution": 64,
    }.items()  # fmt: skip
    assert metadata["base_model"].endswith("stable-diffusion-v1-4")


def test_the_number_of_processes_does_not_matter(trained):
    two, one = (load_file(trained / f"world{processes}" / LORA) for processes in (2, 1))
    assert max(tensor.abs().max() for name, tensor in two.items() if ".lora.up." in name) > 1e-3  # it moved
    for name in two:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)
    two, one = (events(trained / f"world{processes}" / "logs") for processes in (2, 1))
    for tag in (
        "reward/mean",
        "reward/std",
        "loss",
        "gradient_norm",
        "validation/reward",
        "validation/own_rewards.red",
        "reward/imagereward",
        "reward/own_rewards.red",
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
    assert board.Images("validation/images")[0].width > 3 * 200
    assert [histogram.step for histogram in board.Histograms("reward/histogram")] == [1, 2, 3]
    assert (
        board.Histograms("reward/histogram")[0].histogram_value.num == 8
    )  # 2 processes x 2 images x 2 micro-steps
    assert all(np.isfinite(point.value) for tag in scalars for point in board.Scalars(tag))
    assert "_hparams_/session_start_info" in board.summary_metadata
    assert "custom_scalars__config__" in board.summary_metadata
    for charts in LAYOUT.values():
        for title, (_, patterns) in charts.items():
            assert all(any(re.match(pattern, tag) for tag in scalars) for pattern in patterns), title


def test_validation_is_shared_out_in_order(trained):
    # Three images on two processes: their rewards must be those that one process finds.
    two, one = (events(trained / f"world{processes}" / "logs") for processes in (2, 1))
    two, one = (
        [image.encoded_image_string for image in board.Images("validation/images")] for board in (two, one)
    )
    assert two[0] == one[0]


def test_only_the_lora_moves(training_options, tmp_path, monkeypatch):
    kept = {}

    def remember(unet, *arguments):
        kept["unet"] = unet
        kept["before"] = {name: value.clone() for name, value in unet.state_dict().items()}
        return add_lora(unet, *arguments)

    add_lora = refl_lora.add_lora
    monkeypatch.setattr(refl_lora, "add_lora", remember)
    run_in_process(refl_lora, monkeypatch, *training_options)
    after = {name.replace(".base_layer", ""): value for name, value in kept["unet"].state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in kept["before"].items())
    moved = [name for name in after if name not in kept["before"]]
    assert moved and all("lora_" in name for name in moved)
    assert all(after[name].abs().max() > 0 for name in moved if "lora_B" in name)
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


def test_help_explains_every_option():
    run = run_script("bash", "train_refl_lora.sh", "--help")
    assert run.returncode == 0
    for option in ("--learning_rate", "--grad_scale", "--min_stop", "--reward_target", "--output_dir"):
        assert option in run.stdout


# ------------------------------------------------------------------------------------------------- inference


@pytest.fixture(scope="module")
def drawn(tiny, trained, tmp_path_factory):
    """inference.py and inference_lora.py on the same options; their folders."""
    folder = tmp_path_factory.mktemp("drawn")
    common = [
        f"--pretrained_model_name_or_path={tiny / 'stable-diffusion-v1-4'}",
        *"--num_images_per_prompt 3 --num_inference_steps 4 --seed 11 --batch_size 2 --prompt".split(),
        "a red cat",
        "two dogs",
    ]
    before = run_script(sys.executable, "inference.py", "--output_dir", folder / "sd14", *common)
    assert before.returncode == 0, before.stderr
    after = run_script(
        sys.executable, "inference_lora.py", "--output_dir", folder / "lora",
        "--lora_path", trained / "world2",
        "--reward_path", tiny, *common,
    )  # fmt: skip
    assert after.returncode == 0, after.stderr
    assert "--guidance_scale 1.0" in after.stdout  # trained otherwise than drawn: said
    return folder


def test_inference_draws_the_same_images_with_and_without_lora(drawn):
    names = [f"{index}.png" for index in range(6)]
    assert sorted(path.name for path in (drawn / "sd14").iterdir()) == names
    assert sorted(path.name for path in (drawn / "lora").iterdir()) == [*names, "grid.png", "rewards.json"]
    images = [[np.asarray(Image.open(drawn / side / name)) for name in names] for side in ("sd14", "lora")]
    assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for side in images for image in side)
    assert len({image.tobytes() for image in images[0]}) == 6  # six seeds, six images
    assert all((before != after).any() for before, after in zip(*images, strict=True))
    rewards = json.loads((drawn / "lora" / "rewards.json").read_text())
    assert [row["seed"] for row in rewards["images"]] == list(range(11, 17))
    assert [row["prompt"] for row in rewards["images"]] == ["a red cat"] * 3 + ["two dogs"] * 3
    assert rewards["mean"]["before"] == pytest.approx(np.mean([row["before"] for row in rewards["images"]]))
    grid = Image.open(drawn / "lora" / "grid.png")
    assert grid.width > 5 * 256 and grid.height > 4 * 256  # five pairs a row, before above after


def test_inference_lora_at_scale_zero_is_inference(drawn, trained, tiny, tmp_path, monkeypatch):
    run_in_process(
        inference_lora, monkeypatch, "--lora_path", trained / "world2", "--lora_scale", "0", "--no_compare",
        "--output_dir", tmp_path, *weight_options(tiny),
        *"--num_images_per_prompt 3 --num_inference_steps 4 --seed 11 --prompt".split(),
        "a red cat", "two dogs",
    )  # fmt: skip
    for index in range(6):
        ours, base = (
            np.asarray(Image.open(folder / f"{index}.png"), int) for folder in (tmp_path, drawn / "sd14")
        )
        assert abs(ours - base).max() <= 1


def test_inference_lora_does_without_the_reward(trained, tiny, tmp_path, monkeypatch, capsys):
    run_in_process(
        inference_lora, monkeypatch, "--lora_path", trained / "world2" / LORA, "--output_dir", tmp_path,
        weight_options(tiny)[0], "--reward_path", tmp_path / "nowhere",
        *"--num_images_per_prompt 1 --num_inference_steps 2".split(),
    )  # fmt: skip
    assert "no rewards shown" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "grid.png"]


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


def spoilt(tiny, tmp_path, change):
    """A copy of the tiny checkpoint with `change` applied."""
    folder = tmp_path / "spoilt"
    shutil.copytree(tiny, folder)
    change(folder)
    return [
        f"--pretrained_model_name_or_path={folder / 'stable-diffusion-v1-4'}",
        f"--reward_path={folder}",
    ]


MISTAKES = {
    "--max_stop 4": "--max_stop 4: must be below --num_inference_steps 4",
    "--min_stop 3 --max_stop 2": "--max_stop 2: must not be below --min_stop 3",
    "--max_stop -1": "--max_stop -1: must not be below",
    "--min_stop -1": "--min_stop -1: must be 0 or more",
    "--train_batch_size 3 --decode_batch_size 2": "--decode_batch_size 2: must divide --train_batch_size 3",
    "--train_batch_size 0": "--train_batch_size 0: must be 1 or more",
    "--gradient_accumulation_steps 0": "must be 1 or more",
    "--max_train_steps 0": "must be 1 or more",
    "--lr_warmup_steps 5": "take --lr_scheduler constant_with_warmup",
    "--num_inference_steps 1001 --max_stop 1000": "this model has 1000 timesteps",
    "--adam_beta1 1": "--adam_beta1 1.0: must be at least 0 and below 1",
    "--adam_weight_decay -1": "must be 0 or more",
    "--lora_alpha 0": "--lora_alpha 0.0: must be positive",
    "--reward_target nan": "must be a number",
    "--resolution 0": "multiples of 64",
    "--use_8bit_adam": "pip install bitsandbytes",
    "--rank 0": "--rank 0: must be 1 or more",
    "--seed -1": "--seed -1: must be 0 or more",
    "--learning_rate 0": "--learning_rate 0.0: must be positive",
    "--learning_rate nan": "must be positive",
    "--grad_scale -1": "--grad_scale -1.0: must be positive",
    "--resolution 100": "multiples of 64 pixels, such as 64 or 128",
    "--resolution -64": "multiples of 64",
    "--guidance_in rollout": "go with a --guidance_scale other than 1",
    "--lora_shrinkage 1": "--lora_shrinkage 1.0: must be at least 0 and below 1",
    "--noise_distance_weight -1": "--noise_distance_weight -1.0: must be 0 or more",
    "--early_stop --validation_steps 0": "have --validation_steps above 0",
    "--validation_images_per_prompt 0": "must be 1 or more",
    "--pretrain_data nowhere": "nowhere: there is no such folder",
    "--held_out_reward imagereward": "imagereward is in --reward, so it is not held out",
    "--held_out_reward pickscore": "--held_out_reward pickscore: pickscore is not a reward",
    "--reward pickscore": "--reward pickscore: pickscore is not a reward; name imagereward or a function",
    "--prompts nowhere.txt": "nowhere.txt: the prompts file cannot be read",
    "--validation_prompts nowhere.txt": "nowhere.txt",
    "--output_dir README.md/out": "README.md is not a folder",
    "--output_dir /proc/refl": "cannot be written",
    "--options_file nowhere.json": "nowhere.json cannot be read",
    "--options_file tests/conftest.py": "conftest.py cannot be read",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_mistakes_in_options(training_options, tmp_path, monkeypatch, options):
    with pytest.raises(UserError, match=MISTAKES[options]):
        run_in_process(refl_lora, monkeypatch, *training_options, *options.split())
    assert not (tmp_path / "out").exists()


def test_missing_weights_are_named_all_at_once(prompts_file, tmp_path):
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: shutil.rmtree(f / "stable-diffusion-v1-4" / "vae"), r"weights are missing:\n.*/vae "),
        (
            lambda f: (f / "stable-diffusion-v1-4" / "unet" / "config.json").write_text("{"),
            "config.json cannot be",
        ),
        (
            lambda f: (f / "stable-diffusion-v1-4" / "unet" / "config.json").write_text("[]"),
            "not a configuration",
        ),
        (
            lambda f: (f / "stable-diffusion-v1-4" / "vae" / "config.json").write_text("{}"),
            "not one of Stable",
        ),
        (
            lambda f: (f / "stable-diffusion-v1-4" / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
            "holds no weights",
        ),
    ],
)
def test_folders_that_are_not_models(training_options, tiny, tmp_path, monkeypatch, change, message):
    with pytest.raises(UserError, match=message):
        run_in_process(refl_lora, monkeypatch, *training_options, *spoilt(tiny, tmp_path, change))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_truncated_weights_stop_the_launched_run_before_it_writes(
    training_options, tiny, tmp_path, processes
):
    def truncate(folder):
        file = folder / "ImageReward.pt"
        file.write_bytes(file.read_bytes()[:5000])

    options = [*training_options, *spoilt(tiny, tmp_path, truncate)]
    run = run_script("bash", "train_refl_lora.sh", *options, NUM_PROCESSES=processes)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert run.stderr.count("error: ") == 1 and "ImageReward.pt is damaged" in run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NUM_PROCESSES": "x"}, "NUM_PROCESSES=x: must be a number"),
        ({"NUM_PROCESSES": "0"}, "NUM_PROCESSES=0: must be a number"),
        ({"PYTHON": "/nowhere/python"}, "requirements are not installed"),
    ],
)
def test_mistakes_in_the_environment(training_options, environment, message):
    run = run_script("bash", "train_refl_lora.sh", *training_options, **environment)
    assert run.returncode == 2 and message in run.stderr


# torch.cuda as it is on a machine with four GPUs, of which CUDA_VISIBLE_DEVICES makes some visible.
FOUR_GPUS = """
import torch
capabilities = {0: (8, 0), 1: (7, 5), 2: (9, 0), 3: (7, 5), "GPU-8932f937": (8, 6)}
visible = [gpu for gpu in torch.cuda._parse_visible_devices() if gpu in capabilities]
torch.cuda.device_count = lambda: len(visible)
torch.cuda.get_device_capability = lambda gpu: capabilities[visible[gpu]]
"""


def test_processes_and_precision_are_those_of_the_visible_gpus(tmp_path):
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

    def command(devices, given="--rank=8"):
        environment = {"PATH": f"{tools}:/usr/bin:/bin", "PYTHON": "python", "NUM_PROCESSES": ""}
        environment["CUDA_VISIBLE_DEVICES"] = devices
        run = run_script("bash", "train_refl_lora.sh", *given.split(), **environment)
        return run.stdout.splitlines()[-1]

    two = command("2,0")
    assert "--multi_gpu --gpu_ids all --num_processes 2" in two and "--main_process_port 0 " in two
    assert "--mixed_precision bf16" in two
    assert two.endswith("--learning_rate=1e-04 --grad_scale 0.01 --rank=8")
    assert "--mixed_precision fp16" in command("0,1")
    one = command("GPU-8932f937,-1,1", given="--options_file=a.json --rank=8")
    assert one.startswith("bf16 /")
    assert one.endswith("refl_lora.py --options_file=a.json --rank=8")  # the file has the wrapper's
    assert command("-1").startswith("no /")


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("refl_lora.py", ["--learning_rat", "1"], "--learning_rate"),
        ("refl_lora.py", ["--learning_rate", "fast"], "learning_rate"),
        ("refl_lora.py", ["--max_stop", "99"], "error: --max_stop 99"),
        ("inference.py", ["--num_images", "1"], "--num_images_per_prompt"),
        ("inference.py", ["--seed", "-1"], "error: --seed -1"),
        ("inference.py", ["--device", "cuda:99"], "not a device that can be used"),
        ("inference.py", ["--prompts_file", "nowhere.csv"], "nowhere.csv"),
        ("inference_lora.py", ["--lora_path", "nowhere"], "no LoRA at nowhere"),
        ("inference_lora.py", ["--lora_path", "README.md"], "README.md is damaged or is not"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(tiny, tmp_path, script, options, message):
    model = weight_options(tiny) if script == "refl_lora.py" else weight_options(tiny)[:1]
    run = run_script(sys.executable, script, *model, "--output_dir", tmp_path / "out", *options)
    assert run.returncode == 2
    assert message in run.stderr + run.stdout and "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_the_scripts_are_executable_as_named():
    for name in ("train_refl_lora.sh", "demo/run.sh", "tests/run.sh"):
        assert (ROOT / name).stat().st_mode & stat.S_IRUSR
        assert run_script("bash", "-n", name).returncode == 0

"""The doctor's table: what passes, what is doubtful, what fails, and what to do."""

import dataclasses
import json
import re
import shutil
import socket
import sys
from collections import namedtuple

import refl.__main__
from refl.model.folder import count_weights
from refl.preflight import doctor, memory
from refl.reward import rewards
from refl.reward.contract import RewardSpec
from refl.system.errors import UserError

import pytest
import torch
from conftest import run_command, weight_options

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def options(tiny, prompts_file, tmp_path):
    return doctor.Options(
        pretrained_model_name_or_path=str(tiny / "stable-diffusion-v1-4"),
        reward_path=str(tiny),
        prompts=str(prompts_file),
        validation_prompts=str(prompts_file),
        output_dir=str(tmp_path / "out"),
    )


def test_the_command_prints_a_table(tiny, tmp_path, monkeypatch, capsys):
    run = run_command(
        refl.__main__,
        monkeypatch,
        capsys,
        "doctor",
        *weight_options(tiny),
        f"--output_dir={tmp_path / 'out'}",
    )
    assert run.returncode == 0, run.stderr
    rows = {line.split()[1]: line.split()[0] for line in run.stdout.splitlines()}
    assert rows.keys() == doctor.CHECKS.keys()
    assert rows.pop("devices") == "warn" and set(rows.values()) == {"pass"}
    nowhere = f"--pretrained_model_name_or_path={tmp_path / 'nowhere'}"
    run = run_command(refl.__main__, monkeypatch, capsys, "doctor", nowhere)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "FAIL  model" in run.stdout and "pass  prompts" in run.stdout  # one failure hides no other


def test_the_options_of_a_run_may_all_be_given(options, monkeypatch, capsys, tmp_path):
    saved = dataclasses.asdict(options) | {"reward": "nothing", "train_batch_size": 3}
    for name in ("preset", "options_file", "main_process_port", "tflops"):
        del saved[name]
    (tmp_path / "options.json").write_text(json.dumps(saved))
    for given in ([f"--{name}={saved[name]}" for name in ("reward", "reward_path", "train_batch_size")],
                  [f"--options_file={tmp_path / 'options.json'}"]):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["doctor", *given, "--learning_rate=-1", "--num_processes=2"])
        with pytest.raises(SystemExit):
            doctor.main()
        out = capsys.readouterr().out
        assert "not checked: --num_processes=2" in out
        assert re.search(r"FAIL  files      --reward nothing( \(in .*options.json\))?: nothing is not", out)
        assert "FAIL  options    --learning_rate -1.0: must be positive." in out
        assert "pass  port" in out


def test_a_preset_and_the_guidance(monkeypatch, capsys):
    run = run_command(
        refl.__main__, monkeypatch, capsys, "doctor", "--preset", "published", "--num_processes=2"
    )
    assert "not checked: --num_processes=2" in run.stdout
    assert "pass  options    100 steps of 32 images per process, guidance 1\n" in run.stdout
    guided = ["--guidance_scale=3", "--draw_guidance_scale=5"]
    run = run_command(refl.__main__, monkeypatch, capsys, "doctor", *guided)
    assert "per process, guidance 3 in training and 5 in drawing\n" in run.stdout
    run = run_command(refl.__main__, monkeypatch, capsys, "doctor", "--preset", "x")
    assert run.returncode == 2 and run.stderr.startswith("error: --preset x: no such preset; there are ")


def test_every_check_passes(options):
    for name, function in doctor.CHECKS.items():
        if name != "devices":
            assert function(options)


def test_a_port_in_use(options):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        options.main_process_port = taken.getsockname()[1]
        with pytest.raises(UserError, match="cannot be used: .*in use.*Take another"):
            doctor.check_port(options)
    assert "is free" in doctor.check_port(options)
    options.main_process_port = 99999
    with pytest.raises(UserError, match="--main_process_port 99999 cannot be used"):
        doctor.check_port(options)


def test_a_disk_nearly_full(options, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(100e9, 99.9e9, 10e6))
    with pytest.raises(doctor.CheckWarning, match="0.0 GB free .* about 0.10 needed. Make room"):
        doctor.check_output(options)


def test_other_versions(options, monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "0.0.1" if name == "peft" else doctor_version(name))
    with pytest.raises(doctor.CheckWarning, match=r"untested versions: peft 0.0.1 \(tested: \d"):
        doctor.check_versions(options)

    def missing(name):
        raise doctor.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", missing)
    with pytest.raises(UserError, match="is not installed. Run: pip install -r"):
        doctor.check_versions(options)


doctor_version = doctor.version


def fake_gpus(monkeypatch, free, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free * 2**30, 80 * 2**30))


def test_gpus(options, monkeypatch):
    monkeypatch.setattr(memory, "needed", lambda *_: 20.0)
    fake_gpus(monkeypatch, free=40, capability=(9, 0))
    assert "1: Some GPU" in doctor.check_devices(options)
    assert "GPU 1: 40.0 of 80.0 GiB free" in doctor.check_memory(options)
    fake_gpus(monkeypatch, free=10, capability=(7, 5))
    short = "20.0 GiB needed; GPU 0: 10.0 of 80.0 GiB free. Choose other GPUs by CUDA_VISIBLE_DEVICES, or"
    with pytest.raises(doctor.CheckWarning, match=short):
        doctor.check_memory(options)
    options.mixed_precision = "bf16"
    with pytest.raises(UserError, match="a visible GPU is older than Ampere; take fp16"):
        doctor.check_devices(options)


def test_host_memory_of_low_memory(options, monkeypatch):
    monkeypatch.setattr(memory, "needed", lambda *_: 1.0)
    assert "pinned" not in doctor.check_memory(options)
    options.low_memory = True
    assert "host memory: about 0.0 GiB pinned per process" in doctor.check_memory(options)
    monkeypatch.setattr(memory, "pinned", lambda *_: 5.5)
    monkeypatch.setattr(doctor.os, "sysconf", {"SC_PHYS_PAGES": 2**20, "SC_PAGE_SIZE": 4096}.get)
    with pytest.raises(doctor.CheckWarning, match="about 5.5 GiB pinned per process, 4.0 GiB in this"):
        doctor.check_memory(options)


def test_a_reward_names_its_missing_files(options, monkeypatch):
    """One line in REWARDS is enough for the doctor to know a reward."""

    def files(folder):
        return {folder / "other.pt": "someone/other", folder / "ImageReward.pt": "someone/else"}

    monkeypatch.setitem(rewards.REWARDS, "other", RewardSpec(load=None, files=files))
    options.reward = "other"
    with pytest.raises(UserError, match=r"weights are missing:\n  .*other.pt  .*someone/other\)\nSee"):
        doctor.check_files(options)


def test_variants_that_are_not_loaded_do_not_matter(options, tiny, tmp_path):
    shutil.copytree(tiny / "stable-diffusion-v1-4", tmp_path / "model")
    options.pretrained_model_name_or_path = str(tmp_path / "model")
    expected = doctor.check_model_files(options).partition(": ")[2]
    (tmp_path / "model/unet/diffusion_pytorch_model.fp16.safetensors").write_text("version https://git-lfs")
    assert doctor.check_model_files(options).partition(": ")[2] == expected
    (tmp_path / "model/unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="unet holds no weights: diffusion_pytorch_model.safetensors or "):
        doctor.check_model_files(options)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_cut_anywhere_are_named_before_they_are_loaded(options, tmp_path, tiny, part):
    file = next((tiny / "stable-diffusion-v1-4" / part).glob("*.safetensors"))
    content, cut = file.read_bytes(), tmp_path / "model.safetensors"
    cut.write_bytes(content)
    assert count_weights(cut) > 100
    for length in [*range(0, 200), *range(200, len(content), len(content) // 50), len(content) - 1]:
        cut.write_bytes(content[:length])
        with pytest.raises(UserError, match="model.safetensors is damaged"):
            count_weights(cut)
    cut.write_bytes(content + b"more")
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        count_weights(cut)

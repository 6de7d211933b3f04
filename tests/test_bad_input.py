"""Files of other people, damaged ones, anything at all: one message that says what is wrong, no traceback."""

import json
import shutil

import refl_lora
from refl.model.folder import count_weights
from refl.model.lora import LORA_FILE, read_metadata
from refl.system import prompts
from refl.system.errors import UserError
from refl.train.options import Options, read_options

import pytest
import torch
from conftest import run_in_process, weight_options
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

MODEL, UNET = "stable-diffusion-v1-4", "stable-diffusion-v1-4/unet/diffusion_pytorch_model.safetensors"


def write(name, content):
    return lambda folder: (folder / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def cut(name, length):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def change_json(name, **changes):
    def change(folder):
        config = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(config))

    return change


def loop(name):
    def change(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(path)

    return change


def other_tensors(name):
    return lambda folder: save_file({"a": torch.zeros(2)}, folder / name)


# What is done to a checkpoint, and what must be said: one for each check and each part that is checked. The
# fuzz below and test_doctor.py cut and damage files in every other way.
FILES = {
    "no tokenizer": (lambda f: shutil.rmtree(f / MODEL / "tokenizer"), "weights are missing:\n.*/tokenizer "),
    "a loop for a model": (loop(MODEL), "weights are missing"),
    "a file for a model": (
        lambda f: [shutil.rmtree(f / MODEL), (f / MODEL).write_text("")],
        "weights are missing|cannot be read",
    ),
    "a folder for the reward": (
        lambda f: [(f / "ImageReward.pt").unlink(), (f / "ImageReward.pt").mkdir()],
        "ImageReward.pt cannot be read",
    ),
    "unet config cut": (cut(f"{MODEL}/unet/config.json", 30), "unet/config.json cannot be read"),
    "unet config a list": (write(f"{MODEL}/unet/config.json", "[1]"), "config.json is not a configuration"),
    "unet config not text": (
        write(f"{MODEL}/unet/config.json", b"\xff\xfe\x00"),
        "config.json cannot be read",
    ),
    "unet of another text width": (
        change_json(f"{MODEL}/unet/config.json", cross_attention_dim=99),
        "is not a text-to-image model like",
    ),
    "unet of an inpainting model": (
        change_json(f"{MODEL}/unet/config.json", in_channels=9),
        "the UNet takes 9 channels",
    ),
    "unet with a word for a size": (
        change_json(f"{MODEL}/unet/config.json", sample_size="large"),
        "not one of Stable Diffusion",
    ),
    "unet with other blocks": (
        change_json(f"{MODEL}/unet/config.json", block_out_channels=[8, 16]),
        "multiples of|not a Stable Diffusion",
    ),
    "unet weights cut by a byte": (cut(UNET, -1), "diffusion_pytorch_model.safetensors is damaged"),
    "unet weights a web page": (write(UNET, "<!DOCTYPE html>" * 99), "is damaged or is not a safetensors"),
    "unet weights of something else": (
        other_tensors(UNET),
        "unet is of another model: .* weights are missing",
    ),
    "vae config empty": (write(f"{MODEL}/vae/config.json", "{}"), "not one of Stable"),
    "vae weights in half": (
        cut(f"{MODEL}/vae/diffusion_pytorch_model.safetensors", 9_000),
        "vae/.*safetensors is damaged",
    ),
    "no weights of the vae": (
        lambda f: (f / MODEL / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
        "vae holds no weights",
    ),
    "text encoder in half": (
        cut(f"{MODEL}/text_encoder/model.safetensors", 9_000),
        "text_encoder/.* is damaged",
    ),
    "scheduler of a v-model": (
        change_json(f"{MODEL}/scheduler/scheduler_config.json", prediction_type="v_prediction"),
        "only epsilon",
    ),
    "tokenizer emptied": (
        lambda f: [file.unlink() for file in (f / MODEL / "tokenizer").iterdir()],
        "tokenizer does not fit|not a Stable",
    ),
    "tokenizer cut": (cut(f"{MODEL}/tokenizer/vocab.json", 100), "is not a Stable Diffusion model"),
    "reward cut": (cut("ImageReward.pt", 5_000), "ImageReward.pt is damaged"),
    "reward a web page": (write("ImageReward.pt", "<html>"), "ImageReward.pt is damaged"),
    "reward of something else": (
        lambda f: torch.save({"a": torch.zeros(1)}, f / "ImageReward.pt"),
        "is not an ImageReward model",
    ),
    "reward a list": (
        lambda f: torch.save([1], f / "ImageReward.pt"),
        "something other than a table of weights",
    ),
    "med_config empty": (write("med_config.json", ""), "med_config.json cannot be read"),
    "med_config of another model": (write("med_config.json", "{}"), "not those of an ImageReward model"),
    "bert without words": (
        lambda f: (f / "bert-base-uncased" / "vocab.txt").write_text(""),
        "bert-base-uncased|not fit",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_a_checkpoint(tiny, training_options, tmp_path, monkeypatch, name):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny, folder)
    change, message = FILES[name]
    change(folder)
    with pytest.raises(UserError, match=f"(?s){message}"):
        run_in_process(refl_lora, monkeypatch, *training_options, *weight_options(folder))
    assert not (tmp_path / "out" / LORA_FILE).exists()


def test_places_that_cannot_be_read_or_written(training_options, tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder.txt").mkdir()
    for options, message in (
        (["--prompts", tmp_path / "loop"], "prompts are read from|cannot be read"),
        (["--prompts", tmp_path / "folder.txt"], "folder.txt: the prompts file cannot be read"),
        (["--output_dir", tmp_path / "loop" / "out"], "cannot be used for output|cannot be written"),
        (["--output_dir", "/proc/out"], "cannot be written"),
        (["--output_dir", "a\x00b"], "cannot be used for output|null"),
        (["--options_file", tmp_path / "folder.txt"], "folder.txt cannot be read"),
        (["--resume_from_checkpoint", tmp_path], "is not a complete checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            run_in_process(refl_lora, monkeypatch, *training_options, *options)


# ------------------------------------------------------------------------------------------------------- fuzz

# No deadlines, as a machine may be busy, and the same examples each time.
FUZZ = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=10,
)


@FUZZ
@given(suffix=st.sampled_from([".txt", ".json", ".jsonl", ".csv"]), content=st.binary(max_size=200))
def test_any_bytes_for_prompts(tmp_path, suffix, content):
    expect_prompts_or_a_message(tmp_path / f"prompts{suffix}", content)


@FUZZ
@given(value=JSON, lines=st.booleans())
def test_any_json_for_prompts(tmp_path, value, lines):
    path = tmp_path / ("prompts.jsonl" if lines else "prompts.json")
    expect_prompts_or_a_message(path, json.dumps(value).encode())


def expect_prompts_or_a_message(path, content):
    path.write_bytes(content)
    try:
        found = prompts.read_prompts(path)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert found and all(isinstance(prompt, str) and prompt for prompt in found)


@FUZZ
@given(
    options=st.dictionaries(
        st.sampled_from(["rank", "seed", "check", "learning_rate", "reward", "lr_scheduler", "nonsense", ""]),
        JSON,
    )
)
def test_any_options_file(tmp_path, options):
    path = tmp_path / "options.json"
    path.write_text(json.dumps(options))
    expect_options_or_a_message(path)


@FUZZ
@given(content=st.binary(max_size=100))
def test_any_bytes_for_an_options_file(tmp_path, content):
    path = tmp_path / "options.json"
    path.write_bytes(content)
    expect_options_or_a_message(path)


def expect_options_or_a_message(path):
    try:
        read = read_options([f"--options_file={path}"])
    except UserError as error:
        assert str(path) in str(error) or "--reward" in str(error)  # the default target is that of the reward
    else:
        assert isinstance(read, Options)


TENSOR = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F16", "X"]), "shape": JSON, "data_offsets": JSON}
)


@FUZZ
@given(header=JSON | st.dictionaries(st.text(max_size=5), TENSOR), data=st.binary(max_size=64))
def test_any_safetensors_header(tmp_path, header, data):
    content = json.dumps(header).encode()
    path = tmp_path / "file.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content + data)
    for read in (count_weights, read_metadata):
        try:
            read(path)
        except UserError as error:
            assert "file.safetensors is damaged" in str(error)


@FUZZ
@given(content=st.binary(max_size=100))
def test_any_bytes_for_safetensors(tmp_path, content):
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    for read in (count_weights, read_metadata):
        with pytest.raises(UserError, match=r"file\.safetensors is damaged"):
            read(path)

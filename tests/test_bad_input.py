"""Files of other people, damaged ones, anything at all: one message that says what is wrong, no traceback."""

import json
import shutil

import refl_lora
from refl.model.folder import check_model, count_weights, resolution_of
from refl.model.lora import LORA_FILE, METADATA_KEY, add_lora, read_metadata
from refl.model.pipeline import load_lora, load_pipeline
from refl.reward import imagereward
from refl.system import prompts
from refl.system.errors import UserError
from refl.system.weights import read_safetensors
from refl.train.options import Options, read_options

import pytest
import torch
from conftest import run_in_process, save_lora, weight_options
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
    "unet config cut": (cut(f"{MODEL}/unet/config.json", 30), "unet/config.json, line 2: not valid JSON"),
    "unet config a list": (
        write(f"{MODEL}/unet/config.json", "[1]"),
        "config.json cannot be read: it is not a JSON object",
    ),
    "unet config not text": (
        write(f"{MODEL}/unet/config.json", b"\xff\xfe\x00"),
        "config.json, line 1: not UTF-8 text",
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
        "sample_size should be a valid integer, and is 'large'",
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
    "med_config empty": (write("med_config.json", ""), "med_config.json, line 1: not valid JSON"),
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
        (["--prompts", tmp_path / "folder.txt"], "folder.txt cannot be read: it is a folder"),
        (["--output_dir", tmp_path / "loop" / "out"], "cannot be used for output|cannot be written"),
        (["--output_dir", "/proc/out"], "cannot be written"),
        (["--output_dir", "a\x00b"], "cannot be used for output|null"),
        (["--options_file", tmp_path / "folder.txt"], "folder.txt cannot be read"),
        (["--resume_from_checkpoint", tmp_path], "is not a complete checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            run_in_process(refl_lora, monkeypatch, *training_options, *options)


# File, entry, value, and what must be said.
CONFIGURATIONS = [
    (file, entry, value, message)
    for file, entries in {
        f"{MODEL}/scheduler/scheduler_config.json": {
            "num_train_timesteps": ("many", None, 0, 10**9),
            "beta_start": (None, "a", -1, float("nan"), 1e-12),
            "beta_end": ([1], 7),
            "beta_schedule": ("round", 3),
            "prediction_type": (3, "x0"),
            "trained_betas": ("a", [0.1, "b"], [2.0]),
            "steps_offset": ("a",),
            "clip_sample": ("yes",),
            "timestep_spacing": ("wide",),
        },
        f"{MODEL}/vae/config.json": {
            "scaling_factor": (None, 0, float("inf"), "a"),
            "latent_channels": ("four",),
            "block_out_channels": (8, ["a"], [], None),
            "act_fn": (3, "nothing"),
            "norm_num_groups": (0, 3),
            "layers_per_block": (None,),
        },
        f"{MODEL}/unet/config.json": {
            "norm_eps": ("a",),
            "attention_head_dim": ("a", 0),
            "act_fn": ("nothing",),
            "down_block_types": ("a", ["a"], None),
            "mid_block_scale_factor": ("a",),
        },
        f"{MODEL}/text_encoder/config.json": {
            "hidden_act": ("nothing", 3),
            "layer_norm_eps": ("a", None),
            "num_attention_heads": (0, 3, "a"),
            "max_position_embeddings": (0, "a", 20),
            "vocab_size": ("a", 10),
        },
        f"{MODEL}/tokenizer/tokenizer_config.json": {
            "model_max_length": (1, -1, 0, "a", None, 10**30),
            "pad_token": (3,),
        },
        f"{MODEL}/model_index.json": {"_class_name": (3, ["a"], None, "FluxPipeline")},
        "med_config.json": {
            "score_mean": ("a", None, float("nan")),
            "score_std": (0, "a", -1),
            "num_attention_heads": (0, 5, "a"),
            "hidden_act": ("nothing", 3),
            "layer_norm_eps": ("a",),
            "vision_image_size": ("a", 7, 10**9),
        },
    }.items()
    for entry, values in entries.items()
    for value in values
    for message in [file.rpartition("/")[2].partition(".")[0]]
]


def load(folder, file):
    """Load what a file of the checkpoint belongs to, the model or the reward, as training and drawing do."""
    if not file.startswith(MODEL):
        return imagereward.load(folder)
    check_model(folder / MODEL, 4)
    resolution_of(folder / MODEL, None)
    return load_pipeline(folder / MODEL, "pndm", torch.float32, "cpu")


@pytest.fixture(scope="module")
def copied(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("copied") / "checkpoint"
    shutil.copytree(tiny, folder)
    return folder


@pytest.mark.parametrize(("file", "entry", "value", "message"), CONFIGURATIONS)
def test_values_in_configurations(copied, file, entry, value, message):
    before = (copied / file).read_bytes()
    change_json(file, **{entry: value})(copied)
    try:
        with pytest.raises(UserError) as error:
            load(copied, file)
    finally:
        (copied / file).write_bytes(before)
    assert str(copied) in str(error.value) or message in str(error.value)


@pytest.mark.parametrize("file", [*dict.fromkeys(file for file, *_ in CONFIGURATIONS)])
def test_configurations_that_are_none(copied, file):
    load(copied, file)
    before = (copied / file).read_bytes()
    for content in (b"[" * 100_000, b'{"a": "\\ud800"}', b"[1]", b"", b"\xff", b'{"a": 1\0}'):
        (copied / file).write_bytes(content)
        try:
            if "tokenizer" in file and content.startswith(b'{"a": "'):  # which its library does not mind
                continue
            with pytest.raises(UserError, match=str(copied)):
                load(copied, file)
        finally:
            (copied / file).write_bytes(before)


# ------------------------------------------------------------------------------------------------------ LoRAs


def adapter(**changes):
    settings = {f"unet.{key}": value for key, value in ({"r": 2, "lora_alpha": 2} | changes).items()}
    return {"lora_adapter_metadata": json.dumps(settings)}


def refl(**changes):
    return {METADATA_KEY: json.dumps(changes)}


LORAS = {
    "half of the keys": (lambda w: {k: v for k, v in w.items() if ".up." in k}, {}, "has no partner"),
    "scalars": (lambda w: {k: torch.zeros(()) for k in w}, {}, "is not a matrix"),
    "no keys": (lambda w: {}, {}, "is not a LoRA: it holds no matrices"),
    "nan": (
        lambda w: w | {next(iter(w)): torch.full_like(next(iter(w.values())), torch.nan)},
        {},
        "not finite",
    ),
    "infinite": (lambda w: w | {next(iter(w)): next(iter(w.values())) + torch.inf}, {}, "not finite"),
    "a list for the adapter": (None, {"lora_adapter_metadata": "[1]"}, "it is not a JSON object"),
    "an adapter too deep": (None, {"lora_adapter_metadata": "[" * 99_999}, "nested too deeply"),
    "rank a word": (None, adapter(r="two"), "unet.r should be"),
    "rank zero": (None, adapter(r=0), "unet.r should be"),
    "alpha not finite": (None, adapter(lora_alpha=float("nan")), "unet.lora_alpha should be"),
    "rank_pattern not a pattern": (None, adapter(rank_pattern={"(": 2}), "unet.rank_pattern"),
    "rank_pattern for ever": (None, adapter(rank_pattern={"(a+)+$": 2}), "unet.rank_pattern"),
    "rank_pattern a list": (None, adapter(rank_pattern=["a"]), "unet.rank_pattern"),
    "target_modules a number": (None, adapter(target_modules=3), "unet.target_modules"),
    "metadata a list": (None, {METADATA_KEY: "[1]"}, "metadata refl cannot be read: it is not a JSON object"),
    "metadata too deep": (None, {METADATA_KEY: "[" * 99_999}, "nested too deeply"),
    "step a word": (None, refl(step="many"), "step should be a valid integer, and is 'many'"),
    "resolution a word": (None, refl(resolution="large"), "resolution should be"),
    "steps not finite": (None, refl(num_inference_steps=float("inf")), "num_inference_steps should be"),
    "sampler unknown": (None, refl(sampler="\x1b[2J"), "sampler should be"),
    "lora_in_uncond a word": (None, refl(lora_in_uncond="yes"), "lora_in_uncond should be"),
    "reward a list": (None, refl(reward=["a"]), "reward should be"),
    "guidance not finite": (None, refl(guidance_scale=float("nan")), "guidance_scale should be"),
}


@pytest.fixture(scope="module")
def lora(copied, tmp_path_factory):
    """A pipeline, and the LoRA of a training for it."""
    pipeline = load_pipeline(copied / MODEL, "pndm", torch.float32, "cpu")
    unet = load_pipeline(copied / MODEL, "pndm", torch.float32, "cpu").unet
    add_lora(unet, 2, 2, 0)
    return pipeline, save_lora(unet, tmp_path_factory.mktemp("lora"), {"step": 3})


def use(pipeline, file):
    read_metadata(file)
    load_lora(pipeline, file, 1.0)


@pytest.mark.parametrize("name", LORAS)
def test_loras_of_others(lora, tmp_path, name):
    pipeline, file = lora
    change, about, message = LORAS[name]
    weights, original = read_safetensors(file)
    save_file((change or dict)(weights), tmp_path / "other.safetensors", original | about)
    with pytest.raises(UserError, match=f"other.safetensors.*{message}"):
        use(pipeline, tmp_path / "other.safetensors")


def test_a_lora_of_another_name(lora, tmp_path):
    pipeline, file = lora
    for name in ("lora.bin", "lora", "lora.safetensors.bak"):
        shutil.copy(file, tmp_path / name)
        with pytest.raises(UserError, match=f"{name} is not called .safetensors"):
            use(pipeline, tmp_path / name)


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

"""LoRAs of others: applied wholly, or refused by the name of their kind and what does not fit."""

import pickle

from refl.model import merge
from refl.model.lora import LORA_FILE, _pack, _read_about, add_lora, pack_lora, to_kohya
from refl.model.lora_check import check_applied
from refl.model.pipeline import load_lora, load_pipeline
from refl.model.stable_diffusion import load_stable_diffusion
from refl.system.errors import UserError

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load, load_file, save_file

BLOCK = "lora_unet_down_blocks_0_attentions_0"
RANK, ALPHA = 2, 3.0


def random(*shape):
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(scope="module")
def pipeline(tiny):
    return load_pipeline(tiny / "stable-diffusion-v1-4", "ddim", torch.float32, "cpu")


@pytest.fixture(scope="module")
def ours(tiny) -> bytes:
    """A LoRA of this program, in diffusers' format: 80 layers, 160 matrices."""
    unet = load_stable_diffusion(tiny / "stable-diffusion-v1-4", torch.float32, "cpu").unet
    with torch.no_grad():
        for index, matrix in enumerate(add_lora(unet, RANK, ALPHA, 0)):
            matrix.copy_(random(*matrix.shape) + 0.01 * index)
    return pack_lora(unet, {})


@pytest.fixture(scope="module")
def kohya(ours) -> dict[str, torch.Tensor]:
    """The same in kohya's."""
    return load(to_kohya(ours, "run"))


def layer(name, inside, outside, shape=()):
    """A layer in kohya's format, a convolution if it has a `shape`."""
    return {
        f"{name}.lora_down.weight": random(RANK, inside, *shape),
        f"{name}.lora_up.weight": random(outside, RANK, *(1 for _ in shape)),
        f"{name}.alpha": torch.tensor(ALPHA),
    }


def text_part():
    """The part of a LoRA for the tiny text encoder."""
    attention = "lora_te_text_model_encoder_layers_0_self_attn"
    return layer(f"{attention}_q_proj", 16, 16) | layer(f"{attention}_out_proj", 16, 16)


def half(weights):
    """Every other key of the file, and of each layer."""
    return dict(sorted(weights.items())[::2])


def other(pattern, weights):
    """Rename half of the keys with `pattern` to layers that no model has."""
    keys = [key for key in sorted(weights) if pattern in key]
    renamed = set(keys[: len(keys) // 2])
    return {key.replace("attn1", "attn7") if key in renamed else key: v for key, v in weights.items()}


APPLIED = {  # from kohya's weights, to weights and how many layers they change
    "kohya": lambda k: (k, 80),
    "in half precision": lambda k: ({key: value.half() for key, value in k.items()}, 80),
    "without alphas": lambda k: ({key: v for key, v in k.items() if ".alpha" not in key}, 80),
    "with a text encoder": lambda k: (k | text_part(), 82),
    "of a text encoder alone": lambda k: (text_part(), 2),
    "with convolutions": lambda k: (
        k | layer(f"{BLOCK.replace('attentions', 'resnets')}_conv1", 8, 8, (3, 3)),
        81,
    ),
}


@pytest.mark.parametrize("case", APPLIED)
def test_applied(kohya, pipeline, tmp_path, case):
    weights, count = APPLIED[case](kohya)
    save_file(weights, tmp_path / "lora.safetensors")
    load_lora(pipeline, tmp_path / "lora.safetensors", 1.0)
    models = pipeline.unet, pipeline.text_encoder
    layers = [m for model in models for m in model.modules() if isinstance(m, BaseTunerLayer)]
    scale = 1.0 if case == "without alphas" else ALPHA / RANK
    assert [own.scaling["default"] for own in layers] == [scale] * count


def with_key(ending, value=None):
    """Add a tensor of a layer's."""
    return lambda k: k | {f"{BLOCK}_proj_in.{ending}": torch.ones(8) if value is None else value}


def hada(weights):
    return {f"{BLOCK}_proj_in.hada_w{n}_{m}": torch.ones(2, 8) for n in (1, 2) for m in "ab"}


REFUSED = {  # from kohya's weights, to others and the message
    "DoRA": (with_key("dora_scale"), r"is a DoRA, .*: 1 of its 241 tensors .*proj_in.dora_scale"),
    "LoHa": (hada, r"is a LyCORIS file \(LoHa\), .*: 4 of its 4 tensors cannot be applied.*kohya's format"),
    "LoKr": (lambda k: {f"{BLOCK}_proj_in.lokr_w1": torch.ones(2, 2)}, r"a LyCORIS file \(LoKr\)"),
    "OFT": (lambda k: {f"{BLOCK}_proj_in.oft_blocks": torch.ones(2, 2)}, r"a LyCORIS file \(OFT"),
    "whole weights": (with_key("diff"), "differences, .*: 1 of its 241 tensors"),
    "peft": (
        lambda k: {"base_model.model.mid_block.to_q.lora_A.weight": torch.ones(2, 8)},
        "peft's own format .save it by save_lora_weights",
    ),
    "SDXL": (lambda k: k | {"lora_te2_text.lora_down.weight": torch.ones(2, 8)}, "another model .SDXL."),
    "a model": (
        lambda k: {"conv_in.weight": torch.ones(3)},
        "is not a LoRA: .*but conv_in.weight and 0 others",
    ),
    "nothing": (lambda k: {}, "is not a LoRA: it holds no matrices of one"),
    "half of its keys": (half, "is not complete: .* has no partner"),
    "no up": (lambda k: {key: v for key, v in k.items() if "lora_up" not in key}, "is not complete"),
    "half of its alphas": (
        lambda k: {key: v for key, v in k.items() if ".alpha" not in key or "attn1" in key},
        "does not fit this model: it has 40 alphas for 80 layers",
    ),
    "layers of another model": (lambda k: other("attn1", k), "does not fit this model"),
    "a scalar": (with_key("lora_down.weight", torch.tensor(1.0)), "is not complete"),
    "another width": (
        lambda k: k | layer(f"{BLOCK}_transformer_blocks_0_attn1_to_q", 9, 8),
        "does not fit this model; .*another architecture",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(kohya, pipeline, tmp_path, case):
    change, message = REFUSED[case]
    file = tmp_path / "lora.safetensors"
    save_file(change(kohya), file)
    with pytest.raises(UserError, match=message):
        load_lora(pipeline, file, 1.0)
    save_file(kohya, file)
    load_lora(pipeline, file, 1.0)  # nothing is left of what was refused


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: other("attn1", w), "does not fit this model: 40 of its 160 matrices fit no layer"),
        (
            lambda w: {key.removeprefix("unet."): v for key, v in w.items()},
            "160 of its 160 matrices fit no layer",
        ),
    ],
)
def test_our_format_with_other_keys_is_refused(parts, ours, pipeline, tmp_path, change, message):
    """Its metadata says which layers it has, and the others would be left as they are."""
    about, _ = _read_about(ours)
    (tmp_path / LORA_FILE).write_bytes(_pack(change(load(ours)), about))
    with pytest.raises(UserError, match=message):
        load_lora(pipeline, tmp_path, 1.0)


def test_layers_that_the_file_does_not_name_are_noticed(ours, pipeline, tmp_path):
    (tmp_path / LORA_FILE).write_bytes(ours)
    load_lora(pipeline, tmp_path, 1.0)
    save_file(half(load(ours)), tmp_path / LORA_FILE)
    with pytest.raises(UserError, match="80 of 160 matrices are not in the file"):
        check_applied(tmp_path / LORA_FILE, (pipeline.unet, pipeline.text_encoder))


@pytest.mark.parametrize(
    "name, content, path, message",
    [
        ("pytorch_lora_weights.bin", pickle.dumps({}), "pytorch_lora_weights.bin", "Convert pickles"),
        (
            "adapter_model.safetensors",
            b"",
            ".",
            "no LoRA at .* holds adapter_model.safetensors: name the file",
        ),
        ("lora.safetensors", pickle.dumps({}), "lora.safetensors", "is damaged or is not a safetensors file"),
    ],
)
def test_files_of_other_kinds(pipeline, tmp_path, name, content, path, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_lora(pipeline, tmp_path / path, 1.0)


def test_a_merge_keeps_the_part_for_the_text_encoder(kohya, tiny, tmp_path, pipeline):
    model, file = tiny / "stable-diffusion-v1-4", tmp_path / "lora.safetensors"
    save_file(kohya | text_part(), file)
    merge.merge(merge.Options(str(model), str(file), 0.5, str(tmp_path / "merged")))
    before, after = (
        load_file(folder / "text_encoder/model.safetensors") for folder in (model, tmp_path / "merged")
    )
    before = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in before.items()}
    assert before.keys() == after.keys()
    for key, value in before.items():
        wanted = value
        for part in ("q_proj", "out_proj"):
            if key.endswith(f"self_attn.{part}.weight"):
                down, up = list(layer("", 16, 16).values())[:2]
                wanted = value + 0.5 * ALPHA / RANK * up @ down
        torch.testing.assert_close(after[key], wanted.to(value.dtype), rtol=2e-3, atol=1e-4)
    merged = load_pipeline(tmp_path / "merged", "ddim", torch.float32, "cpu")
    load_lora(pipeline, file, 0.5)
    ours, theirs = (one.encode_prompt("a fox", "cpu", 1, False)[0] for one in (pipeline, merged))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0.02)


def test_a_merge_without_it_leaves_the_text_encoder(ours, tiny, tmp_path):
    model = tiny / "stable-diffusion-v1-4"
    (tmp_path / LORA_FILE).write_bytes(ours)
    merge.merge(merge.Options(str(model), str(tmp_path), 1.0, str(tmp_path / "merged")))
    for file in (model / "text_encoder").iterdir():
        assert file.read_bytes() == (tmp_path / "merged/text_encoder" / file.name).read_bytes()

"""ImageReward from files in the published format, held against a plain reference; tests/parity compares with
the published package itself."""

import json
import logging
import shutil
import sys

from refl.reward import imagereward
from refl.reward import score as command
from refl.reward.preprocessing import PIXEL_MEAN, PIXEL_STD
from refl.system.errors import UserError

import pytest
import torch
from conftest import ROOT, run_script
from parity.parity import ALL_IMAGES, to_tensor
from parity.parity import PROMPTS as AWKWARD_PROMPTS
from PIL import Image
from plain_imagereward import plain_score
from safetensors.torch import save_file

PROMPTS = ["a red cat", "three green apples"]
IMAGES = torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------ the same function


@pytest.fixture
def exact(reward) -> imagereward.ImageReward:
    """In float64, where a wrong constant cannot hide in rounding."""
    return reward.double()


def compare(reward, tiny) -> torch.Tensor:
    """Largest difference between `reward` and the plain reference, over awkward prompts."""
    weights = torch.load(tiny / "ImageReward.pt", weights_only=True)
    weights = {key: value.double() for key, value in weights.items()}
    prompts = list(AWKWARD_PROMPTS.values())
    pixels = imagereward.preprocess(IMAGES[:1].double().repeat(len(prompts), 1, 1, 1), reward.image_size)
    tokens = imagereward.load_tokenizer(tiny / "bert-base-uncased")(
        prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    expected = plain_score(
        weights, pixels, tokens.input_ids, tokens.attention_mask, vision_heads=4, text_heads=3
    )
    assert expected.std() > 0.05  # prompts make a difference
    return (reward.score_pixels(pixels, prompts) - expected).abs().max()


def test_it_is_the_published_function(exact, tiny):
    assert compare(exact, tiny) < 1e-10


def wrap(module, change):
    """`module.forward` with its result or arguments changed."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: change(forward, args, kwargs)


def text_heads(reward):
    for layer in reward.text.encoder.layer:
        layer.attention.self.num_attention_heads = layer.crossattention.self.num_attention_heads = 8


def vision_heads(reward):
    for layer in reward.vision.encoder.layers:
        layer.self_attn.num_heads = 8


def twice_normalised(reward):
    def change(forward, args, kwargs):
        output = forward(*args, **kwargs)
        output.last_hidden_state = reward.vision.post_layernorm(output.last_hidden_state)
        return output

    wrap(reward.vision, change)


def enc_first(reward):
    tokenize = reward.tokenize

    def change(prompts):
        tokens = tokenize(prompts)
        tokens.input_ids[:, 0] = reward.tokenizer.convert_tokens_to_ids("[ENC]")
        return tokens

    reward.tokenize = change


def epsilon(tower, value):
    def change(reward):
        for module in getattr(reward, tower).modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = value

    return change


def tanh_gelu(reward):
    for layer in reward.vision.encoder.layers:
        layer.mlp.activation_fn = torch.nn.GELU(approximate="tanh")


def causal_text(reward):
    def change(forward, args, kwargs):
        padding = kwargs["attention_mask"]  # (B, 1, 1, tokens), 0 or -inf
        later = torch.full((padding.shape[-1],) * 2, -torch.inf, dtype=padding.dtype).triu(1)
        return forward(*args, **kwargs | {"attention_mask": padding + later})

    wrap(reward.text, change)


WRONG_CHOICES = {
    "causal text": causal_text,
    "image normalised twice": twice_normalised,
    "no text mask": lambda reward: wrap(
        reward.text, lambda forward, args, kwargs: forward(*args, **kwargs | {"attention_mask": None})
    ),
    "8 text heads": text_heads,
    "8 vision heads": vision_heads,
    "[ENC] first": enc_first,
    "vision epsilon 1e-5": epsilon("vision", 1e-5),
    "text epsilon 1e-6": epsilon("text", 1e-6),
    "another GELU": tanh_gelu,
    "score not normalised": lambda reward: setattr(reward, "score_std", 1.0),
}


@pytest.mark.parametrize("choice", WRONG_CHOICES)
def test_every_wrong_choice_shows(exact, tiny, choice):
    WRONG_CHOICES[choice](exact)
    assert compare(exact, tiny) > 1e-7


def test_the_text_tower_is_given_what_it_needs(reward):
    assert reward.text.config.is_decoder  # creates the cross attention
    assert reward.text.config.encoder_hidden_size == reward.vision.config.hidden_size  # not med_config's
    assert reward.vision.config.layer_norm_eps == 1e-6 and reward.text.config.layer_norm_eps == 1e-12
    assert reward.tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [100, 101]
    assert not reward.training and not any(p.requires_grad for p in reward.parameters())
    assert not any(t.is_meta for t in [*reward.parameters(), *reward.buffers()])
    assert not any(m.p for m in reward.modules() if isinstance(m, torch.nn.Dropout))


def test_gradient_is_that_of_finite_differences(exact):
    images = IMAGES.double().requires_grad_()
    (gradient,) = torch.autograd.grad(exact(images, PROMPTS).sum(), images)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = 1e-5
    with torch.no_grad():
        ahead, behind = (exact(images + sign * step * direction, PROMPTS).sum() for sign in (1, -1))
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind) / (2 * step), rtol=1e-6, atol=0)


def test_gradient_reaches_the_whole_image(reward):
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    reward(images, PROMPTS[:1]).sum().backward()
    assert images.grad.isfinite().all() and (images.grad != 0).float().mean() > 0.95


def test_med_config_sets_what_it_names(copy, reward):
    config = json.loads((copy / "med_config.json").read_text())
    (copy / "med_config.json").write_text(json.dumps(config | {"score_mean": 0.0, "score_std": 2.0}))
    raw = reward(IMAGES, PROMPTS) * reward.score_std + reward.score_mean
    torch.testing.assert_close(imagereward.load(copy)(IMAGES, PROMPTS), raw / 2)
    (copy / "med_config.json").write_text(json.dumps(config | {"vision_num_attention_heads": 2}))
    assert not torch.allclose(imagereward.load(copy)(IMAGES, PROMPTS), reward(IMAGES, PROMPTS), atol=1e-6)


def test_scores_do_not_depend_on_the_batch(reward):
    together = reward(IMAGES, PROMPTS)
    alone = torch.cat([reward(IMAGES[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_half_precision_keeps_head_and_score_in_float32(tiny, reward):
    half = imagereward.load(tiny, dtype=torch.bfloat16)
    assert half.vision.dtype == half.text.dtype == torch.bfloat16
    assert half.head[0].weight.dtype == half(IMAGES, PROMPTS).dtype == torch.float32
    torch.testing.assert_close(half(IMAGES, PROMPTS), reward(IMAGES, PROMPTS), rtol=0, atol=0.03)


# ---------------------------------------------------------------------------------------------- preprocessing


def in_levels(pixels: torch.Tensor) -> torch.Tensor:
    """Preprocessed pixels back in levels of 0 to 255."""
    mean, std = (torch.tensor(stat).view(3, 1, 1) for stat in (PIXEL_MEAN, PIXEL_STD))
    return (pixels * std + mean) * 255


OPAQUE = [kind for kind in ALL_IMAGES if kind not in ("RGBA", "LA", "P", "1")]


@pytest.mark.parametrize("kind", OPAQUE)
def test_images_and_tensors_are_prepared_alike(kind):
    image = ALL_IMAGES[kind]
    by_pillow = in_levels(imagereward.preprocess_pil(image, 224))
    by_torch = in_levels(imagereward.preprocess(to_tensor(image), 224))
    assert by_pillow.shape == by_torch.shape == (1, 3, 224, 224)
    # Pillow rounds and clamps after each of its two passes: 0.3 levels, on thin lines 0.7 and at most 7.
    difference = (by_pillow - by_torch.clamp(0, 255)).abs()
    assert difference.mean() < 0.75 and difference.max() < 8


def test_without_antialiasing_it_would_show():
    image = to_tensor(ALL_IMAGES["thin lines"])
    aliased = torch.nn.functional.interpolate(image, size=(224, 224), mode="bicubic") * 255
    assert (in_levels(imagereward.preprocess(image, 224)) - aliased).abs().mean() > 5


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "1"])
def test_images_are_resized_in_their_own_mode(kind):
    # As published: a palette is not blended, colours are weighed by alpha. RGB first gives another image.
    image = ALL_IMAGES[kind]
    own_mode = image.resize((224, 224), Image.Resampling.BICUBIC).convert("RGB")
    rgb_first = image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    prepared = in_levels(imagereward.preprocess_pil(image, 224))
    torch.testing.assert_close(prepared, to_tensor(own_mode) * 255, rtol=0, atol=1e-3)
    assert (prepared - to_tensor(rgb_first) * 255).abs().max() > 10


def test_preprocessing_is_centred_and_normalised():
    wide = torch.zeros(1, 3, 50, 150)
    wide[..., 50:100] = 1
    assert imagereward.preprocess(wide, 50).std() < 0.2  # only the white middle is left
    mean = torch.tensor(PIXEL_MEAN).view(3, 1, 1).expand(1, 3, 32, 32)
    assert imagereward.preprocess(mean, 32).abs().max() < 1e-6
    assert imagereward.preprocess(torch.zeros(2, 3, 33, 47).half(), 32).dtype == torch.float32


def test_images_and_tensors_are_scored_alike():
    reward = imagereward.load(ROOT / "demo/checkpoint")
    differences = []
    for kind in OPAQUE:
        image = ALL_IMAGES[kind]
        by_pillow, by_torch = (reward.score("a red circle", one) for one in (image, to_tensor(image)[0]))
        differences.append(abs(by_pillow - by_torch))
    assert sorted(differences)[len(OPAQUE) // 2] < 0.004 and max(differences) < 0.03


# ------------------------------------------------------------------------------------------- what people call


@pytest.fixture
def files(tmp_path):
    """Three image files."""
    kinds = ("smooth", "wide", "grey")
    paths = [tmp_path / f"{kind}.png" for kind in kinds]
    for kind, path in zip(kinds, paths, strict=True):
        ALL_IMAGES[kind].save(path)
    return paths


def test_score_takes_images_paths_and_tensors(reward, files):
    by_path = reward.score("a red cat", files)
    assert by_path == reward.score("a red cat", [Image.open(path) for path in files])
    assert by_path == [pytest.approx(reward.score("a red cat", str(path)), abs=1e-5) for path in files]
    assert (
        isinstance(reward.score("a red cat", files[0]), float)
        and len(reward.score("a red cat", files[:1])) == 1
    )
    for batch_size in (1, 2):
        assert reward.score("a red cat", files, batch_size) == pytest.approx(by_path, abs=1e-5)
    tensors = [to_tensor(Image.open(path))[0] for path in files]
    assert reward.score("a red cat", tensors) == pytest.approx(by_path, abs=0.02)
    assert reward.score("a red cat", IMAGES) == pytest.approx(
        reward(IMAGES, ["a red cat"] * 2).tolist(), abs=1e-5
    )
    assert reward.score("a red cat", []) == []


def test_rank_gives_each_image_its_place(reward, files):
    ranks, scores = reward.rank("a red cat", files)
    assert scores == reward.score("a red cat", files)
    assert sorted(ranks) == [1, 2, 3] and scores[ranks.index(1)] == max(scores)
    assert scores[ranks.index(3)] == min(scores)
    assert reward.rank("a red cat", [files[0], files[0]])[0] == [1, 2]


def test_what_is_no_image_is_refused(reward, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    for image, message in (
        (tmp_path / "nowhere.png", "nowhere.png cannot be read: no such file"),
        (tmp_path / "text.png", "text.png cannot be read: not an image"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"\(3, H, W\), floating, in \[0, 1\]; this one is"),
        (torch.full((3, 8, 8), 255.0), "goes from 255 to 255"),
        (torch.full((3, 8, 8), float("nan")), "goes from nan"),
        (torch.full((3, 8, 8), 1.01), "goes from 1.01 to 1.01"),
        (torch.zeros(1, 8, 8), r"this one is \(1, 8, 8\)"),
        (torch.zeros(3, 8, 8).numpy(), "a PIL image, a path or a tensor; this is a ndarray"),
        ([None], "this is a NoneType"),
        (None, "this is a NoneType"),
    ):
        with pytest.raises(UserError, match=message):
            reward.score("a red cat", image)


def test_images_and_prompts_must_pair_up(reward):
    # A text would be read letter by letter, one prompt be repeated, two become a pair of BERT's.
    for prompts in ("a red fox", ["one"], ["a", "b", "c"], ["a", None], "ab"):
        with pytest.raises(UserError, match="2 images need as many prompts, in a list; got"):
            reward(IMAGES, prompts)
    with pytest.raises(UserError, match="need as many prompts"):
        reward.score(["a red", "cat dog"], IMAGES)
    assert torch.equal(reward(IMAGES, tuple(PROMPTS)), reward(IMAGES, PROMPTS))


def test_prompts_are_cut_at_35_tokens_and_it_is_said_once(reward, caplog):
    fits = "a " * 30
    assert not torch.equal(reward(IMAGES[:1], [fits + "cat"]), reward(IMAGES[:1], [fits + "dog"]))
    assert not caplog.records
    caplog.set_level(logging.WARNING)
    long = "a " * 33
    assert torch.equal(reward(IMAGES[:1], [long + "cat dog"]), reward(IMAGES[:1], [long + "hill"]))
    assert len(caplog.records) == 1 and "35 tokens" in caplog.text and "cat dog" in caplog.text


def test_the_command_prints_a_table(reward, tiny, files, monkeypatch, capsys):
    options = ["a red cat", *map(str, files), "--reward_path", str(tiny), "--batch_size", "2"]
    monkeypatch.setattr(sys, "argv", ["imagereward", *options])
    command.main()
    ranks, scores = reward.rank("a red cat", files)
    header, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert header == ["rank", "score", "image"]
    expected = sorted(zip(ranks, scores, map(str, files), strict=True))
    assert [(int(rank), path) for rank, _, path in rows] == [(rank, path) for rank, _, path in expected]
    assert [float(row[1]) for row in rows] == pytest.approx([score for _, score, _ in expected], abs=6e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ("a.png b.png", "no such image: a.png, b.png"),
        ("", "name one image or more"),
        ("README.md --reward_path nowhere", "nowhere/ImageReward.pt .*THUDM/ImageReward"),
        ("README.md --reward_path nowhere.pt", "nowhere.pt .*THUDM/ImageReward"),
        ("README.md --device cuda:9", "--device cuda:9: not a device that can be used on this machine"),
        ("README.md --device meta", "--device meta: not a device that can be used"),
        ("README.md", "README.md cannot be read: not an image"),
        ("a.png --batch_size 0", "--batch_size 0: must be 1 or more"),
    ],
)
def test_the_command_refuses(tiny, monkeypatch, options, message):
    options = ["a red cat", "--reward_path", str(tiny), *options.split()]
    monkeypatch.setattr(sys, "argv", ["imagereward", *options])
    with pytest.raises(UserError, match=message):
        command.main()


def test_the_command_runs_from_the_shell(tiny):
    run = run_script(sys.executable, "-m", "refl", "score", "a red cat", "a.png", "--reward_path", tiny)
    assert run.returncode == 2 and run.stderr.strip() == "error: no such image: a.png."


def test_the_command_scores_what_it_can_read(tiny, files, monkeypatch, capsys):
    files[1].write_bytes(files[1].read_bytes()[:5000])
    monkeypatch.setattr(
        sys, "argv", ["imagereward", "a cat", *map(str, files), "--reward_path", str(tiny / "ImageReward.pt")]
    )
    with pytest.raises(UserError, match="wide.png cannot be read: not an image"):
        command.main()
    assert len(capsys.readouterr().out.splitlines()) == 3


# ------------------------------------------------------------------------------------------------------ files


@pytest.fixture
def copy(tiny, tmp_path):
    """A reward's files, free to be spoilt."""
    for name in ("ImageReward.pt", "med_config.json"):
        shutil.copy(tiny / name, tmp_path)
    shutil.copytree(tiny / "bert-base-uncased", tmp_path / "bert-base-uncased")
    return tmp_path


def reload(folder, change):
    """Apply `change` to the published weights in `folder`, then load them."""
    weights = torch.load(folder / "ImageReward.pt", weights_only=True)
    change(weights)
    torch.save(weights, folder / "ImageReward.pt")
    return imagereward.load(folder)


def test_the_file_has_the_published_keys_and_comes_back(reward, tiny):
    weights = torch.load(tiny / "ImageReward.pt", weights_only=True)
    assert "blip.visual_encoder.cls_token" in weights and "mlp.layers.7.bias" in weights
    assert "blip.visual_encoder.blocks.1.attn.qkv.bias" in weights
    assert "blip.text_encoder.encoder.layer.0.crossattention.self.query.weight" in weights
    published = imagereward.published_state_dict(reward)
    assert published.keys() == weights.keys()
    assert all(torch.equal(weights[key], value) for key, value in published.items())


def test_other_forms_of_the_file_load_alike(copy, reward, tmp_path):
    expected = reward(IMAGES, PROMPTS)
    assert torch.equal(imagereward.load(copy / "ImageReward.pt")(IMAGES, PROMPTS), expected)
    weights = torch.load(copy / "ImageReward.pt", weights_only=True)
    torch.save(weights, copy / "ImageReward.pt", _use_new_zipfile_serialization=False)  # cannot be mapped
    assert torch.equal(imagereward.load(copy)(IMAGES, PROMPTS), expected)
    torch.save({key: value.half() for key, value in weights.items()}, copy / "ImageReward.pt")
    halved = imagereward.load(copy)
    assert halved.vision.dtype == halved.head[0].weight.dtype == torch.float32
    torch.testing.assert_close(halved(IMAGES, PROMPTS), expected, rtol=0, atol=0.01)
    (copy / "ImageReward.pt").unlink()
    save_file(weights, copy / "ImageReward.safetensors")
    for path in (copy, copy / "ImageReward.safetensors"):
        assert torch.equal(imagereward.load(path)(IMAGES, PROMPTS), expected)


def test_unused_published_keys_are_left_out(copy, reward):
    def add(weights):
        weights["blip.vision_proj.weight"] = torch.zeros(1)
        weights["blip.text_proj.bias"] = torch.zeros(1)
        weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]

    assert torch.equal(reload(copy, add)(IMAGES, PROMPTS), reward(IMAGES, PROMPTS))


QUERY = "blip.text_encoder.encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("mlp.layers.7.weight"), r"1 missing: mlp\.layers\.7\.weight"),
        (lambda w: w.pop(QUERY), "1 missing: " + QUERY),
        (lambda w: w.update(extra=torch.zeros(2)), "1 unexpected: extra"),
        (
            lambda w: w.update({QUERY: torch.zeros(2, 3)}),
            rf"1 of another size: {QUERY} \(2, 3\) instead of \(24, 24\)",
        ),
        (lambda w: w.pop("blip.visual_encoder.pos_embed"), "1 missing: blip.visual_encoder.pos_embed"),
        (lambda w: [w.clear(), w.update(a=torch.zeros(1))], r"11 missing: blip\.\S+, .*; 1 unexpected: a"),
        (
            lambda w: [w.pop(key) for key in list(w) if "crossattention" in key],
            r"20 missing: .*crossattention",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_by_the_keys_in_them(copy, change, message):
    with pytest.raises(UserError, match=rf"ImageReward\.pt is not .*{message}"):
        reload(copy, change)


def test_damaged_and_foreign_files_are_refused(copy):
    content = (copy / "ImageReward.pt").read_bytes()
    lengths = [*range(0, 200, 7), *range(200, len(content), len(content) // 60), len(content) - 1]
    for spoilt in (*(content[:length] for length in lengths), b"not weights", b"PK\x03\x04"):
        (copy / "ImageReward.pt").write_bytes(spoilt)
        with pytest.raises(UserError, match=r"ImageReward\.pt is damaged or is not a file of weights"):
            imagereward.load(copy)
    save_file({"a": torch.zeros(1)}, copy / "ImageReward.pt")
    with pytest.raises(UserError, match=r"ImageReward\.pt is damaged or is not"):
        imagereward.load(copy)
    (copy / "ImageReward.pt").unlink()
    with pytest.raises(UserError, match=r"ImageReward\.pt cannot be read: no such file"):
        imagereward.load(copy)
    (copy / "ImageReward.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"ImageReward\.safetensors is damaged"):
        imagereward.load(copy)
    (copy / "ImageReward.safetensors").unlink()
    torch.save([torch.zeros(1)], copy / "ImageReward.pt")
    with pytest.raises(UserError, match="something other than a table of weights"):
        imagereward.load(copy)


def test_a_foreign_med_config_is_refused(copy):
    for text, message in (
        ("not json", r"med_config\.json, line 1: not valid JSON"),
        ("{}", r"med_config\.json are not those of an ImageReward model"),
        (
            '{"num_attention_heads": 5, "hidden_act": "gelu", "layer_norm_eps": 1e-12}',
            "not those of an ImageReward",
        ),
        ("[]", r"med_config\.json cannot be read: it is not a JSON object"),
    ):
        (copy / "med_config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            imagereward.load(copy)


def test_an_empty_tokenizer_is_refused(copy):
    # transformers makes a tokenizer of five words of a folder without vocabulary, and says nothing.
    for file in (copy / "bert-base-uncased").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="does not fit ImageReward.pt: 7 tokens instead of 102"):
        imagereward.load(copy)


def test_pickled_code_is_not_run(copy):
    class Attack:
        def __reduce__(self):
            return (open, (str(copy / "owned"), "w"))

    torch.save({"weights": Attack()}, copy / "ImageReward.pt")
    with pytest.raises(UserError, match="damaged or is not"):
        imagereward.load(copy)
    assert not (copy / "owned").exists()

"""PickScore, HPSv2, CLIP and the aesthetic predictors on tiny files in their published formats.

They are held against transformers' own model and processor and against a plain reference; tests/parity
compares them with the published packages at full size.
"""

import json
import shutil
import sys
from dataclasses import replace

import evaluate
import refl_lora
from refl.model.lora import add_lora
from refl.preflight import cost, memory
from refl.reward import aesthetic, clip, clip_tower, hpsv2, pickscore, preprocessing, rewards
from refl.reward import score as command
from refl.system.errors import UserError
from refl.system.files import require
from refl.train.options import Options

import numpy as np
import plain_clip
import pytest
import torch
from conftest import run_in_process, save_lora, weight_options
from parity.clips import PROMPTS as NAMED_PROMPTS
from parity.parity import ALL_IMAGES, to_tensor
from random_checkpoint import SIZES, write_clip_rewards
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPModel, CLIPTokenizer
from transformers.activations import QuickGELUActivation
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

CPU = torch.device("cpu")
PROMPTS = list(NAMED_PROMPTS.values())
IMAGES = torch.rand(2, 3, 40, 65, generator=torch.Generator().manual_seed(0))
ON_CLIP = ("pickscore", "hpsv2", "hpsv2.1", "clip", "aesthetic_v1", "aesthetic_v2")
H = SIZES["tiny"]["clip_h"]


def per_channel(*values):
    return torch.tensor(values, dtype=torch.float64).view(3, 1, 1)


MEAN = per_channel(0.48145466, 0.4578275, 0.40821073)
STD = per_channel(0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="session")
def clips(shared):
    """A folder with the files of all rewards on CLIP."""

    def make(folder):
        torch.manual_seed(0)
        write_clip_rewards(folder, SIZES["tiny"])

    return shared("clips", make)


def load(names, folder, dtype=torch.float32):
    return rewards.load(names, folder, CPU, dtype)


def scores_of(reward, images, prompts=PROMPTS):
    """(prompts, images) of tensors of images."""
    with torch.no_grad():
        return torch.stack([reward(images, [prompt] * len(images)) for prompt in prompts])


# ------------------------------------------------------------------------------------------ the same function


@pytest.fixture
def hps(clips):
    """HPSv2 in float64, where a wrong constant cannot hide in rounding."""
    return hpsv2.load(clips).double()


def hps_reference(folder, images):
    """(prompts, images): the long side to the tower's size, black around it, cosines in open_clip's names."""
    weights = torch.load(folder / "HPS_v2_compressed.pt")["state_dict"]
    weights = {key: value.double() for key, value in weights.items()}
    size, (height, width) = 32, images.shape[-2:]
    scale = size / max(height, width)
    resized = nn.functional.interpolate(
        images.double(), (round(height * scale), round(width * scale)), mode="bicubic", antialias=True
    )
    canvas = torch.zeros(len(images), 3, size, size, dtype=torch.float64)
    top, left = (size - resized.shape[2]) // 2, (size - resized.shape[3]) // 2
    canvas[..., top : top + resized.shape[2], left : left + resized.shape[3]] = resized
    shown = plain_clip.embed_image(weights, (canvas - MEAN) / STD, H["vision"]["heads"])
    tokenizer = CLIPTokenizer.from_pretrained(folder / hpsv2.CONFIG)
    ids = [tokenizer(text, truncation=True, max_length=77).input_ids for text in CLEANED]
    return torch.cat([plain_clip.embed_prompt(weights, own, H["text"]["heads"]) for own in ids]) @ shown.T


# What open_clip's tokenizer makes of the prompts before it looks for words.
CLEANED = [
    *PROMPTS[:4],
    "一只红色的狐狸,坐在雪地里!",
    'the fox\'s "den" & café … fine, $5.00 (e=mc^2) #1? <b>',
]


def apart(reward, folder):
    return (scores_of(reward, IMAGES.double()) - hps_reference(folder, IMAGES)).abs().max()


def test_hpsv2_is_the_published_function(hps, clips):
    reference = hps_reference(clips, IMAGES)
    assert apart(hps, clips) < 1e-12 and reference.std() > 0.05
    assert (reference.std(0) > 0.01).all() and (reference[:, 0] - reference[:, 1]).abs().max() > 0.002


def restyle(**changes):
    def change(reward):
        style = reward.tower.style
        values = {
            name: getattr(style, name) for name in ("pads", "crops_down", "rgb_first", "clean")
        } | changes
        reward.tower.style = clip_tower.Style(**values)

    return change


def repreprocess(change):
    """Change the pixels that the tower gets."""

    def apply(reward):
        preprocess = reward.tower.preprocess
        reward.tower.preprocess = lambda images: change(preprocess(images), images)

    return apply


def swap_query_and_key(reward):
    for layer in reward.tower.clip.text_model.encoder.layers:
        attention = layer.self_attn
        attention.q_proj, attention.v_proj = attention.v_proj, attention.q_proj


def set_heads(part, heads):
    def change(reward):
        for layer in getattr(reward.tower.clip, part).encoder.layers:
            attention = layer.self_attn
            attention.head_dim = attention.embed_dim // heads
            attention.scale = attention.head_dim**-0.5

    return change


def quick_gelu(reward):
    for layer in reward.tower.clip.vision_model.encoder.layers:
        layer.mlp.activation_fn = QuickGELUActivation()


def last_token(reward):
    """The embedding of a prompt is read at the end of its padding."""
    reward.tower.clip.text_model.forward = lambda input_ids, forward=reward.tower.clip.text_model.forward: (
        type("Output", (), {"pooler_output": forward(input_ids=input_ids).last_hidden_state[:, -1]})
    )


def pad_on_the_left(reward):
    reward.tower.tokenizer.padding_side = "left"


def not_causal(reward):
    for layer in reward.tower.clip.text_model.encoder.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, forward=forward, **kwargs: forward(
            *args, **kwargs | {"is_causal": False}
        )


def aliased(pixels, images):
    resized = nn.functional.interpolate(images, (20, 32), mode="bicubic")
    return preprocessing.preprocess(resized, 32, pads=True)


def white_around(pixels, images):
    ones, black = (
        preprocessing.preprocess(like(images), 32, True) for like in (torch.ones_like, torch.zeros_like)
    )
    return torch.where(ones == black, (1 - MEAN) / STD, pixels)


def imagenet(pixels, images):
    return (pixels * STD + MEAN - per_channel(0.485, 0.456, 0.406)) / per_channel(0.229, 0.224, 0.225)


def lower_epsilon(reward):
    for module in reward.tower.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6


WRONG_CHOICES = {
    "short side cropped": restyle(pads=False),
    "squashed": repreprocess(
        lambda pixels, images: preprocessing.preprocess(
            nn.functional.interpolate(images, (32, 32), mode="bicubic", antialias=True), 32
        )
    ),
    "white around": repreprocess(white_around),
    "padded at the bottom": repreprocess(lambda pixels, images: pixels.roll(-6, dims=2)),
    "not antialiased": repreprocess(aliased),
    "ImageNet's normalisation": repreprocess(imagenet),
    "tokens not cleaned": restyle(clean=None),
    "prompts padded on the left": pad_on_the_left,
    "prompt read at the last token": last_token,
    "text not causal": not_causal,
    "logit_scale": lambda reward: setattr(reward, "is_scaled", True),
    "another GELU": quick_gelu,
    "text heads": set_heads("text_model", 2),
    "vision heads": set_heads("vision_model", 4),
    "order of query and value": swap_query_and_key,
    "epsilon": lower_epsilon,
}


@pytest.mark.parametrize("choice", WRONG_CHOICES)
def test_every_wrong_choice_shows(hps, clips, choice):
    WRONG_CHOICES[choice](hps)
    assert apart(hps, clips) > 1e-7


def by_transformers(folder, tokenizer, images, is_scaled):
    """(prompts, images) by the model and processor that users of the Hub call, in float64."""
    model = CLIPModel.from_pretrained(folder, attn_implementation="eager").double().eval()
    process = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokens = CLIPTokenizer.from_pretrained(tokenizer)(
        PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**tokens, pixel_values=process(images, return_tensors="pt").pixel_values.double())
    return logits.logits_per_text / (1 if is_scaled else model.logit_scale.exp())


def test_pickscore_is_what_its_model_card_computes(clips):
    images = [ALL_IMAGES[kind] for kind in ("smooth", "wide", "tall", "P", "223x447", "31x500")]
    images.append(
        ALL_IMAGES["smooth"].resize((350, 320))
    )  # to (35, 32): of 3 columns, 1 or 2 are cut on the left
    expected = by_transformers(clips / "PickScore_v1", clips / pickscore.TOKENIZER, images, is_scaled=True)
    reward = pickscore.load(clips).double()
    got = torch.tensor([reward.score(prompt, images) for prompt in PROMPTS])
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)  # pixels are float32
    assert expected.std() > 1
    for wrong in (restyle(crops_down=False), restyle(clean=clip_tower.clean), restyle(rgb_first=False)):
        reward = pickscore.load(clips).double()
        wrong(reward)
        wrongly = torch.tensor([reward.score(prompt, images) for prompt in PROMPTS])
        assert (wrongly - expected).abs().max() > 1e-3
    reward.is_scaled = False
    assert abs(reward.score(PROMPTS[0], images[0])) <= 1


def test_clip_is_the_cosine_of_transformers(clips):
    images = [ALL_IMAGES[kind] for kind in ("smooth", "photo-like noise", "grey")]  # square: crops agree
    expected = by_transformers(clips / clip.FOLDER, clips / clip.FOLDER, images, is_scaled=False)
    reward = clip.load(clips).double()
    got = torch.tensor([reward.score(prompt, images) for prompt in PROMPTS])
    torch.testing.assert_close(got[:4].double(), expected[:4], rtol=0, atol=1e-6)
    assert (got[4:] - expected[4:]).abs().max() > 1e-3  # OpenAI's tokenizer cleans these prompts


@pytest.mark.parametrize("version", [1, 2])
def test_the_aesthetic_predictors_are_their_published_heads(clips, version):
    name, load_head = (aesthetic.V1, nn.Linear(20, 1)) if version == 1 else (aesthetic.V2, published_head(20))
    load_head.load_state_dict(torch.load(clips / name))
    reward = load(f"aesthetic_v{version}", clips).rewards[f"aesthetic_v{version}"]
    with torch.no_grad():
        embeddings = clip.load(clips).features(IMAGES)
        expected = (load_head if version == 1 else load_head["layers"])(embeddings)[:, 0]
        torch.testing.assert_close(reward(IMAGES, ["a", "b"]), expected)
        assert torch.equal(reward(IMAGES, ["a", "b"]), reward(IMAGES, ["", "c"]))  # whatever the prompt


def published_head(width):
    """Version 2's head as it was published."""
    layers = [nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2)]
    layers += [nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)]
    return nn.ModuleDict({"layers": nn.Sequential(*layers)}).eval()


@pytest.mark.parametrize("name", ON_CLIP)
def test_gradients_are_those_of_finite_differences(clips, name):
    reward = load(name, clips).rewards[name].double()
    images = IMAGES.double().requires_grad_()
    prompts = ["a red fox", "a hill"]
    (gradient,) = torch.autograd.grad(reward(images, prompts).sum(), images)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = 1e-6 * direction
    with torch.no_grad():
        slope = (reward(images + step, prompts) - reward(images - step, prompts)).sum() / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-9)
    assert not any(parameter.requires_grad for parameter in reward.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_and_scores_are_float32_whatever_the_precision(clips, dtype):
    full, half = (load(",".join(ON_CLIP), clips, precision) for precision in (torch.float32, dtype))
    exact, scores = (some(IMAGES, ["a red fox", "a hill"]) for some in (full, half))
    assert scores.dtype == torch.float32
    allowed = torch.tensor([1.0, 0.01, 0.01, 0.01, 0.05, 0.05])[:, None]
    assert ((exact - scores).abs() < allowed).all() and (exact != scores).any()
    tower = half.rewards["clip"].tower
    assert tower.dtype == dtype and tower.clip.visual_projection.weight.dtype == torch.float32
    assert half.rewards["aesthetic_v2"].head.layers[0].weight.dtype == torch.float32
    with torch.autocast("cpu", dtype):
        assert half.rewards["aesthetic_v2"](IMAGES, ["a", "b"]).dtype == torch.float32


# ---------------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("kind", [kind for kind in ALL_IMAGES if kind not in ("RGBA", "LA", "P", "1")])
@pytest.mark.parametrize("pads", [False, True])
def test_tensors_and_pil_images_are_prepared_alike(kind, pads):
    image = ALL_IMAGES[kind]
    by_pillow = preprocessing.preprocess_pil(image, 224, pads, crops_down=True, rgb_first=True)
    by_torch = preprocessing.preprocess(to_tensor(image), 224, pads, crops_down=True)
    assert by_pillow.shape == by_torch.shape == (1, 3, 224, 224)
    assert not pads or torch.equal(by_pillow, by_torch)
    by_pillow, by_torch = ((pixels * STD + MEAN) * 255 for pixels in (by_pillow, by_torch))
    levels = (by_pillow.clamp(0, 255) - by_torch.clamp(0, 255)).abs()  # Pillow clamps what overshoots
    assert levels.mean() < 0.75 and levels.max() < 8


def test_pil_images_are_prepared_bit_for_bit_as_by_transformers():
    process = CLIPImageProcessorPil()
    for kind, image in ALL_IMAGES.items():
        if "A" in image.getbands():  # transformers 5 puts white below; before, and here, alpha is dropped
            continue
        pixels = torch.from_numpy(np.asarray(process(image)["pixel_values"][0]))[None]
        ours = preprocessing.preprocess_pil(image, 224, crops_down=True, rgb_first=True)
        torch.testing.assert_close(ours, pixels, rtol=0, atol=1e-6, msg=kind)


# ------------------------------------------------------------------------------- one tower, each image once


def count_calls(module, monkeypatch):
    """A list that grows with each call of `module`."""
    calls, forward = [], module.forward
    monkeypatch.setattr(
        module, "forward", lambda *args, **kwargs: (calls.append(1), forward(*args, **kwargs))[1]
    )
    return calls


def test_rewards_on_the_same_files_load_and_run_them_once(clips, monkeypatch):
    both = load("clip,aesthetic_v1,aesthetic_v2:2", clips)
    held_out = load("aesthetic_v2", clips)
    towers = {reward.tower for some in (both, held_out) for reward in some.rewards.values()}
    assert len(towers) == 1
    tower = towers.pop()
    images_seen = count_calls(tower.clip.vision_model, monkeypatch)
    prompts_seen = count_calls(tower.clip.text_model, monkeypatch)
    images = IMAGES.clone().requires_grad_()
    scores = both(images, ["a", "b"])
    assert len(images_seen) == 1 and len(prompts_seen) == 2
    (gradient,) = torch.autograd.grad(both.total(scores).sum(), images)
    assert torch.equal(both(images, ["b", "a"])[1:], scores[1:].detach()) and len(prompts_seen) == 2
    assert len(images_seen) == 2  # another call, another graph
    images = IMAGES.clone()
    with rewards.embedding_once(), torch.no_grad():
        both(images, ["a", "b"])
        held_out(images, ["a", "b"])
        both.features(images)
        assert len(images_seen) == 3
        images.mul_(0.5)
        assert not torch.equal(both(images, ["a", "b"])[1], scores[1])  # a changed image is another
    alone = torch.zeros_like(IMAGES)
    for weight, own in zip((1, 1, 2), both.rewards.values(), strict=True):
        leaf = IMAGES.clone().requires_grad_()
        alone += weight * torch.autograd.grad(own(leaf, ["a", "b"]).sum(), leaf)[0]
    torch.testing.assert_close(gradient, alone, rtol=1e-4, atol=1e-7)


def test_a_prompt_has_the_same_bits_beside_any_other(clips):
    first, second = pickscore.load(clips).tower, clip.load(clips).tower
    for tower in (first, second):
        tower._prompts.clear()
        together = tower.embed_prompts(["a red fox", "a hill"])
        tower._prompts.clear()
        assert torch.equal(tower.embed_prompts(["a hill"]), together[1:])


def test_a_kept_prompt_does_not_depend_on_the_first_caller(clips):
    reward = clip.load(clips)
    expected = reward.tower.embed_prompts(["a hill"])
    for mode in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        reward.tower._prompts.clear()
        with mode:
            assert torch.equal(reward.tower.embed_prompts(["a hill"]), expected)
        images = IMAGES[:1].clone().requires_grad_()
        assert torch.autograd.grad(reward(images, ["a hill"]).sum(), images)[0].any()


def test_few_prompts_are_kept(clips, monkeypatch):
    monkeypatch.setattr(clip_tower, "MAX_PROMPTS", 3)
    tower = clip.load(clips).tower
    tower._prompts.clear()
    for prompts in (["a", "b"], ["c", "d"], ["e", "e"]):
        assert tower.embed_prompts(prompts).shape == (2, 20)
    assert list(tower._prompts) == ["c", "d", "e"]


def test_changed_files_are_another_tower(clips, tmp_path):
    folder = copy(clips, tmp_path)
    before = clip.load(folder)
    file = folder / clip.FOLDER / "model.safetensors"
    weights = load_file(file)
    weights["visual_projection.weight"] *= -1
    save_file(weights, file)
    after = clip.load(folder)
    torch.testing.assert_close(after(IMAGES, ["a", "b"]), -before(IMAGES, ["a", "b"]))


@pytest.mark.parametrize("reward, vision", [("clip", 1), ("clip,aesthetic_v1", 1), ("clip,pickscore", 2)])
def test_a_shared_tower_is_counted_once(clips, tiny, reward, vision):
    model = str(tiny / "stable-diffusion-v1-4")
    options = Options(pretrained_model_name_or_path=model, reward_path=str(clips), reward=reward)
    part = "decoder and reward"
    counted = memory.count(options, torch.float32, 64)[part]
    one = memory.count(replace(options, reward="clip"), torch.float32, 64)[part]
    flops, of_one = (
        cost.count_parts(some, torch.float32, 64).reward_gradient
        for some in (options, replace(options, reward="clip"))
    )
    if vision == 1:
        assert counted == pytest.approx(one, abs=1e-6) and flops == pytest.approx(of_one, rel=1e-3)
    else:
        assert counted[0] > 1.0001 * one[0] and flops > 1.5 * of_one


# ------------------------------------------------------------------------------------------------------ files


def copy(clips, folder):
    """The files of the rewards, free to be spoilt."""
    return shutil.copytree(clips, folder / "copy")


def test_published_forms_load_alike(clips, tmp_path):
    folder = copy(clips, tmp_path)
    expected = load("pickscore,hpsv2", folder)(IMAGES, ["a", "b"])
    own = folder / "PickScore_v1"
    weights = load_file(own / "model.safetensors")
    (own / "model.safetensors").unlink()
    old = {"text_model.embeddings.position_ids": torch.arange(77)[None]}  # as saved by old transformers
    torch.save(weights | old, own / "pytorch_model.bin")
    hps = torch.load(folder / "HPS_v2_compressed.pt")["state_dict"]
    torch.save(hps, folder / "HPS_v2_compressed.pt")  # without the training's envelope
    scores = load("pickscore,hpsv2", folder)(IMAGES, ["a", "b"])
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)  # other addresses, other rounding
    torch.save(
        {"state_dict": {key: value.half() for key, value in hps.items()}}, folder / "HPS_v2_compressed.pt"
    )
    halved = load("hpsv2", folder)
    assert halved.rewards["hpsv2"].tower.dtype == torch.float32
    torch.testing.assert_close(halved(IMAGES, ["a", "b"])[0], expected[1], rtol=0, atol=1e-3)
    assert not torch.equal(load("hpsv2.1", folder)(IMAGES, ["a", "b"])[0], expected[1])


IN_PROJ = "visual.transformer.resblocks.1.attn.in_proj_weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("visual.proj"), r"1 missing: visual\.proj"),
        (lambda w: w.pop(IN_PROJ), "1 missing: " + IN_PROJ),
        (lambda w: w.update(extra=torch.zeros(2)), "1 unexpected: extra"),
        (
            lambda w: w.update({IN_PROJ: torch.zeros(2, 3)}),
            rf"3 of another size: {IN_PROJ} \(2, 3\) instead of",
        ),
        (lambda w: w.update({IN_PROJ: torch.tensor(1.0)}), r"3 of another size"),
        (lambda w: w.update({"visual.proj": torch.zeros(24, 40)}), r"1 of another size: visual\.proj"),
        (lambda w: [w.clear(), w.update(a=torch.zeros(1))], r"missing: ln_final\.bias, .*; 1 unexpected: a"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_the_keys_in_it(clips, tmp_path, change, message):
    folder = copy(clips, tmp_path)
    weights = torch.load(folder / "HPS_v2_compressed.pt")["state_dict"]
    change(weights)
    torch.save({"state_dict": weights}, folder / "HPS_v2_compressed.pt")
    with pytest.raises(UserError, match=rf"HPS_v2_compressed\.pt does not fit .*config\.json: .*{message}"):
        load("hpsv2", folder)


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


OPENAI, HUB = clip.FOLDER, pickscore.TOKENIZER


@pytest.mark.parametrize(
    "reward, spoil, message",
    [
        (
            "clip",
            write(f"{OPENAI}/config.json", "{"),
            r"clip-vit-large-patch14/config\.json is not the config",
        ),
        ("clip", write(f"{OPENAI}/config.json", '{"projection_dim": "x"}'), r"config\.json"),
        ("pickscore", write("PickScore_v1/config.json", "{}"), f"{HUB} does not fit the model: 600 tokens"),
        ("clip", write(f"{OPENAI}/vocab.json", "{"), f"{OPENAI} contains no readable CLIP tokenizer"),
        (
            "hpsv2",
            lambda folder: (folder / HUB / "vocab.json").write_text(
                '{"<|startoftext|>": 0, "<|endoftext|>": 1}'
            ),
            "does not fit the model: 2 tokens, and 1 ends a prompt, where 600 and 599 are expected",
        ),
        ("clip", write(f"{OPENAI}/model.safetensors", "x"), r"model\.safetensors is damaged"),
        ("aesthetic_v2", write(aesthetic.V2, "x"), "linearMSE.pth is damaged"),
        (
            "aesthetic_v1",
            lambda folder: torch.save({"weight": torch.zeros(1, 512)}, folder / aesthetic.V1),
            "is not the head of this aesthetic predictor .* Copy it again from https://github.com/LAION-AI",
        ),
    ],
)
def test_foreign_and_damaged_files_are_refused(clips, tmp_path, reward, spoil, message):
    folder = copy(clips, tmp_path)
    spoil(folder)
    with pytest.raises(UserError, match=message):
        load(reward, folder)


def test_pickled_code_is_not_run(clips, tmp_path):
    folder = copy(clips, tmp_path)

    class Attack:
        def __reduce__(self):
            return (open, (str(folder / "owned"), "w"))

    for name, reward in (("HPS_v2_compressed.pt", "hpsv2"), (aesthetic.V2, "aesthetic_v2")):
        torch.save({"state_dict": Attack()}, folder / name)
        with pytest.raises(UserError, match="is damaged or is not"):
            load(reward, folder)
    assert not (folder / "owned").exists()


def test_missing_files_are_named_with_their_sources(tmp_path):
    with pytest.raises(UserError) as caught:
        require(rewards.required_files("pickscore,hpsv2", tmp_path, "hpsv2.1,clip,aesthetic_v1,aesthetic_v2"))
    for name, source in (
        ("PickScore_v1/config.json", "on the Hugging Face Hub: yuvalkirstain/PickScore_v1"),
        ("PickScore_v1/model.safetensors", "on the Hugging Face Hub: yuvalkirstain/PickScore_v1"),
        (f"{HUB}/merges.txt", f"on the Hugging Face Hub: laion/{HUB}"),
        (f"{HUB}/config.json", f"on the Hugging Face Hub: laion/{HUB}"),
        ("HPS_v2_compressed.pt", "on the Hugging Face Hub: xswu/HPSv2"),
        ("HPS_v2.1_compressed.pt", "on the Hugging Face Hub: xswu/HPSv2"),
        (f"{OPENAI}/vocab.json", f"on the Hugging Face Hub: openai/{OPENAI}"),
        (aesthetic.V1, "https://github.com/LAION-AI/aesthetic-predictor"),
        (aesthetic.V2, "https://github.com/christophschuhmann/improved-aesthetic-predictor"),
    ):
        assert f"  {tmp_path / name}  ({source})\n" in str(caught.value)


# ------------------------------------------------------------------------------------------- what people call


def test_targets_and_scales():
    assert rewards.default_target("pickscore") == 25 and rewards.default_target("aesthetic_v2") == 10
    assert rewards.default_target("imagereward:1,pickscore:0.1,hpsv2.1:10") == pytest.approx(2 + 2.5 + 4)
    assert rewards.default_target("pickscore:2") == 50 and rewards.default_target("clip:1,hpsv2:-1") is None
    assert rewards.scales("pickscore:2,clip").startswith("pickscore: about 19 to 24")
    assert all(spec.scale for spec in rewards.REWARDS.values())


def test_ties_are_counted_in_the_unit_of_each_reward():
    margins = rewards.tie_margins(["reward", "hpsv2", "clip", "imagereward", "my.red"], "hpsv2:2", 0.1)
    assert list(margins.values()) == pytest.approx([0.006, 0.003, 0.003, 0.1, 0.1])
    assert rewards.tie_margins(["reward"], "imagereward:0.5,hpsv2", 0.1) == {"reward": 0.1}
    assert rewards.tie_margins(["reward"], "imagereward", 0.01) == {"reward": 0.01}


def test_the_suite_is_every_reward_whose_files_are_there(clips, tmp_path):
    everything = "hpsv2,pickscore,hpsv2.1,clip,aesthetic_v1,aesthetic_v2"
    assert rewards.suite("imagereward", "hpsv2", clips) == everything
    assert rewards.suite("pickscore:2,clip", None, clips) == "hpsv2,hpsv2.1,aesthetic_v1,aesthetic_v2"
    folder = copy(clips, tmp_path)
    (folder / pickscore.TOKENIZER / "merges.txt").unlink()
    (folder / aesthetic.V1).unlink()
    assert rewards.suite("imagereward", None, folder) == "clip,aesthetic_v2"
    assert rewards.suite("imagereward", None, tmp_path / "nowhere") is None


def test_evaluation_by_the_suite(clips, tiny, parts, tmp_path, prompts_file, monkeypatch, capsys):
    folder = copy(clips, tmp_path)
    add_lora(parts.unet, 2, 2, 0)
    lora = save_lora(parts.unet, tmp_path, {"reward": "pickscore"})
    other = shutil.copy(lora, tmp_path / "other.safetensors")
    run_in_process(
        evaluate, monkeypatch, *weight_options(tiny), f"--reward_path={folder}", "--reward=pickscore",
        "--suite", f"--prompts={prompts_file}", *"--num_images_per_prompt 2 --num_inference_steps 2".split(),
        "--lora_paths", str(lora), str(other), f"--output_dir={tmp_path / 'evaluation'}",
    )  # fmt: skip
    evaluation = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    measured = {
        "reward",
        "hpsv2",
        "hpsv2.1",
        "clip",
        "aesthetic_v1",
        "aesthetic_v2",
        "diversity",
        "saturated",
    }
    assert set(evaluation["measures"]) == measured
    assert all(case["means"].keys() == measured for case in evaluation["cases"])
    [header] = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("mean, 95 % interval")
    ]
    assert header.split()[4:] == evaluation["measures"]


def test_prompts_are_checked_and_cut_with_a_warning(clips, caplog):
    reward = pickscore.load(clips)
    with pytest.raises(UserError, match="2 images need as many prompts, in a list; got 'ab'"):
        reward(IMAGES, "ab")
    reward.tower.has_warned_of_cut = False
    reward.tower._prompts.clear()
    long = "ab " * 60
    assert torch.equal(*reward.tower.embed_prompts([long + "fox", long + "hill"]))
    assert len(caplog.records) == 1 and "first 77 tokens" in caplog.text


def test_score_command(clips, tmp_path, monkeypatch, capsys):
    for kind in ("smooth", "wide"):
        ALL_IMAGES[kind].save(tmp_path / f"{kind}.png")
    images = [str(tmp_path / "smooth.png"), str(tmp_path / "wide.png")]
    options = ["a fox", *images, "--reward=hpsv2", f"--reward_path={clips}"]
    monkeypatch.setattr(sys, "argv", ["score", *options])
    command.main()
    out, err = capsys.readouterr()
    best = max(hpsv2.load(clips).score("a fox", images))
    assert f"   1  {best:+.3f}" in out and "hpsv2: about 0.24 to 0.30" in err


def test_training_with_a_mixture_and_a_held_out_reward(
    clips, training_options, tmp_path, monkeypatch, capsys
):
    run_in_process(
        refl_lora, monkeypatch, *training_options, f"--reward_path={clips}",
        "--reward=pickscore:0.1,clip:10,aesthetic_v2", "--held_out_reward=hpsv2,aesthetic_v1",
        "--validation_steps=1", "--num_validation_images=2", "--validation_images_per_prompt=2",
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "clip: about 0.15 to 0.35" in out and "--reward_target 16.5" in out
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()

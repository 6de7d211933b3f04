"""The demo world and its oracle, on drawn images."""

import sys
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from transformers import CLIPTokenizer

DEMO = Path(__file__).resolve().parent.parent / "demo"
sys.path.insert(0, str(DEMO))
from refl.reward import imagereward

import judge
import world


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, list[str]]:
    """3,000 images over the whole range of places and sizes, and a caption of each."""
    rng = np.random.default_rng(0)
    specs = world.random_specs(rng, 3000)
    images = world.draw(specs, world.random_geometry(rng, len(specs)))
    templates = rng.integers(len(world.TEMPLATES), size=len(specs))
    numbers = world.spec_number(specs)
    return images, [world.SPECS[n].caption(t) for n, t in zip(numbers, templates, strict=True)]


def test_held_out_prompts_are_of_other_specs():
    train, held_out = list(world.prompts(held_out=False)), list(world.prompts(held_out=True))
    assert len(set(train)) == 576 and len(set(held_out)) == 192
    train_specs, held_out_specs = {world.parse(p) for p in train}, {world.parse(p) for p in held_out}
    assert len(train_specs) == 72 and len(held_out_specs) == 24
    assert not train_specs & held_out_specs
    for pick in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2)):  # every word and pair of words is trained on
        words = {tuple(astuple(spec)[i] for i in pick) for spec in world.SPECS}
        assert {tuple(astuple(spec)[i] for i in pick) for spec in train_specs} == words
    assert {spec.colour for spec in held_out_specs} == set(world.COLOURS)


def test_shipped_prompts_are_those_of_the_world():
    for name, held_out in (("train", False), ("held_out", True)):
        lines = (DEMO / f"prompts/{name}.txt").read_text().splitlines()
        assert sorted(lines) == sorted(world.prompts(held_out))


def test_caption_and_parse_are_inverse():
    for number, spec in enumerate(world.SPECS):
        assert world.spec_number(np.array(spec.indices)) == number
        assert all(world.parse(spec.caption(template)) == spec for template in range(len(world.TEMPLATES)))
    for prompt in ("a red circle", "a red green circle on white", "a dog"):
        with pytest.raises(ValueError, match="not a caption"):
            world.parse(prompt)


def test_changed_differs_in_one_attribute():
    spec = world.Spec("red", "cross", "gray")
    for attribute, values in world.ATTRIBUTES.items():
        others = spec.changed(attribute)
        assert {getattr(other, attribute) for other in others} == set(values) - {getattr(spec, attribute)}
        assert all(sum(a != b for a, b in zip(astuple(spec), astuple(o), strict=True)) == 1 for o in others)


def test_drawing_is_of_the_size_and_colours_it_should_be():
    spec = world.Spec("blue", "square", "white")
    image = world.draw(np.array([spec.indices]), np.array([[32.0, 32.0, 20.0]], np.float32))[0]
    assert image.shape == (world.SIZE, world.SIZE, 3) and image.dtype == np.uint8
    assert (image[32, 32] == world.COLOURS["blue"]).all() and (image[0, 0] == 255).all()
    blue = (image == world.COLOURS["blue"]).all(-1)
    assert np.ptp(np.nonzero(blue)[0]) + 1 == 34  # 2 x 0.85 x radius


def test_oracle_reads_drawings(drawn):
    images, prompts = drawn
    right = judge.grade(images, prompts)
    assert set(right) == {"colour", "shape", "background", "all_right"}
    assert all(values.shape == (3000,) and values.dtype == bool for values in right.values())
    assert all(values.mean() >= 0.995 for values in right.values())


@pytest.mark.parametrize("side", [32, 48, 128, 512])
def test_oracle_reads_resized_images(drawn, side):
    images, prompts = (part[:300] for part in drawn)
    resized = [Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC) for image in images]
    assert judge.grade(resized, prompts)["all_right"].mean() >= 0.995


def test_oracle_reads_blurred_and_noisy_images(drawn):
    images, prompts = (part[:300] for part in drawn)
    blurred = [Image.fromarray(image).filter(ImageFilter.GaussianBlur(1)) for image in images]
    assert judge.grade(blurred, prompts)["all_right"].mean() >= 0.995
    noise = np.random.default_rng(0).normal(0, 15, images.shape)
    noisy = (images + noise).clip(0, 255).astype(np.uint8)
    assert judge.grade(noisy, prompts)["all_right"].mean() >= 0.995


@pytest.mark.parametrize("attribute", world.ATTRIBUTES)
def test_oracle_marks_a_wrong_word_and_only_that(drawn, attribute):
    images, prompts = (part[:300] for part in drawn)
    wrong = [world.parse(prompt).changed(attribute)[0].caption(0) for prompt in prompts]
    right = judge.grade(images, wrong)
    for name, values in right.items():
        assert values.mean() == (0 if name in (attribute, "all_right") else 1)


def test_oracle_does_not_read_what_is_mixed(drawn):
    images, _ = drawn
    gray = np.full((64, 64, 3), 128, np.uint8)
    assert judge.judge(gray) == judge.Verdict(shape=None, colour=None, background="gray")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert judge.judge(noise) == judge.Verdict(shape=None, colour=None, background=None)

    red_circle, blue_circle, red_cross = (
        world.draw(np.array([spec.indices]), np.array([[32, 32, 18]], np.float32))[0]
        for spec in (
            world.Spec("red", "circle", "white"),
            world.Spec("blue", "circle", "white"),
            world.Spec("red", "cross", "white"),
        )
    )
    assert judge.judge(red_circle) == judge.Verdict("circle", "red", "white")
    two_colours = np.where(np.arange(64)[None, :, None] < 32, red_circle, blue_circle)
    assert judge.judge(two_colours).colour is None
    two_backgrounds = np.where(np.arange(64)[None, :, None] < 32, red_circle, red_circle // 2)
    assert judge.judge(two_backgrounds).background is None
    half_cross = np.where(np.arange(64)[None, :, None] < 32, red_circle, red_cross)
    assert judge.judge(half_cross).shape is None
    small = np.full((64, 64, 3), 255, np.uint8)
    small[24:40, 24:40] = np.asarray(Image.fromarray(red_circle[14:50, 14:50]).resize((16, 16)))
    assert judge.judge(small).shape is None


def test_shipped_checkpoint_is_small_and_knows_every_word():
    files = [path for path in (DEMO / "checkpoint").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10 * 2**20
    tokenizer = CLIPTokenizer.from_pretrained(DEMO / "checkpoint/stable-diffusion-v1-4/tokenizer")
    for caption in world.every_caption():
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 2 <= tokenizer.model_max_length
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == caption
    bert = imagereward.load_tokenizer(DEMO / "checkpoint/bert-base-uncased")
    assert all(bert.unk_token_id not in bert(caption).input_ids for caption in world.every_caption())


@pytest.mark.parametrize(("attribute", "least"), [("colour", 0.9), ("shape", 0.85), ("background", 0.9)])
def test_shipped_reward_prefers_the_right_word(drawn, attribute, least):
    images, prompts = (part[:100] for part in drawn)
    reward = imagereward.load(DEMO / "checkpoint")
    images = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    wrong = [world.parse(prompt).changed(attribute) for prompt in prompts]  # every other word
    with torch.no_grad():
        right = reward(images, prompts)
        ahead = [
            right > reward(images, [spec.caption(0) for spec in specs]) for specs in zip(*wrong, strict=True)
        ]
    assert torch.stack(ahead).float().mean() >= least

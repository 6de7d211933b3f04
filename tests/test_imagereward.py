"""ImageReward from files in the published format; the comparison with the published package is a command of
its own."""

import json
import shutil

from refl import imagereward
from refl.errors import UserError

import pytest
import torch
from safetensors.torch import save_file

PROMPTS = ["a red cat", "three green apples"]
IMAGES = torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(0))


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
    assert imagereward.published_state_dict(reward).keys() == weights.keys()
    assert all(
        torch.equal(weights[key], value) for key, value in imagereward.published_state_dict(reward).items()
    )


def test_unused_published_keys_are_left_out(copy, reward):
    def add(weights):
        weights["blip.vision_proj.weight"] = torch.zeros(1)
        weights["blip.text_proj.bias"] = torch.zeros(1)
        weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]

    assert torch.equal(reload(copy, add)(IMAGES, PROMPTS), reward(IMAGES, PROMPTS))


def test_settings_that_shapes_do_not_tell(reward):
    # Each of these, wrong, gives plausible scores that are not the published ones.
    assert reward.vision.config.layer_norm_eps == 1e-6
    assert reward.text.config.layer_norm_eps == 1e-12
    assert reward.text.config.num_attention_heads == 3  # from med_config, not from a guess by width
    assert reward.vision.config.num_attention_heads == 4
    assert (reward.score_mean, reward.score_std) == (0.16717362830052426, 1.0333394966054072)
    assert not reward.training and not any(p.requires_grad for p in reward.parameters())


def test_med_config_sets_what_it_names(copy, reward):
    config = json.loads((copy / "med_config.json").read_text())
    (copy / "med_config.json").write_text(json.dumps(config | {"score_mean": 0.0, "score_std": 2.0}))
    raw = reward(IMAGES, PROMPTS) * reward.score_std + reward.score_mean
    torch.testing.assert_close(imagereward.load(copy)(IMAGES, PROMPTS), raw / 2)
    (copy / "med_config.json").write_text(json.dumps(config | {"vision_num_attention_heads": 2}))
    assert not torch.allclose(imagereward.load(copy)(IMAGES, PROMPTS), reward(IMAGES, PROMPTS), atol=1e-6)


def test_attention_is_bidirectional_and_masked(reward):
    # With [CLS] first, a causal text tower could not see the words at all.
    scores = [reward(IMAGES[:1], [prompt]).item() for prompt in ("a red cat", "a blue dog")]
    assert scores[0] != scores[1]
    calls = []
    reward.text.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
    reward(IMAGES, PROMPTS)
    assert calls[0]["attention_mask"].sum(1).tolist() != [35, 35] and not calls[0].get("is_decoder")


def test_prompts_are_cut_at_35_tokens(reward):
    long = "a " * 33
    assert torch.equal(reward(IMAGES[:1], [long + "cat dog"]), reward(IMAGES[:1], [long + "hill"]))
    assert not torch.equal(reward(IMAGES[:1], [long[2:] + "cat"]), reward(IMAGES[:1], [long[2:] + "dog"]))


def test_scores_do_not_depend_on_the_batch(reward):
    together = reward(IMAGES, PROMPTS)
    alone = torch.cat([reward(IMAGES[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_gradient_reaches_the_whole_picture(reward):
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    reward(images, PROMPTS[:1]).sum().backward()
    assert images.grad.isfinite().all() and (images.grad != 0).float().mean() > 0.95


def test_preprocessing_is_antialiased_and_centred():
    stripes = torch.arange(512).remainder(2).float().expand(1, 3, 512, 512)  # finer than 224 pixels can carry
    assert imagereward.preprocess(stripes, 224).std(dim=(-1, -2)).max() < 0.1
    wide = torch.zeros(1, 3, 50, 150)
    wide[..., 50:100] = 1
    assert imagereward.preprocess(wide, 50).std() < 0.2  # only the white middle is left
    mean = torch.tensor(imagereward.PIXEL_MEAN).view(3, 1, 1).expand(1, 3, 32, 32)
    assert imagereward.preprocess(mean, 32).abs().max() < 1e-6
    assert imagereward.preprocess(torch.zeros(2, 3, 33, 47).half(), 32).dtype == torch.float32


def test_half_precision_keeps_head_and_score_in_float32(tiny, reward):
    half = imagereward.load(tiny, dtype=torch.bfloat16)
    assert half.vision.dtype == half.text.dtype == torch.bfloat16
    assert half.head[0].weight.dtype == half(IMAGES, PROMPTS).dtype == torch.float32
    torch.testing.assert_close(half(IMAGES, PROMPTS), reward(IMAGES, PROMPTS), rtol=0, atol=0.03)


def test_wrong_files_are_refused_by_name(copy):
    content = (copy / "ImageReward.pt").read_bytes()
    with pytest.raises(UserError, match="mlp.layers.7.weight|head.7.weight|not those of"):
        reload(copy, lambda weights: weights.pop("mlp.layers.7.weight"))
    (copy / "ImageReward.pt").write_bytes(content)
    with pytest.raises(UserError, match="unexpected.*extra"):
        reload(copy, lambda weights: weights.update(extra=torch.zeros(2)))
    (copy / "ImageReward.pt").write_bytes(content)
    with pytest.raises(UserError, match="missing.*query.weight"):
        reload(
            copy, lambda weights: weights.pop("blip.text_encoder.encoder.layer.0.attention.self.query.weight")
        )
    for spoilt in (content[: len(content) // 2], b"", b"not weights", b"PK\x03\x04"):
        (copy / "ImageReward.pt").write_bytes(spoilt)
        with pytest.raises(UserError, match="ImageReward.pt"):
            imagereward.load(copy)
    save_file({"a": torch.zeros(1)}, copy / "ImageReward.pt")
    with pytest.raises(UserError, match="ImageReward.pt"):
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

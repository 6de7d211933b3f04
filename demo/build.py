"""Builds `demo/checkpoint/`: a tiny Stable Diffusion and a tiny ImageReward, trained on drawn shapes.

Trainings follow one another, then the files are written and measured. Every batch is a function of the seed
and the step, and a training saves itself now and then: the same command continues where it was stopped.
"""

import argparse
import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    BlipTextConfig,
    BlipVisionConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from refl.model.pipeline import (
    generate,
    load_pipeline,
)
from refl.model.stable_diffusion import decode
from refl.report.sheets import grid
from refl.reward import imagereward
from refl.system.images import save_image

import judge
import world

POOL = 24_000  # drawn images that the autoencoder and the base model learn from
WORDS = sorted({word for caption in world.every_caption() for word in caption.split()})
SCHEDULER = {  # Stable Diffusion 1.4's
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
EMA_DECAY = 0.998
SAVE_SECONDS = 60


# --------------------------------------------------------------------------------------------------- training


class Builder:
    """What the trainings share: seed, device, drawings, and one way to train, save and continue."""

    def __init__(self, work_dir: Path, seed: int, stages: Sequence[str]):
        self.work_dir, self.seed, self.stages = work_dir, seed, stages
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        work_dir.mkdir(parents=True, exist_ok=True)

    def rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *key))

    def train(
        self,
        stage: str,
        model: nn.Module,
        loss: Callable[[np.random.Generator], tuple[Tensor, dict[str, Tensor]]],
        steps: int,
        learning_rate: float,
    ) -> None:
        """Trains what requires a gradient in `model`, which afterwards holds the weights' running average.

        `loss` draws its batch from the generator it is given, another one each step; what it returns beside
        the loss is shown. A stage that is not among `stages` is only loaded, as far as it came.
        """
        path = self.work_dir / f"{stage}.pt"
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        average = [parameter.detach().clone() for parameter in parameters]
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
        step, seconds = 0, 0.0
        if path.exists():
            state = torch.load(path, map_location=self.device, weights_only=True)
            step, seconds = state["step"], state["seconds"]
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            for target, saved in zip(average, state["average"], strict=True):
                target.copy_(saved)
        stage_number = sum(map(ord, stage))  # keeps the stages' batches apart
        model.train()
        saved_at = time.monotonic()
        with tqdm(total=steps, initial=step, desc=stage, mininterval=5) as bar:
            while step < steps and stage in self.stages:
                started = time.monotonic()
                torch.manual_seed(self.seed * 1_000_003 + step)  # the noise; the batch has its own generator
                warmup, decay = min(1, (step + 1) / 50), 0.5 + 0.5 * math.cos(math.pi * step / steps)
                optimizer.param_groups[0]["lr"] = learning_rate * warmup * decay
                value, shown = loss(self.rng(stage_number, step))
                optimizer.zero_grad()
                value.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                step += 1
                with torch.no_grad():
                    torch._foreach_lerp_(average, parameters, 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
                bar.update()
                if step % 20 == 0:
                    bar.set_postfix({name: f"{number.item():.3f}" for name, number in shown.items()})
                seconds += time.monotonic() - started
                if step == steps or time.monotonic() - saved_at > SAVE_SECONDS:
                    state = {
                        "step": step,
                        "seconds": seconds,
                        "model": model.state_dict(),
                        "average": average,
                        "optimizer": optimizer.state_dict(),
                    }
                    torch.save(state, path.with_suffix(".tmp"))
                    os.replace(path.with_suffix(".tmp"), path)
                    saved_at = time.monotonic()
        with torch.no_grad():
            for parameter, value in zip(parameters, average, strict=True):
                parameter.copy_(value)
        model.eval()

    @cached_property
    def drawn_pool(self) -> tuple[np.ndarray, np.ndarray]:
        """Specs, (POOL, 3), and their images, (POOL, 64, 64, 3) uint8."""
        rng = self.rng(0)
        specs = world.random_specs(rng, POOL)
        geometry = world.random_geometry(rng, POOL)
        chunks = range(0, POOL, 1000)
        return specs, np.concatenate(
            [world.draw(specs[i : i + 1000], geometry[i : i + 1000]) for i in chunks]
        )

    def shares(self, pool: "BlendPool", chosen: np.ndarray) -> Tensor:
        """(N, 2, 1, 1, 1): how much of the right image is in each of the two of `chosen` rows."""
        return torch.from_numpy(pool.weight[chosen]).to(self.device)[:, :, None, None, None]

    def to_tensor(self, images: np.ndarray) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, 3, H, W) in [0, 1]."""
        return torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 255


# ------------------------------------------------------------------------------------------------ autoencoder


def new_vae() -> AutoencoderKL:
    """Stable Diffusion's autoencoder, narrow. Four channels a group: with one, colour is normalised away."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=world.SIZE,
    )


def reconstruction_loss(decoded: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """L1 + MSE of images in [-1, 1], and L1 alone."""
    l1 = F.l1_loss(decoded, images)
    return l1 + F.mse_loss(decoded, images), l1.detach()


def train_vae(builder: Builder, vae: AutoencoderKL) -> None:
    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        images = builder.to_tensor(builder.drawn_pool[1][rng.integers(POOL, size=16)]) * 2 - 1
        posterior = vae.encode(images).latent_dist
        value, l1 = reconstruction_loss(vae.decode(posterior.sample()).sample, images)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return value + 1e-4 * kl, {"l1": l1, "kl": kl.detach()}

    builder.train("vae", vae, loss, steps=1500, learning_rate=2e-3)
    set_scaling_factor(builder, vae)


def train_decoder(builder: Builder, vae: AutoencoderKL) -> None:
    """Sharpens the decoder alone, on inexact latents, as a UNet's will be; exact ones stay as they are."""
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        images = builder.to_tensor(builder.drawn_pool[1][rng.integers(POOL, size=16)]) * 2 - 1
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mean
        latents = latents + 0.05 * latents.std() * torch.randn_like(latents)
        value, l1 = reconstruction_loss(vae.decode(latents).sample, images)
        return value, {"l1": l1}

    builder.train("decoder", vae, loss, steps=1500, learning_rate=2e-3)


@torch.no_grad()
def set_scaling_factor(builder: Builder, vae: AutoencoderKL) -> None:
    """Makes the UNet's latents of about unit variance, as Stable Diffusion does."""
    rng = builder.rng(3)
    drawn = world.draw(world.random_specs(rng, 512), world.random_geometry(rng, 512))
    vae.register_to_config(scaling_factor=1.0)
    vae.register_to_config(scaling_factor=1 / encode(vae, builder.to_tensor(drawn)).std().item())


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Latents (N, 4, 8, 8), at the UNet's scale, of images (N, 3, 64, 64) in [0, 1]."""
    latents = [vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(64)]
    return torch.cat(latents) * vae.config.scaling_factor


# ------------------------------------------------------------------------------------------------- base model

CLIP_TOKENS = 20
NO_CAPTION = 0.08  # how often it is told nothing, for guidance


def write_clip_tokenizer(folder: Path) -> None:
    """CLIP's byte-level BPE, with just the merges that make each word of this world one token."""
    folder.mkdir(parents=True, exist_ok=True)
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        for left, right in merges:  # in order of rank, as BPE does
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == (left, right):
                    symbols[i : i + 2] = [left + right]
                i += 1
        while len(symbols) > 1:  # what earlier words' merges left apart
            merges.append((symbols[0], symbols[1]))
            symbols[:2] = ["".join(symbols[:2])]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    settings = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def new_tokenizer(builder: Builder) -> CLIPTokenizer:
    write_clip_tokenizer(builder.work_dir / "tokenizer")
    return CLIPTokenizer.from_pretrained(builder.work_dir / "tokenizer")


def new_base(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """Stable Diffusion's UNet and text encoder, narrow; both are trained."""
    unet = UNet2DConditionModel(
        sample_size=world.SIZE // 8,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,  # the number of heads, whatever its name
        norm_num_groups=8,
    )
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return nn.ModuleDict({"unet": unet, "text_encoder": CLIPTextModel(text_config)})


def train_base(
    builder: Builder,
    base: nn.ModuleDict,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    stage: str,
    wrong_words: dict[str, float],
    steps: int,
    learning_rate: float,
) -> None:
    """Denoising, on captions that are partly wrong: a base model with something left to teach it.

    `wrong_words` says how often each attribute's word is replaced by another one.
    """

    @cache
    def latents() -> Tensor:
        parts = np.array_split(builder.drawn_pool[1], 50)
        return torch.cat([encode(vae, builder.to_tensor(part)) for part in parts])  # (POOL, 4, 8, 8)

    captions = [*world.every_caption(), ""]
    ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids.to(builder.device)
    alphas_cumprod = DDPMScheduler.from_config(SCHEDULER).alphas_cumprod.to(builder.device)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    sizes = np.array([len(values) for values in world.ATTRIBUTES.values()])

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = rng.integers(POOL, size=32)
        wrong = rng.random((len(chosen), 3)) < list(wrong_words.values())
        step = wrong * (1 + rng.integers(sizes - 1, size=wrong.shape))  # to any other value
        told = (builder.drawn_pool[0][chosen] + step) % sizes
        template = rng.integers(len(world.TEMPLATES), size=len(told))
        caption = world.spec_number(told) * len(world.TEMPLATES) + template
        caption[rng.random(len(told)) < NO_CAPTION] = len(captions) - 1
        clean = latents()[torch.from_numpy(chosen).to(builder.device)]
        noise = torch.randn_like(clean)
        timestep = torch.from_numpy(rng.integers(len(alphas_cumprod), size=len(told))).to(builder.device)
        abar = alphas_cumprod[timestep].view(-1, 1, 1, 1)
        context = base["text_encoder"](ids[torch.from_numpy(caption).to(builder.device)]).last_hidden_state
        guess = base["unet"](abar.sqrt() * clean + (1 - abar).sqrt() * noise, timestep, context).sample
        error = (guess - noise).square().mean((1, 2, 3))
        value = (error * (snr[timestep].clamp(max=5) / snr[timestep])).mean()  # min-SNR (Hang et al. 2023)
        return value, {"loss": value.detach(), "mse": error.mean().detach()}

    builder.train(stage, base, loss, steps, learning_rate)


# ----------------------------------------------------------------------------------------------------- reward


BERT_VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)


def write_bert_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(BERT_VOCABULARY) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def new_reward(builder: Builder) -> imagereward.ImageReward:
    """ImageReward at a small size."""
    folder = builder.work_dir / "bert-base-uncased"
    write_bert_tokenizer(folder)
    vision_config = BlipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=world.SIZE,
        patch_size=8,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        initializer_range=0.02,  # the default, 1e-10, is as good as zero
    )
    text_config = BlipTextConfig(
        vocab_size=len(BERT_VOCABULARY) + 2,  # and [DEC] and [ENC]
        hidden_size=64,
        encoder_hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        bos_token_id=None,
        sep_token_id=None,
        is_decoder=True,
    )
    tokenizer = imagereward.load_tokenizer(folder)
    return imagereward.ImageReward(
        vision_config, text_config, tokenizer, head_widths=(64, 32, 16, 8, 1), score_mean=0.0, score_std=1.0
    )


class BlendPool:
    """Pairs of images on the way from one spec to another that differs in one attribute, at the same place.

    `right` and `wrong` are (N, 3) specs, `attribute` (N,) the one that differs, `weight` (N, 2) the share of
    the right one in each of the two images, 1 in a third of them.
    """

    def __init__(self, rng: np.random.Generator, count: int):
        self.right = world.random_specs(rng, count)
        self.geometry = world.random_geometry(rng, count)
        self.attribute = rng.integers(3, size=count)
        sizes = np.array([len(values) for values in world.ATTRIBUTES.values()])
        rows = np.arange(count)
        self.wrong = self.right.copy()
        self.wrong[rows, self.attribute] += 1 + rng.integers(sizes[self.attribute] - 1)
        self.wrong %= sizes
        self.weight = np.where(rng.random((count, 2)) < 1 / 3, 1.0, rng.random((count, 2))).astype(np.float32)

    def draw(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The unblended images of `chosen` rows, right and wrong, each (N, 64, 64, 3) uint8."""
        geometry = self.geometry[chosen]
        return world.draw(self.right[chosen], geometry), world.draw(self.wrong[chosen], geometry)


class RewardTrainer(nn.Module):
    """The reward, and a throwaway head that predicts masked words: ranking alone stays at chance for long."""

    def __init__(self, reward: imagereward.ImageReward):
        super().__init__()
        self.reward = reward
        self.words = nn.Linear(reward.text.config.hidden_size, reward.text.config.vocab_size)
        tokens = reward.tokenizer(world.every_caption(), padding=True, return_tensors="pt")
        shape = (len(world.SPECS), len(world.TEMPLATES), -1)
        self.register_buffer("ids", tokens.input_ids.view(shape), persistent=False)
        self.register_buffer("mask", tokens.attention_mask.view(shape), persistent=False)
        word_ids = [reward.tokenizer.convert_tokens_to_ids(list(v)) for v in world.ATTRIBUTES.values()]
        width = max(map(len, word_ids))
        padded = [ids + [0] * (width - len(ids)) for ids in word_ids]
        self.register_buffer("word_ids", torch.tensor(padded), persistent=False)  # (3, 6)

    def loss(
        self,
        images: Tensor,
        right: Tensor,
        wrong: Tensor,
        attribute: Tensor,
        weight: Tensor,
        template: Tensor,
    ):
        """What is minimised, and what is shown of it.

        images (N, 2, 3, H, W) in [0, 1]; right (N, 3) and wrong (N, 3, 3) specs, the latter changed in one
        attribute each; attribute (N,) the one blended, weight (N, 2) by how much; template (N,) the phrasing.
        """
        count = len(right)
        pixels = imagereward.preprocess(images.flatten(0, 1), self.reward.image_size)
        seen = self.reward.vision(pixels).last_hidden_state.view(count, 2, 1, -1, 64)
        captions = torch.cat([right[:, None], wrong], dim=1)  # (N, 4, 3)
        number = (captions[..., 0] * len(world.SHAPES) + captions[..., 1]) * len(
            world.BACKGROUNDS
        ) + captions[..., 2]
        ids, mask = self.ids[number, template[:, None]], self.mask[number, template[:, None]]  # (N, 4, T)
        hidden = self._read(ids[:, None].expand(-1, 2, -1, -1), mask[:, None].expand(-1, 2, -1, -1), seen)
        scores = self.reward.head(hidden[..., 0, :]).squeeze(-1)  # (N, 2, 4)

        share = torch.ones(count, 2, 3, device=weight.device)
        share[torch.arange(count), :, attribute] = weight
        rank = F.binary_cross_entropy_with_logits(scores[..., :1] - scores[..., 1:], share * 0.96 + 0.02)
        # The same caption, two images: the one that shows more of it is better.
        contrast = F.binary_cross_entropy_with_logits(
            2 * (scores[:, 0, 0] - scores[:, 1, 0]), 0.5 + 0.48 * (weight[:, 0] - weight[:, 1])
        )

        targets = self.word_ids[torch.arange(3), right]  # (N, 3)
        hide = (ids[:, :1, :, None] == targets[:, None, None]).any(-1)  # (N, 1, T)
        hidden = self._read(
            ids[:, None, :1]
            .masked_fill(hide[:, None], self.reward.tokenizer.mask_token_id)
            .expand(-1, 2, -1, -1),
            mask[:, None, :1].expand(-1, 2, -1, -1),
            seen,
        )  # (N, 2, 1, T, width)
        guess = F.log_softmax(self.words(hidden[:, :, 0]), dim=-1)  # (N, 2, T, vocabulary)
        changed = torch.diagonal(wrong, dim1=1, dim2=2)  # (N, 3), the wrong value of each attribute
        place = (ids[:, 0, None] == targets[..., None]).int().argmax(-1)  # (N, 3), where the words stand
        at = guess[torch.arange(count)[:, None], :, place]  # (N, 3, 2, vocabulary)
        right_word = at.gather(-1, targets[:, :, None, None].expand(-1, -1, 2, 1)).squeeze(-1)  # (N, 3, 2)
        other = self.word_ids[torch.arange(3), changed]
        wrong_word = at.gather(-1, other[:, :, None, None].expand(-1, -1, 2, 1)).squeeze(-1)
        share = share.transpose(1, 2)
        word = -(share * right_word + (1 - share) * wrong_word).mean()
        clear = (weight == 1)[:, :, None].expand(-1, -1, 3)
        correct = ((scores[..., :1] > scores[..., 1:]) & clear).sum((0, 1)) / clear.sum((0, 1))
        shown = {"rank": rank, "contrast": contrast, "word": word}
        shown |= dict(zip(world.ATTRIBUTES, correct, strict=True))
        return rank + 0.5 * contrast + word, {name: value.detach() for name, value in shown.items()}

    def _read(self, ids: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        """Hidden states (N, 2, C, T, width): captions (N, 2, C, T) read with images (N, 2, 1, P, width)."""
        shape = ids.shape
        hidden = self.reward.text(
            input_ids=ids.reshape(-1, shape[-1]),
            attention_mask=mask.reshape(-1, shape[-1]),
            encoder_hidden_states=seen.expand(-1, -1, shape[2], -1, -1).flatten(0, 2),
        ).last_hidden_state
        return hidden.view(*shape, -1)


def batch(builder: Builder, pool: BlendPool, chosen: np.ndarray, rng: np.random.Generator) -> list[Tensor]:
    """What `RewardTrainer.loss` wants beside the images of `chosen` rows."""
    sizes = np.array([len(values) for values in world.ATTRIBUTES.values()])
    right = pool.right[chosen]
    wrong = np.repeat(right[:, None], 3, axis=1)  # (N, 3, 3): one attribute changed each
    wrong[:, range(3), range(3)] = (right + 1 + rng.integers(sizes - 1, size=right.shape)) % sizes
    attribute = pool.attribute[chosen]
    wrong[np.arange(len(chosen)), attribute] = pool.wrong[chosen]
    template = rng.integers(len(world.TEMPLATES), size=len(chosen))
    arrays = (right, wrong, attribute, pool.weight[chosen], template)
    return [torch.from_numpy(array).to(builder.device) for array in arrays]


def train_reward(
    builder: Builder,
    stage: str,
    trainer: RewardTrainer,
    images_of: Callable[[np.ndarray], Tensor],
    pool: BlendPool,
    steps: int,
    learning_rate: float,
) -> None:
    """`images_of(chosen)` gives the blended pairs of rows of the pool, (N, 2, 3, H, W) in [0, 1]."""

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = rng.integers(len(pool.right), size=32)
        return trainer.loss(images_of(chosen), *batch(builder, pool, chosen, rng))

    builder.train(stage, trainer, loss, steps, learning_rate)


def train_reward_drawn(builder: Builder, trainer: RewardTrainer) -> None:
    pool = BlendPool(builder.rng(1), 12_000)

    def images_of(chosen: np.ndarray) -> Tensor:
        right, wrong = (builder.to_tensor(drawn)[:, None] for drawn in pool.draw(chosen))
        return wrong + builder.shares(pool, chosen) * (right - wrong)

    train_reward(builder, "reward_drawn", trainer, images_of, pool, steps=2500, learning_rate=1e-3)


def train_reward_decoded(builder: Builder, trainer: RewardTrainer, vae: AutoencoderKL) -> None:
    """Goes on with what the autoencoder makes of the drawings, blended as latents: what ReFL will show it."""
    pool = BlendPool(builder.rng(2), 6_000)

    @cache
    def decoded() -> Tensor:
        images = torch.empty(len(pool.right), 2, 3, world.SIZE, world.SIZE, dtype=torch.uint8)
        for start in tqdm(range(0, len(images), 32), desc="blends", mininterval=5):
            chosen = np.arange(start, min(start + 32, len(images)))
            right, wrong = (encode(vae, builder.to_tensor(drawn))[:, None] for drawn in pool.draw(chosen))
            latents = wrong + builder.shares(pool, chosen) * (right - wrong)  # (N, 2, 4, 8, 8)
            pixels = decode(vae, latents.flatten(0, 1)) * 255
            images[chosen] = pixels.round().clamp(0, 255).byte().unflatten(0, (-1, 2)).cpu()
        return images

    def images_of(chosen: np.ndarray) -> Tensor:
        return decoded()[chosen].to(builder.device) / 255

    train_reward(builder, "reward", trainer, images_of, pool, steps=1500, learning_rate=5e-4)


def train_reward_robust(builder: Builder, trainer: RewardTrainer, vae: AutoencoderKL) -> None:
    """Teaches that broken images are bad ones: without it, ReFL soon finds nonsense that scores well."""
    pool = BlendPool(builder.rng(8), 6_000)

    def broken(latents: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Latents (N, 4, 8, 8), half of them patched, all with blotches; and how bad they are, (N,)."""
        coarse = torch.randn(len(latents), 1, 3, 3, device=latents.device)
        patch = F.interpolate(coarse, latents.shape[-2:], mode="bilinear") > 0
        patch[::2] = False
        badness = 0.3 + 1.7 * torch.rand(len(latents), device=latents.device)
        grain = int(rng.choice([1, 2, 3, 4, 8]))
        blotches = torch.randn(*latents.shape[:2], grain, grain, device=latents.device)
        blotches = F.interpolate(blotches, latents.shape[-2:], mode="bicubic") * badness.view(-1, 1, 1, 1)
        return torch.where(patch, latents.roll(1, 0), latents) + blotches, badness

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = rng.integers(len(pool.right), size=24)
        with torch.no_grad():
            right, wrong = (encode(vae, builder.to_tensor(drawn))[:, None] for drawn in pool.draw(chosen))
            latents = wrong + builder.shares(pool, chosen) * (right - wrong)  # (N, 2, 4, 8, 8)
            bad, badness = broken(right[:, 0], rng)
            images = decode(vae, torch.cat([latents, bad[:, None]], 1).flatten(0, 1)).clamp(0, 1)
        images = images.unflatten(0, (-1, 3))
        value, shown = trainer.loss(images[:, :2], *batch(builder, pool, chosen, rng))
        template = rng.integers(len(world.TEMPLATES))
        captions = [world.SPECS[number].caption(template) for number in world.spec_number(pool.right[chosen])]
        scores = trainer.reward(images[:, [0, 2]].flatten(0, 1), np.repeat(captions, 2).tolist()).view(-1, 2)
        share = torch.from_numpy(pool.weight[chosen, 0]).to(builder.device)
        lead = scores[:, 0] - scores[:, 1]
        robust = F.softplus(2 * badness * (0.5 + share) - lead).mean()
        return value + 0.5 * robust, shown | {"robust": robust.detach(), "lead": lead.mean().detach()}

    builder.train("reward_robust", trainer, loss, steps=300, learning_rate=5e-4)


# -------------------------------------------------------------------------------------- files and measurement

SAMPLING_STEPS = 20
SD_FOLDER = "stable-diffusion-v1-4"


def export(
    builder: Builder,
    out: Path,
    vae: AutoencoderKL,
    base: nn.ModuleDict,
    tokenizer: CLIPTokenizer,
    reward: imagereward.ImageReward,
) -> None:
    """Writes everything as a user's `checkpoint/` has it; UNet and VAE as float16, which halves the files."""
    StableDiffusionPipeline(
        vae=copy.deepcopy(vae).half(),
        text_encoder=base["text_encoder"],
        tokenizer=tokenizer,
        unet=copy.deepcopy(base["unet"]).half(),
        scheduler=PNDMScheduler.from_config(SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(out / SD_FOLDER)
    write_clip_tokenizer(out / SD_FOLDER / "tokenizer")
    write_bert_tokenizer(out / "bert-base-uncased")
    torch.save(
        {key: value.cpu().contiguous() for key, value in imagereward.published_state_dict(reward).items()},
        out / "ImageReward.pt",
    )
    write_prompts(builder, ROOT / "demo/prompts")

    # The published scores are standardised on their data, these on images by the base model.
    prompts = list(world.prompts(held_out=False))
    scores = score(reward, sample(builder, out, prompts, seed=1_000_000), prompts)
    med_config = new_med_config(reward, scores.mean().item(), scores.std().item())
    (out / "med_config.json").write_text(json.dumps(med_config, indent=2) + "\n")


def write_prompts(builder: Builder, folder: Path) -> None:
    """Training prompts, and those held out, shuffled so that any first few are varied."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = builder.rng(4).permutation(list(world.prompts(held_out=True)))
    (folder / "train.txt").write_text("\n".join(world.prompts(held_out=False)) + "\n")
    (folder / "held_out.txt").write_text("\n".join(held_out) + "\n")


def new_med_config(reward: imagereward.ImageReward, score_mean: float, score_std: float) -> dict:
    """The published keys, and those that a tiny model needs besides."""
    text, vision = reward.text.config, reward.vision.config
    return {
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": text.attention_probs_dropout_prob,
        "hidden_act": text.hidden_act,
        "hidden_dropout_prob": text.hidden_dropout_prob,
        "hidden_size": text.hidden_size,
        "initializer_range": text.initializer_range,
        "intermediate_size": text.intermediate_size,
        "layer_norm_eps": text.layer_norm_eps,
        "max_position_embeddings": text.max_position_embeddings,
        "model_type": "bert",
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": text.vocab_size,
        "encoder_width": vision.hidden_size,
        "add_cross_attention": True,
        "vision_num_attention_heads": vision.num_attention_heads,
        "vision_layer_norm_eps": vision.layer_norm_eps,
        "vision_hidden_act": vision.hidden_act,
        "vision_image_size": vision.image_size,
        "vision_patch_size": vision.patch_size,
        "score_mean": score_mean,
        "score_std": score_std,
    }


def sample(builder: Builder, out: Path, prompts: list[str], seed: int, guidance_scale: float = 1.0) -> Tensor:
    """One image for each prompt, (N, 3, 64, 64) in [0, 1], by DDPM; the first one's noise is `seed`'s."""
    pipeline = load_pipeline(out / SD_FOLDER, "ddpm", torch.float32, builder.device)
    images = []
    for start in tqdm(range(0, len(prompts), 64), desc=f"samples, guidance {guidance_scale}", mininterval=5):
        part = prompts[start : start + 64]
        seeds = range(seed + start, seed + start + len(part))
        images.append(generate(pipeline, part, seeds, SAMPLING_STEPS, guidance_scale))
    return torch.cat(images)


@torch.no_grad()
def score(reward: imagereward.ImageReward, images: Tensor, prompts: list[str]) -> Tensor:
    """Rewards, (N,), on the CPU."""
    device = reward.head[0].weight.device
    parts = [
        reward(images[start : start + 256].to(device), prompts[start : start + 256]).cpu()
        for start in range(0, len(prompts), 256)
    ]
    return torch.cat(parts)


def to_arrays(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in about [0, 1] -> (N, H, W, 3) uint8."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def report(builder: Builder, out: Path) -> None:
    """Measures what was written: `demo/build_report.json` and `demo/samples.png`."""
    parts = load_pipeline(out / SD_FOLDER, "ddpm", torch.float32, builder.device)
    reward = imagereward.load(out, builder.device)
    prompts = (ROOT / "demo/prompts/held_out.txt").read_text().splitlines()

    rng = builder.rng(5)
    specs = world.random_specs(rng, 1000)
    drawn = world.draw(specs, world.random_geometry(rng, len(specs)))
    captions = [world.SPECS[number].caption(0) for number in world.spec_number(specs)]
    decoded = reconstruct(builder, parts.vae, drawn)
    results = {"reconstructions": shares(judge.grade(to_arrays(decoded), captions))}

    for name, guidance_scale in (("base", 1.0), ("base_guidance_3", 3.0)):
        images = torch.cat(
            [
                sample(builder, out, prompts, seed=1000 * run, guidance_scale=guidance_scale)
                for run in range(3)
            ]
        )
        arrays = to_arrays(images)
        if name == "base":
            draw_samples(ROOT / "demo/samples.png", drawn, to_arrays(decoded), arrays, prompts)
        results[name] = shares(judge.grade(arrays, prompts * 3))
        results[name]["unreadable"] = np.mean([None in vars(judge.judge(array)).values() for array in arrays])
        scores = score(reward, images, prompts * 3)
        results[name] |= {"reward_mean": scores.mean().item(), "reward_std": scores.std().item()}

    results["reward_pairwise"] = reward_accuracy(builder, parts.vae, reward)
    results["reward_along_blends"] = reward_along_blends(builder, parts.vae, reward)
    states = {
        path.stem: torch.load(path, weights_only=True) for path in sorted(builder.work_dir.glob("*.pt"))
    }
    results["training"] = {
        name: {"steps": state["step"], "minutes": round(state["seconds"] / 60, 1)}
        for name, state in states.items()
    }
    rounded = json.loads(json.dumps(results), parse_float=lambda number: round(float(number), 3))
    text = json.dumps(rounded, indent=2)
    (ROOT / "demo/build_report.json").write_text(text + "\n")
    print(text)


def shares(right: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: values.mean() for name, values in right.items()}


@torch.no_grad()
def reconstruct(builder: Builder, vae: AutoencoderKL, drawn: np.ndarray) -> Tensor:
    """Drawings (N, 64, 64, 3) through the autoencoder and back, (N, 3, 64, 64) in about [0, 1]."""
    return torch.cat([decode(vae, encode(vae, part)) for part in builder.to_tensor(drawn).split(64)])


def reward_accuracy(
    builder: Builder, vae: AutoencoderKL, reward: imagereward.ImageReward
) -> dict[str, dict[str, float]]:
    """How often the right one wins, by the attribute that is wrong; held-out specs, every phrasing.

    "captions": one image, right and wrong caption. "images": one caption, right and wrong image.
    """
    rng = builder.rng(6)
    wins = {side: {attribute: [] for attribute in world.ATTRIBUTES} for side in ("captions", "images")}
    for spec in tqdm([spec for spec in world.SPECS if spec.held_out], desc="reward accuracy", mininterval=5):
        others = [(attribute, other) for attribute in world.ATTRIBUTES for other in spec.changed(attribute)]
        kinds = [spec, *(other for _, other in others)]
        for geometry in world.random_geometry(rng, 2):
            drawn = world.draw(np.array([kind.indices for kind in kinds]), np.tile(geometry, (len(kinds), 1)))
            images = reconstruct(builder, vae, drawn)
            for template in range(len(world.TEMPLATES)):
                captions = [kind.caption(template) for kind in kinds]
                by_caption = score(reward, images[:1].expand(len(kinds), -1, -1, -1), captions)
                by_image = score(reward, images, captions[:1] * len(kinds))
                for side, scores in (("captions", by_caption), ("images", by_image)):
                    for (attribute, _), value in zip(others, scores[1:], strict=True):
                        wins[side][attribute].append((scores[0] > value).item())
    return {side: {name: np.mean(won) for name, won in by.items()} for side, by in wins.items()}


@torch.no_grad()
def reward_along_blends(
    builder: Builder, vae: AutoencoderKL, reward: imagereward.ImageReward
) -> dict[str, list[float]]:
    """Mean reward at 0, 1/4, ... 1 of the way, in latents, from one wrong attribute to the right one."""
    pool = BlendPool(builder.rng(7), 300)
    right, wrong = (encode(vae, builder.to_tensor(drawn)) for drawn in pool.draw(np.arange(300)))
    prompts = [world.SPECS[number].caption(0) for number in world.spec_number(pool.right)]
    means = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        scores = score(reward, decode(vae, wrong + share * (right - wrong)), prompts).numpy()
        means.append([scores[pool.attribute == index].mean().item() for index in range(3)])
    return {
        name: list(column) for name, column in zip(world.ATTRIBUTES, zip(*means, strict=True), strict=True)
    }


def draw_samples(
    path: Path, drawn: np.ndarray, decoded: np.ndarray, samples: np.ndarray, prompts: list[str]
) -> None:
    """Six drawings, their reconstructions, then eighteen images of the base model with their prompts."""
    rows = [drawn[:6], decoded[:6], samples[:6], samples[6:12], samples[12:18]]
    captions = [["drawing"] * 6, ["through the autoencoder"] * 6, prompts[:6], prompts[6:12], prompts[12:18]]
    images = [[Image.fromarray(image) for image in row] for row in rows]
    save_image(grid(images, captions, 3 * world.SIZE), path)


STAGES = (
    "vae",
    "decoder",
    "base",
    "base_words",
    "reward_drawn",
    "reward",
    "reward_robust",
    "export",
    "report",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "demo/checkpoint", help="folder of the finished files"
    )
    parser.add_argument(
        "--work_dir", type=Path, default=ROOT / "demo/build", help="where trainings are saved"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, help="the others are only loaded"
    )
    options = parser.parse_args()
    builder = Builder(options.work_dir, options.seed, options.stages)
    torch.manual_seed(options.seed)
    vae = new_vae().to(builder.device)
    tokenizer = new_tokenizer(builder)
    base = new_base(tokenizer).to(builder.device)
    torch.manual_seed(options.seed)  # so that the reward depends on nothing above
    trainer = RewardTrainer(new_reward(builder)).to(builder.device)

    train_vae(builder, vae)
    train_decoder(builder, vae)
    mostly = {"colour": 0.30, "shape": 0.30, "background": 0.08}
    train_base(builder, base, tokenizer, vae, "base", mostly, steps=5000, learning_rate=2e-3)
    better = {"colour": 0.20, "shape": 0.15, "background": 0.05}  # words begin to count
    train_base(builder, base, tokenizer, vae, "base_words", better, steps=2000, learning_rate=1e-3)
    train_reward_drawn(builder, trainer)
    train_reward_decoded(builder, trainer, vae)
    train_reward_robust(builder, trainer, vae)
    if "export" in options.stages:
        export(builder, options.out, vae, base, tokenizer, trainer.reward)
    if "report" in options.stages:
        report(builder, options.out)


if __name__ == "__main__":
    main()

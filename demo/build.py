"""Build `demo/checkpoint/`: a tiny Stable Diffusion and a tiny ImageReward, trained on drawn shapes.

The trainings run in sequence, then the files are written and measured. Every batch is a pure function of seed
and step, and each training saves its state regularly: the same command resumes.
"""

import argparse
import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
from refl.model.pipeline import generate, load_pipeline
from refl.model.stable_diffusion import decode
from refl.report.sheets import grid
from refl.reward import imagereward
from refl.system.images import save_image

import judge
import world

POOL = 24_000  # drawn images on which the autoencoder and the base model are trained
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


class Training:
    """State of one training: model, running average of its weights, optimizer; saved to `path`."""

    def __init__(self, path: Path, model: nn.Module, learning_rate: float, device: torch.device):
        self.path, self.model, self.learning_rate = path, model, learning_rate
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.01)
        self.step, self.seconds = 0, 0.0
        if path.exists():
            state = torch.load(path, map_location=device, weights_only=True)
            self.step, self.seconds = state["step"], state["seconds"]
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            for target, saved in zip(self.average, state["average"], strict=True):
                target.copy_(saved)

    def update(self, loss: Tensor, steps: int) -> None:
        """Take a step of AdamW, with warm-up and a cosine schedule that ends at `steps`."""
        warmup, decay = min(1, (self.step + 1) / 50), 0.5 + 0.5 * math.cos(math.pi * self.step / steps)
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * warmup * decay
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    def save(self) -> None:
        """Save the state atomically."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)

    @torch.no_grad()
    def finish(self) -> None:
        """Replace the model's weights by their running average."""
        for parameter, value in zip(self.parameters, self.average, strict=True):
            parameter.copy_(value)
        self.model.eval()


class Builder:
    """Seed, device and drawn images of all trainings, and the training loop."""

    def __init__(self, work_dir: Path, seed: int, stages: Sequence[str]):
        self.work_dir, self.seed, self.stages = work_dir, seed, stages
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        work_dir.mkdir(parents=True, exist_ok=True)

    def rng(self, *key: int) -> np.random.Generator:
        """Return a generator that depends only on the seed and `key`."""
        return np.random.default_rng((self.seed, *key))

    def train(
        self,
        stage: str,
        model: nn.Module,
        loss: Callable[[np.random.Generator], tuple[Tensor, dict[str, Tensor]]],
        steps: int,
        learning_rate: float,
    ) -> None:
        """Train the parameters of `model` that require a gradient; leave it with their running average.

        `loss` draws its batch from a generator, a new one for each step, and returns the loss and the values
        that the progress bar shows. A stage outside `stages` is only loaded, at the step that it has reached.
        """
        training = Training(self.work_dir / f"{stage}.pt", model, learning_rate, self.device)
        stage_number = sum(map(ord, stage))  # gives each stage its own batches
        model.train()
        saved_at = time.monotonic()
        with tqdm(total=steps, initial=training.step, desc=stage, mininterval=5) as bar:
            while training.step < steps and stage in self.stages:
                started = time.monotonic()
                torch.manual_seed(self.seed * 1_000_003 + training.step)  # of the noise, not of the batch
                value, shown = loss(self.rng(stage_number, training.step))
                training.update(value, steps)
                bar.update()
                if training.step % 20 == 0:
                    bar.set_postfix({name: f"{number.item():.3f}" for name, number in shown.items()})
                training.seconds += time.monotonic() - started
                if training.step == steps or time.monotonic() - saved_at > SAVE_SECONDS:
                    training.save()
                    saved_at = time.monotonic()
        training.finish()

    @cached_property
    def drawn_pool(self) -> tuple[np.ndarray, np.ndarray]:
        """Specs (POOL, 3) and their images (POOL, 64, 64, 3) uint8."""
        rng = self.rng(0)
        specs = world.random_specs(rng, POOL)
        geometry = world.random_geometry(rng, POOL)
        chunks = range(0, POOL, 1000)
        return specs, np.concatenate(
            [world.draw(specs[i : i + 1000], geometry[i : i + 1000]) for i in chunks]
        )

    def shares(self, pool: "BlendPool", chosen: np.ndarray) -> Tensor:
        """Weight of the right image in each of the two blends of `chosen` rows, (N, 2, 1, 1, 1)."""
        return torch.from_numpy(pool.weight[chosen]).to(self.device)[:, :, None, None, None]

    def to_tensor(self, images: np.ndarray) -> Tensor:
        """Convert (N, H, W, 3) uint8 to (N, 3, H, W) in [0, 1]."""
        return torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 255


# ------------------------------------------------------------------------------------------------ autoencoder


def new_vae() -> AutoencoderKL:
    """Make a narrow autoencoder of Stable Diffusion.

    Groups have several channels: with one per group, the normalisation removes colour.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=world.SIZE,
    )


def reconstruction_loss(decoded: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return L1 + MSE of images in [-1, 1], and L1 alone."""
    l1 = F.l1_loss(decoded, images)
    return l1 + F.mse_loss(decoded, images), l1.detach()


def train_vae(builder: Builder, vae: AutoencoderKL) -> None:
    """Train the autoencoder on drawings."""

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        images = builder.to_tensor(builder.drawn_pool[1][rng.integers(POOL, size=16)]) * 2 - 1
        posterior = vae.encode(images).latent_dist
        value, l1 = reconstruction_loss(vae.decode(posterior.sample()).sample, images)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return value + 1e-4 * kl, {"l1": l1, "kl": kl.detach()}

    builder.train("vae", vae, loss, steps=1500, learning_rate=2e-3)
    set_scaling_factor(builder, vae)


def train_decoder(builder: Builder, vae: AutoencoderKL) -> None:
    """Train only the decoder, for sharper images, on noisy latents such as a UNet predicts."""
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
    """Scale the UNet's latents to about unit variance, as Stable Diffusion does."""
    rng = builder.rng(3)
    drawn = world.draw(world.random_specs(rng, 512), world.random_geometry(rng, 512))
    vae.register_to_config(scaling_factor=1.0)
    vae.register_to_config(scaling_factor=1 / encode(vae, builder.to_tensor(drawn)).std().item())


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode images (N, 3, 64, 64) in [0, 1] to latents (N, 4, 8, 8) at the UNet's scale."""
    latents = [vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(64)]
    return torch.cat(latents) * vae.config.scaling_factor


# ------------------------------------------------------------------------------------------------- base model

CLIP_TOKENS = 20
NO_CAPTION = 0.08  # share of empty captions, for guidance


def write_clip_tokenizer(folder: Path) -> None:
    """Write CLIP's byte-level BPE with the merges that make each word of this world one token."""
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
        while len(symbols) > 1:  # symbols that the merges of earlier words do not join
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
    """Write the CLIP tokenizer to the work folder and load it."""
    write_clip_tokenizer(builder.work_dir / "tokenizer")
    return CLIPTokenizer.from_pretrained(builder.work_dir / "tokenizer")


def new_base(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """Make narrow versions of Stable Diffusion's UNet and text encoder; both are trained."""
    unet = UNet2DConditionModel(
        sample_size=world.SIZE // 8,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,  # the number of heads, despite its name
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
    """Train the base model to denoise, on partly wrong captions, so that ReFL has something to improve.

    `wrong_words` maps each attribute to the share of captions in which another word replaces its own.
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
        captioned = (builder.drawn_pool[0][chosen] + step) % sizes  # specs, as their captions state them
        template = rng.integers(len(world.TEMPLATES), size=len(captioned))
        caption = world.spec_number(captioned) * len(world.TEMPLATES) + template
        caption[rng.random(len(captioned)) < NO_CAPTION] = len(captions) - 1
        clean = latents()[torch.from_numpy(chosen).to(builder.device)]
        noise = torch.randn_like(clean)
        timestep = torch.from_numpy(rng.integers(len(alphas_cumprod), size=len(clean))).to(builder.device)
        abar = alphas_cumprod[timestep].view(-1, 1, 1, 1)
        context = base["text_encoder"](ids[torch.from_numpy(caption).to(builder.device)]).last_hidden_state
        eps = base["unet"](abar.sqrt() * clean + (1 - abar).sqrt() * noise, timestep, context).sample
        error = (eps - noise).square().mean((1, 2, 3))
        value = (error * (snr[timestep].clamp(max=5) / snr[timestep])).mean()  # min-SNR (Hang et al. 2023)
        return value, {"loss": value.detach(), "mse": error.mean().detach()}

    builder.train(stage, base, loss, steps, learning_rate)


# ----------------------------------------------------------------------------------------------------- reward


BERT_VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)


def write_bert_tokenizer(folder: Path) -> None:
    """Write BERT's tokenizer with the words of this world."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(BERT_VOCABULARY) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def new_reward(builder: Builder) -> imagereward.ImageReward:
    """Make a small ImageReward with random weights."""
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
        initializer_range=0.02,  # the default, 1e-10, is practically zero
    )
    text_config = BlipTextConfig(
        vocab_size=len(BERT_VOCABULARY) + 2,  # with [DEC] and [ENC]
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
    """Pairs of blends between two specs that differ in one attribute, at the same place and size.

    `right` and `wrong` are specs (N, 3), `attribute` (N,) is the index in which they differ, and `weight`
    (N, 2) is the weight of the right image in each of the two blends, 1 in a third of them.
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
        """Draw the images of `chosen` rows without blending, right and wrong, each (N, 64, 64, 3) uint8."""
        geometry = self.geometry[chosen]
        return world.draw(self.right[chosen], geometry), world.draw(self.wrong[chosen], geometry)


class RewardTrainer(nn.Module):
    """The reward with a head that predicts masked words; ranking alone stays at chance for long."""

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
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of N pairs of blends, and the values to show.

        images (N, 2, 3, H, W) in [0, 1]; right (N, 3) and wrong (N, 3, 3) specs, each wrong one with another
        attribute changed; attribute (N,) the one that is blended, weight (N, 2) of the right image; template
        (N,) the phrasing.
        """
        count = len(right)
        pixels = imagereward.preprocess(images.flatten(0, 1), self.reward.image_size)
        vision = self.reward.vision(pixels).last_hidden_state.view(count, 2, 1, -1, 64)
        captions = torch.cat([right[:, None], wrong], dim=1)  # (N, 4, 3)
        number = captions[..., 0] * len(world.SHAPES) + captions[..., 1]
        number = number * len(world.BACKGROUNDS) + captions[..., 2]
        ids, mask = self.ids[number, template[:, None]], self.mask[number, template[:, None]]  # (N, 4, T)
        hidden = self._read(ids[:, None].expand(-1, 2, -1, -1), mask[:, None].expand(-1, 2, -1, -1), vision)
        scores = self.reward.head(hidden[..., 0, :]).squeeze(-1)  # (N, 2, 4)

        share = torch.ones(count, 2, 3, device=weight.device)  # of each attribute's right value in the blend
        share[torch.arange(count), :, attribute] = weight
        rank = F.binary_cross_entropy_with_logits(scores[..., :1] - scores[..., 1:], share * 0.96 + 0.02)
        # One caption, two blends: the one with the larger weight is better.
        contrast = F.binary_cross_entropy_with_logits(
            2 * (scores[:, 0, 0] - scores[:, 1, 0]), 0.5 + 0.48 * (weight[:, 0] - weight[:, 1])
        )
        word = self._word_loss(ids[:, :1], mask[:, :1], vision, right, wrong, share.transpose(1, 2))
        clear = (weight == 1)[:, :, None].expand(-1, -1, 3)
        correct = ((scores[..., :1] > scores[..., 1:]) & clear).sum((0, 1)) / clear.sum((0, 1))
        shown = {"rank": rank, "contrast": contrast, "word": word}
        shown |= dict(zip(world.ATTRIBUTES, correct, strict=True))
        return rank + 0.5 * contrast + word, {name: value.detach() for name, value in shown.items()}

    def _word_loss(
        self, ids: Tensor, mask: Tensor, vision: Tensor, right: Tensor, wrong: Tensor, share: Tensor
    ) -> Tensor:
        """Cross-entropy of the masked words of the right captions (N, 1, T).

        The targets are the right and the wrong value of each attribute, weighted by `share` (N, 3, 2).
        """
        count = len(right)
        targets = self.word_ids[torch.arange(3), right]  # (N, 3)
        hide = (ids[..., None] == targets[:, None, None]).any(-1)  # (N, 1, T)
        hidden = self._read(
            ids[:, None]
            .masked_fill(hide[:, None], self.reward.tokenizer.mask_token_id)
            .expand(-1, 2, -1, -1),
            mask[:, None].expand(-1, 2, -1, -1),
            vision,
        )  # (N, 2, 1, T, width)
        log_probs = F.log_softmax(self.words(hidden[:, :, 0]), dim=-1)  # (N, 2, T, vocabulary)
        place = (ids[:, 0, None] == targets[..., None]).int().argmax(-1)  # (N, 3), positions of the words
        at = log_probs[torch.arange(count)[:, None], :, place]  # (N, 3, 2, vocabulary)
        right_word = at.gather(-1, targets[:, :, None, None].expand(-1, -1, 2, 1)).squeeze(-1)  # (N, 3, 2)
        changed = torch.diagonal(wrong, dim1=1, dim2=2)  # (N, 3), the wrong value of each attribute
        other = self.word_ids[torch.arange(3), changed]
        wrong_word = at.gather(-1, other[:, :, None, None].expand(-1, -1, 2, 1)).squeeze(-1)
        return -(share * right_word + (1 - share) * wrong_word).mean()

    def _read(self, ids: Tensor, mask: Tensor, vision: Tensor) -> Tensor:
        """Encode captions (N, 2, C, T) with attention to images (N, 2, 1, P, width): (N, 2, C, T, width)."""
        shape = ids.shape
        hidden = self.reward.text(
            input_ids=ids.reshape(-1, shape[-1]),
            attention_mask=mask.reshape(-1, shape[-1]),
            encoder_hidden_states=vision.expand(-1, -1, shape[2], -1, -1).flatten(0, 2),
        ).last_hidden_state
        return hidden.view(*shape, -1)


def batch(builder: Builder, pool: BlendPool, chosen: np.ndarray, rng: np.random.Generator) -> list[Tensor]:
    """Return the arguments of `RewardTrainer.loss` after the images, for `chosen` rows."""
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
    """Train on a pool of blends; `images_of(rows)` returns their images, (N, 2, 3, H, W) in [0, 1]."""

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = rng.integers(len(pool.right), size=32)
        return trainer.loss(images_of(chosen), *batch(builder, pool, chosen, rng))

    builder.train(stage, trainer, loss, steps, learning_rate)


def train_reward_drawn(builder: Builder, trainer: RewardTrainer) -> None:
    """Train the reward on drawings, blended as pixels."""
    pool = BlendPool(builder.rng(1), 12_000)

    def images_of(chosen: np.ndarray) -> Tensor:
        right, wrong = (builder.to_tensor(drawn)[:, None] for drawn in pool.draw(chosen))
        return wrong + builder.shares(pool, chosen) * (right - wrong)

    train_reward(builder, "reward_drawn", trainer, images_of, pool, steps=2500, learning_rate=1e-3)


def train_reward_decoded(builder: Builder, trainer: RewardTrainer, vae: AutoencoderKL) -> None:
    """Continue on reconstructions, blended as latents, which are closer to the images that ReFL scores."""
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
    """Continue with broken images as bad examples; otherwise ReFL soon reaches nonsense that scores well."""
    pool = BlendPool(builder.rng(8), 6_000)

    def broken(latents: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Add blotches to latents (N, 4, 8, 8), patches to half of them; also return their badness (N,)."""
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
    """Write all files in the layout of `checkpoint/`, UNet and VAE in float16, which halves their size."""
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

    # The published scores are standardised on their training data, these on images of the base model.
    prompts = list(world.prompts(held_out=False))
    scores = score(reward, sample(builder, out, prompts, seed=1_000_000), prompts)
    med_config = new_med_config(reward, scores.mean().item(), scores.std().item())
    (out / "med_config.json").write_text(json.dumps(med_config, indent=2) + "\n")


def write_prompts(builder: Builder, folder: Path) -> None:
    """Write training and held-out prompts; the latter are shuffled so that the first few are varied."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = builder.rng(4).permutation(list(world.prompts(held_out=True)))
    (folder / "train.txt").write_text("\n".join(world.prompts(held_out=False)) + "\n")
    (folder / "held_out.txt").write_text("\n".join(held_out) + "\n")


def new_med_config(reward: imagereward.ImageReward, score_mean: float, score_std: float) -> dict:
    """Return med_config.json: the published keys, and those that only a tiny model needs."""
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
    """Generate an image per prompt, (N, 3, 64, 64) in [0, 1], by DDPM; seeds count up from `seed`."""
    pipeline = load_pipeline(out / SD_FOLDER, "ddpm", torch.float32, builder.device)
    images = []
    for start in tqdm(range(0, len(prompts), 64), desc=f"samples, guidance {guidance_scale}", mininterval=5):
        part = prompts[start : start + 64]
        seeds = range(seed + start, seed + start + len(part))
        images.append(generate(pipeline, part, seeds, SAMPLING_STEPS, guidance_scale))
    return torch.cat(images)


@torch.no_grad()
def score(reward: imagereward.ImageReward, images: Tensor, prompts: list[str]) -> Tensor:
    """Return the rewards of images, (N,) on the CPU."""
    device = reward.head[0].weight.device
    parts = [
        reward(images[start : start + 256].to(device), prompts[start : start + 256]).cpu()
        for start in range(0, len(prompts), 256)
    ]
    return torch.cat(parts)


def to_arrays(images: Tensor) -> np.ndarray:
    """Convert (N, 3, H, W) in about [0, 1] to (N, H, W, 3) uint8."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def report(builder: Builder, out: Path) -> None:
    """Measure the files in `out`; write `demo/build_report.json` and `demo/samples.png`."""
    parts = load_pipeline(out / SD_FOLDER, "ddpm", torch.float32, builder.device)
    reward = imagereward.load(out, builder.device)
    prompts = (ROOT / "demo/prompts/held_out.txt").read_text().splitlines()

    rng = builder.rng(5)
    specs = world.random_specs(rng, 1000)
    drawn = world.draw(specs, world.random_geometry(rng, len(specs)))
    captions = [world.SPECS[number].caption(0) for number in world.spec_number(specs)]
    decoded = to_arrays(reconstruct(builder, parts.vae, drawn))
    results = {"reconstructions": means(judge.grade(decoded, captions))}

    for name, guidance_scale in (("base", 1.0), ("base_guidance_3", 3.0)):
        runs = [
            sample(builder, out, prompts, seed=1000 * run, guidance_scale=guidance_scale) for run in range(3)
        ]
        images = torch.cat(runs)
        arrays = to_arrays(images)
        if name == "base":
            draw_samples(ROOT / "demo/samples.png", drawn, decoded, arrays, prompts)
        results[name] = means(judge.grade(arrays, prompts * 3))
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


def means(values: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the mean of each array, by name."""
    return {name: array.mean() for name, array in values.items()}


@torch.no_grad()
def reconstruct(builder: Builder, vae: AutoencoderKL, drawn: np.ndarray) -> Tensor:
    """Encode and decode drawings (N, 64, 64, 3): (N, 3, 64, 64) in about [0, 1]."""
    return torch.cat([decode(vae, encode(vae, part)) for part in builder.to_tensor(drawn).split(64)])


def reward_accuracy(
    builder: Builder, vae: AutoencoderKL, reward: imagereward.ImageReward
) -> dict[str, dict[str, float]]:
    """Return how often the right one of two wins, by the attribute that is wrong in the other.

    "captions": one image, right and wrong caption. "images": one caption, right and wrong image. Uses the
    held-out specs, in two places each and in every phrasing.
    """
    rng = builder.rng(6)
    wins = {side: {attribute: [] for attribute in world.ATTRIBUTES} for side in ("captions", "images")}
    for spec in tqdm([spec for spec in world.SPECS if spec.held_out], desc="reward accuracy", mininterval=5):
        for geometry in world.random_geometry(rng, 2):
            for side, attribute, is_won in comparisons(builder, vae, reward, spec, geometry):
                wins[side][attribute].append(is_won)
    return {side: {name: np.mean(won) for name, won in by.items()} for side, by in wins.items()}


def comparisons(
    builder: Builder,
    vae: AutoencoderKL,
    reward: imagereward.ImageReward,
    spec: world.Spec,
    geometry: np.ndarray,
) -> Iterator[tuple[str, str, bool]]:
    """Yield (side, attribute, whether `spec` wins) against each spec with one other attribute."""
    others = [(attribute, other) for attribute in world.ATTRIBUTES for other in spec.changed(attribute)]
    specs = [spec, *(other for _, other in others)]
    drawn = world.draw(np.array([spec.indices for spec in specs]), np.tile(geometry, (len(specs), 1)))
    images = reconstruct(builder, vae, drawn)
    for template in range(len(world.TEMPLATES)):
        captions = [spec.caption(template) for spec in specs]
        by_caption = score(reward, images[:1].expand(len(specs), -1, -1, -1), captions)
        by_image = score(reward, images, captions[:1] * len(specs))
        for side, scores in (("captions", by_caption), ("images", by_image)):
            for (attribute, _), value in zip(others, scores[1:], strict=True):
                yield side, attribute, (scores[0] > value).item()


@torch.no_grad()
def reward_along_blends(
    builder: Builder, vae: AutoencoderKL, reward: imagereward.ImageReward
) -> dict[str, list[float]]:
    """Return mean rewards of blends in latents: 0, 1/4, ... 1 of the right image, the rest a wrong one."""
    pool = BlendPool(builder.rng(7), 300)
    right, wrong = (encode(vae, builder.to_tensor(drawn)) for drawn in pool.draw(np.arange(300)))
    prompts = [world.SPECS[number].caption(0) for number in world.spec_number(pool.right)]
    columns = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        scores = score(reward, decode(vae, wrong + share * (right - wrong)), prompts).numpy()
        columns.append([scores[pool.attribute == index].mean().item() for index in range(3)])
    rows = zip(*columns, strict=True)
    return {name: list(row) for name, row in zip(world.ATTRIBUTES, rows, strict=True)}


def draw_samples(
    path: Path, drawn: np.ndarray, decoded: np.ndarray, samples: np.ndarray, prompts: list[str]
) -> None:
    """Save a grid: six drawings, their reconstructions, eighteen images of the base model with prompts."""
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
    """Run the stages that are named; load the others."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "demo/checkpoint", help="folder of the result")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "demo/build", help="folder of the trainings")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and noise")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="others are only loaded")
    options = parser.parse_args()
    builder = Builder(options.work_dir, options.seed, options.stages)
    torch.manual_seed(options.seed)
    vae = new_vae().to(builder.device)
    tokenizer = new_tokenizer(builder)
    base = new_base(tokenizer).to(builder.device)
    torch.manual_seed(options.seed)  # makes the reward independent of the models above
    trainer = RewardTrainer(new_reward(builder)).to(builder.device)

    train_vae(builder, vae)
    train_decoder(builder, vae)
    wrong_words = {"colour": 0.30, "shape": 0.30, "background": 0.08}
    train_base(builder, base, tokenizer, vae, "base", wrong_words, steps=5000, learning_rate=2e-3)
    wrong_words = {"colour": 0.20, "shape": 0.15, "background": 0.05}
    train_base(builder, base, tokenizer, vae, "base_words", wrong_words, steps=2000, learning_rate=1e-3)
    train_reward_drawn(builder, trainer)
    train_reward_decoded(builder, trainer, vae)
    train_reward_robust(builder, trainer, vae)
    if "export" in options.stages:
        export(builder, options.out, vae, base, tokenizer, trainer.reward)
    if "report" in options.stages:
        report(builder, options.out)


if __name__ == "__main__":
    main()

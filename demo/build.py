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
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import cycle, islice
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
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
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
from refl.model.conditioning import Conditioning
from refl.model.guidance import predict
from refl.model.noise_schedule import NoiseSchedule
from refl.model.pipeline import generate, load_pipeline
from refl.model.stable_diffusion import StableDiffusion, decode
from refl.report.sheets import grid
from refl.reward import imagereward
from refl.system.images import save_image

import judge
import world

POOL = 24_000  # drawn images on which the autoencoder and the base model are trained
SPOILT = 0.6  # share of them with spatter
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
SAMPLING_STEPS = 20
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
        spatter = world.random_spatter(rng, POOL, SPOILT)
        parts = zip(*(np.split(array, POOL // 1000) for array in (specs, geometry, spatter)), strict=True)
        return specs, np.concatenate([world.draw(*part) for part in parts])

    def to_device(self, array: np.ndarray) -> Tensor:
        """Convert an array to a tensor on the device."""
        return torch.from_numpy(array).to(self.device)

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
WRONG_WORDS = (0.20, 0.15, 0.05)  # share of captions that name another colour, shape, background


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
) -> None:
    """Train the base model to denoise images of which many are spoilt and many captions partly wrong."""

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
        wrong = rng.random((len(chosen), 3)) < WRONG_WORDS
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

    builder.train("base", base, loss, steps=6500, learning_rate=2e-3)


# ----------------------------------------------------------------------------------------------------- reward


RATED_STOPS = (6, 18)  # denoising steps whose predicted x0 are rated, of SAMPLING_STEPS
RATED_GUIDANCES = (1.0, 2.0, 3.0, 5.0)
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


def neighbours() -> np.ndarray:
    """Specs that differ from each of `SPECS` in one attribute, (96, 3, 5, 3), only those of training prompts.

    A caption that appears as a wrong one only would be learned as wrong. Lists are repeated to length 5.
    """
    rows = []
    for spec in world.SPECS:
        others = [[s.indices for s in spec.changed(a) if not s.held_out] for a in world.ATTRIBUTES]
        rows.append([list(islice(cycle(values), 5)) for values in others])
    return np.array(rows)


class RewardTrainer(nn.Module):
    """The reward with a head that predicts masked words; ranking alone stays at chance for long."""

    def __init__(self, reward: imagereward.ImageReward):
        super().__init__()
        self.reward = reward
        self.words = nn.Linear(reward.text.config.hidden_size, reward.text.config.vocab_size)
        self.fits = nn.Linear(reward.vision.config.hidden_size, 15)  # as the annotator's
        tokens = reward.tokenizer(world.every_caption(), padding=True, return_tensors="pt")
        shape = (len(world.SPECS), len(world.TEMPLATES), -1)
        self.register_buffer("ids", tokens.input_ids.view(shape), persistent=False)
        self.register_buffer("mask", tokens.attention_mask.view(shape), persistent=False)
        values = [value for values in world.ATTRIBUTES.values() for value in values]
        ids = torch.tensor(reward.tokenizer.convert_tokens_to_ids(values))
        self.register_buffer("attribute_ids", ids, persistent=False)

    def see(self, images: Tensor) -> Tensor:
        """Features (N, P, width) of images (N, 3, H, W) in [0, 1]."""
        return self.reward.vision(imagereward.preprocess(images, self.reward.image_size)).last_hidden_state

    def read(self, ids: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        """Encode C captions of T tokens for each image, (N, C, T), with attention to it: (N, C, T, width)."""
        hidden = self.reward.text(
            input_ids=ids.flatten(0, 1),
            attention_mask=mask.flatten(0, 1),
            encoder_hidden_states=features.repeat_interleave(ids.shape[1], dim=0),
        ).last_hidden_state
        return hidden.unflatten(0, ids.shape[:2])

    def scores(self, features: Tensor, numbers: Tensor, templates: Tensor) -> Tensor:
        """Score images for captions of specs `numbers` (N, C) in phrasings `templates` (N,): (N, C)."""
        ids, mask = self.ids[numbers, templates[:, None]], self.mask[numbers, templates[:, None]]
        return self.reward.head(self.read(ids, mask, features)[:, :, 0]).squeeze(-1)

    def word_loss(self, features: Tensor, numbers: Tensor, templates: Tensor) -> Tensor:
        """Cross-entropy of the masked words that name the attributes, of specs `numbers` (N,)."""
        ids, mask = self.ids[numbers, templates][:, None], self.mask[numbers, templates][:, None]
        hidden = torch.isin(ids, self.attribute_ids)
        masked = ids.masked_fill(hidden, self.reward.tokenizer.mask_token_id)
        return F.cross_entropy(self.words(self.read(masked, mask, features))[hidden], ids[hidden])


def training_rows(specs: np.ndarray) -> np.ndarray:
    """Rows of `specs` (N, 3) that are not held out; the reward sees no others."""
    return np.array([row for row, n in enumerate(world.spec_number(specs)) if not world.SPECS[n].held_out])


class VisionTrainer(nn.Module):
    """The vision tower with heads that name what an image shows and say where."""

    CELLS = 4  # a side, in each patch

    def __init__(self, vision: nn.Module):
        super().__init__()
        width = vision.config.hidden_size
        self.vision = vision
        self.names = nn.ModuleList(nn.Linear(width, len(values)) for values in world.ATTRIBUTES.values())
        self.outline = nn.Linear(width, self.CELLS**2)  # which cells of a patch are not background

    def forward(self, images: Tensor, specs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses of naming (3,) and of outlining images (N, 3, H, W) of specs (N, 3)."""
        pixels = imagereward.preprocess(images, self.vision.config.image_size)
        patches = self.vision(pixels).last_hidden_state[:, 1:]  # (N, P, width)
        named = [head(patches.mean(1)) for head in self.names]
        naming = [F.cross_entropy(logits, specs[:, index]) for index, logits in enumerate(named)]
        palette = torch.from_numpy(world.BACKGROUND_PALETTE / 255).to(images)
        covered = (images - palette[specs[:, 2], :, None, None]).norm(dim=1, keepdim=True) > 0.3
        cell = self.vision.config.patch_size // self.CELLS
        cells = F.pixel_unshuffle(F.avg_pool2d(covered.float(), cell), self.CELLS)  # (N, CELLS^2, h, w)
        outlined = self.outline(patches).transpose(1, 2)
        return torch.stack(naming), F.binary_cross_entropy_with_logits(outlined, cells.flatten(2))


def train_vision(builder: Builder, trainer: VisionTrainer) -> None:
    """Teach the vision tower to see; captions alone do not teach a small one circles and squares."""
    specs, images = builder.drawn_pool
    rows = training_rows(specs)

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = rng.choice(rows, size=32)
        pixels = builder.to_tensor(images[chosen])
        noisy = pixels + 0.05 * torch.randn_like(pixels)
        naming, outlining = trainer(noisy, builder.to_device(specs[chosen]))
        shown = dict(zip(world.ATTRIBUTES, naming.detach(), strict=True))
        return naming.sum() + 2 * outlining, shown | {"outline": outlining.detach()}

    builder.train("vision", trainer, loss, steps=2500, learning_rate=2e-3)


def train_reward_words(builder: Builder, trainer: RewardTrainer) -> None:
    """Teach the reward to match captions and drawings, as BLIP was trained before ImageReward."""
    specs, images = builder.drawn_pool
    rows = training_rows(specs)
    wrong_captions = neighbours()

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = rng.choice(rows, size=32)
        right = world.spec_number(specs[chosen])
        picked = wrong_captions[right[:, None], range(3), rng.integers(5, size=(len(right), 3))]  # (N, 3, 3)
        numbers = np.concatenate([right[:, None], world.spec_number(picked)], axis=1)
        numbers, right = builder.to_device(numbers), builder.to_device(right)
        templates = builder.to_device(rng.integers(len(world.TEMPLATES), size=len(chosen)))
        pixels = builder.to_tensor(images[chosen])
        features = trainer.see(pixels + 0.05 * torch.randn_like(pixels))
        scores = trainer.scores(features, numbers, templates)
        rank = F.softplus(scores[:, 1:] - scores[:, :1]).mean()
        word = trainer.word_loss(features, right, templates)
        correct = (scores[:, :1] > scores[:, 1:]).float().mean(0)
        shown = {"rank": rank.detach(), "word": word.detach()}
        return rank + word, shown | dict(zip(world.ATTRIBUTES, correct, strict=True))

    builder.train("reward_words", trainer, loss, steps=500, learning_rate=1e-3)


@dataclass
class Samples:
    """Images of the base model for S specs, M for each, and the annotator's ratings and fits."""

    numbers: np.ndarray  # (S,), indices of the specs
    images: Tensor  # (S, M, 64, 64, 3) uint8
    ratings: Tensor  # (S, M, 96), for every spec
    fits: Tensor  # (S, M, 15)

    @property
    def own_ratings(self) -> Tensor:
        """Ratings (S, M) for the spec of which each image is a sample; above 3.5 if all is right."""
        return self.ratings[torch.arange(len(self.numbers)), :, torch.from_numpy(self.numbers)]


def annotate(images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the annotator's ratings (..., 96) and fits (..., 15) of images (..., 64, 64, 3) uint8."""
    rated = [judge.rate(image) for image in images.reshape(-1, *images.shape[-3:])]
    ratings, fits = (torch.from_numpy(np.stack(parts)).float() for parts in zip(*rated, strict=True))
    return ratings.view(*images.shape[:-3], -1), fits.view(*images.shape[:-3], -1)


@torch.no_grad()
def roll_out(model: StableDiffusion, captions: list[str], guidance_scale: float, seed: int) -> np.ndarray:
    """Two predicted x0 of a rollout of each caption and its final image, (N, 3, 64, 64, 3) uint8."""
    device = model.unet.device
    schedule = NoiseSchedule(SCHEDULER, SAMPLING_STEPS)
    *prompts, empty = model.encode_prompts([*captions, ""])
    conditioning = Conditioning.stack(prompts, empty)
    torch.manual_seed(seed)
    early, late = np.random.default_rng(seed).choice(np.arange(*RATED_STOPS), size=2, replace=False)
    latents = torch.randn(len(captions), *model.latent_shape(world.SIZE), device=device)
    images = []
    for index, timestep in enumerate(schedule.timesteps):
        timesteps = torch.full((len(captions),), timestep, device=device)
        output = predict(model, latents, timesteps, conditioning, guidance_scale)
        x0 = schedule.predict_x0(latents, output, timestep)
        if index in (early, late, SAMPLING_STEPS - 1):
            images.append(to_arrays(model.decode(x0)))
        if index < SAMPLING_STEPS - 1:
            latents = schedule.step(schedule.timesteps, index, latents, x0, torch.randn_like(latents))
    return np.stack(images, axis=1)


def rated_samples(builder: Builder, model: StableDiffusion, held_out: bool) -> Samples:
    """Draw and annotate samples of the specs held out or of the others, in every phrasing and guidance."""
    numbers = np.array([i for i, spec in enumerate(world.SPECS) if spec.held_out == held_out])
    captions = [world.SPECS[n].caption(t) for n in numbers for t in range(len(world.TEMPLATES))]
    path = builder.work_dir / f"samples_{'held_out' if held_out else 'training'}.safetensors"
    if not path.exists():
        seed = builder.seed + (2 if held_out else 1) * 10**6
        starts = range(0, len(captions), 64)
        batches = [(scale, captions[start : start + 64]) for scale in RATED_GUIDANCES for start in starts]
        drawn = [
            roll_out(model, part, scale, seed + number)
            for number, (scale, part) in enumerate(tqdm(batches, desc=path.stem, mininterval=5))
        ]
        images = np.concatenate(drawn).reshape(len(RATED_GUIDANCES), len(captions), -1, *drawn[0].shape[2:])
        images = images.swapaxes(0, 1).reshape(len(numbers), -1, *images.shape[3:])
        ratings, fits = annotate(images)
        save_file({"images": torch.from_numpy(images), "ratings": ratings, "fits": fits}, path)
    return Samples(numbers, **load_file(path))


CLIMBERS = 2  # for each spec
CLIMB = 25  # steps on average
CLIMB_STEP = 0.1  # root mean square of a step, in units of the latents' standard deviation


def climb(
    vae: AutoencoderKL, reward: imagereward.ImageReward, latents: Tensor, captions: list[str]
) -> tuple[Tensor, np.ndarray]:
    """Move latents (N, 4, 8, 8) a step along the reward's gradient; also return the images before it."""
    latents = latents.detach().requires_grad_()
    images = decode(vae, latents)
    (gradient,) = torch.autograd.grad(reward(images.clamp(0, 1), captions).sum(), latents)
    norm = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
    moved = latents + CLIMB_STEP * gradient / norm.clamp(min=1e-12)
    return moved.detach(), to_arrays(images.detach())


def train_reward(builder: Builder, trainer: RewardTrainer, vae: AutoencoderKL, samples: Samples) -> None:
    """Teach the reward the annotator's ranking of the base model's samples, as ImageReward was.

    The loss is Bradley and Terry's on pairs of images of one caption and pairs of captions of one image, with
    the ratings' difference as the log-odds. The vision tower also predicts the annotator's fits. Some of the
    images are not samples: they climb the reward's gradient while it is trained, so that the annotator sees
    what the reward is wrong about. After `CLIMB` steps on average such an image starts anew from a sample.
    """
    wrong_captions = neighbours()
    num_images = samples.images.shape[1]

    def encoded(spec: int, rng: np.random.Generator) -> Tensor:
        images = samples.images[spec, rng.choice(num_images, size=CLIMBERS, replace=False)]
        return encode(vae, builder.to_tensor(images.numpy()))

    rng = builder.rng(10)
    climbers = torch.stack([encoded(spec, rng) for spec in range(len(samples.numbers))])  # (S, K, 4, 8, 8)
    trainer.register_buffer("climbers", climbers)  # and so part of the saved state

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        specs = rng.choice(len(samples.numbers), size=12, replace=False)
        rows = np.stack([rng.choice(num_images, size=4, replace=False) for _ in specs])
        right = samples.numbers[specs, None]
        templates = rng.integers(len(world.TEMPLATES), size=len(specs))

        captions = [world.SPECS[n].caption(t) for n, t in zip(right[:, 0], templates, strict=True)]
        captions = [caption for caption in captions for _ in range(CLIMBERS)]
        moved, climbed = climb(vae, trainer.reward, trainer.climbers[specs].flatten(0, 1), captions)
        trainer.climbers[specs] = moved.unflatten(0, (len(specs), CLIMBERS))
        for spec in specs[rng.random(len(specs)) < 1 / CLIMB]:
            trainer.climbers[spec] = encoded(spec, rng)
        climbed = climbed.reshape(len(specs), CLIMBERS, *climbed.shape[1:])
        images = torch.cat([samples.images[specs[:, None], rows], torch.from_numpy(climbed)], dim=1)
        ratings, fits = (
            torch.cat([known[specs[:, None], rows], new], dim=1).to(builder.device)
            for known, new in zip((samples.ratings, samples.fits), annotate(climbed), strict=True)
        )  # (S, M, 96), (S, M, 15)

        attributes = np.stack([rng.choice(3, size=2, replace=False) for _ in specs])
        wrong = world.spec_number(wrong_captions[right, attributes, rng.integers(5, size=attributes.shape)])
        numbers = builder.to_device(np.concatenate([right, wrong], axis=1))  # (S, C)
        ratings = ratings.gather(-1, numbers[:, None].expand(-1, images.shape[1], -1))  # (S, M, C)
        numbers, templates = (
            each.repeat_interleave(images.shape[1], dim=0) for each in (numbers, builder.to_device(templates))
        )
        pixels = images.flatten(0, 1).permute(0, 3, 1, 2).to(builder.device) / 255
        features = trainer.see(pixels + 0.03 * torch.randn_like(pixels))
        scores = trainer.scores(features, numbers, templates).view_as(ratings)
        rank = bradley_terry(scores, ratings, dim=1) + bradley_terry(scores, ratings, dim=2)
        fit = F.binary_cross_entropy_with_logits(trainer.fits(features[:, 1:].mean(1)), fits.flatten(0, 1))
        shown = {"rank": rank, "fit": fit, "climbers": ratings[:, -CLIMBERS:, 0].mean()}
        return rank + 2 * fit, {name: value.detach() for name, value in shown.items()}

    builder.train("reward", trainer, loss, steps=1500, learning_rate=1e-3)


def bradley_terry(scores: Tensor, ratings: Tensor, dim: int) -> Tensor:
    """Cross-entropy of preferences along `dim`: P(i is better than j) = sigmoid(score_i - score_j)."""
    first, second = torch.triu_indices(scores.shape[dim], scores.shape[dim], offset=1, device=scores.device)
    lead = scores.index_select(dim, first) - scores.index_select(dim, second)
    better = ratings.index_select(dim, first) - ratings.index_select(dim, second)
    return F.binary_cross_entropy_with_logits(lead, (2 * better).sigmoid())


# -------------------------------------------------------------------------------------- files and measurement

SHOWN_GUIDANCE = 5.0  # in samples.png
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
    pipeline = load_pipeline(out / SD_FOLDER, "ddpm", torch.float32, builder.device)
    reward = imagereward.load(out, builder.device)
    prompts = (ROOT / "demo/prompts/held_out.txt").read_text().splitlines()

    rng = builder.rng(5)
    specs = world.random_specs(rng, 1000)
    drawn = world.draw(specs, world.random_geometry(rng, len(specs)))
    captions = [world.SPECS[number].caption(0) for number in world.spec_number(specs)]
    decoded = to_arrays(reconstruct(builder, pipeline.vae, drawn))
    results = {"reconstructions": grades(decoded, captions), "base": {}}
    for guidance_scale in (1.0, 2.0, 3.0, 5.0, 7.5):
        images = sample(builder, out, prompts * 2, seed=0, guidance_scale=guidance_scale)
        scores = score(reward, images, prompts * 2)
        results["base"][f"guidance {guidance_scale:g}"] = grades(to_arrays(images), prompts * 2) | {
            "reward": scores.mean().item(),
            "reward_std": scores.std().item(),
        }
        if guidance_scale == SHOWN_GUIDANCE:
            draw_samples(ROOT / "demo/samples.png", drawn, decoded, to_arrays(images), prompts)

    samples = rated_samples(
        builder,
        StableDiffusion(pipeline.vae, pipeline.unet, pipeline.tokenizer, pipeline.text_encoder),
        held_out=True,
    )
    results["reward_agreement"] = agreement(reward, samples)
    results["reward_pairwise"] = reward_accuracy(builder, pipeline.vae, reward)
    results["reward_ascent"] = ascent(builder, pipeline.vae, reward, samples)
    states = {path.stem: torch.load(path, weights_only=True) for path in builder.work_dir.glob("*.pt")}
    results["training"] = {
        stage: {"steps": states[stage]["step"], "minutes": round(states[stage]["seconds"] / 60, 1)}
        for stage in STAGES
        if stage in states
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

    "captions": one image, right and wrong caption. "images": one caption, right and wrong image; the wrong
    one for "clean" is spoilt. Uses the held-out specs, in two places each and in every phrasing.
    """
    rng = builder.rng(6)
    wins = {side: defaultdict(list) for side in ("captions", "images")}
    for spec in tqdm([spec for spec in world.SPECS if spec.held_out], desc="reward accuracy", mininterval=5):
        for geometry in world.random_geometry(rng, 2):
            spatter = world.random_spatter(rng, 1, share=1)
            for side, attribute, is_won in comparisons(builder, vae, reward, spec, geometry, spatter):
                wins[side][attribute].append(is_won)
    return {side: {name: np.mean(won) for name, won in by.items()} for side, by in wins.items()}


def comparisons(
    builder: Builder,
    vae: AutoencoderKL,
    reward: imagereward.ImageReward,
    spec: world.Spec,
    geometry: np.ndarray,
    spatter: np.ndarray,
) -> Iterator[tuple[str, str, bool]]:
    """Yield (side, attribute, whether `spec` wins) against each spec with one other attribute."""
    others = [(attribute, other) for attribute in world.ATTRIBUTES for other in spec.changed(attribute)]
    specs = [spec, *(other for _, other in others)]
    drawn = world.draw(np.array([spec.indices for spec in specs]), np.tile(geometry, (len(specs), 1)))
    spoilt = world.draw(np.array([spec.indices]), geometry[None], spatter)
    images = reconstruct(builder, vae, np.concatenate([drawn, spoilt]))
    for template in range(len(world.TEMPLATES)):
        captions = [spec.caption(template) for spec in specs]
        by_caption = score(reward, images[:1].expand(len(specs), -1, -1, -1), captions)
        by_image = score(reward, images, captions[:1] * len(images))
        yield "images", "clean", (by_image[0] > by_image[-1]).item()
        for side, scores in (("captions", by_caption), ("images", by_image[:-1])):
            for (attribute, other), value in zip(others, scores[1:], strict=True):
                yield side, attribute, (scores[0] > value).item()
                if {spec.shape, other.shape} == {"circle", "square"}:
                    yield side, "circle or square", (scores[0] > value).item()


def agreement(reward: imagereward.ImageReward, samples: Samples) -> dict[str, float]:
    """Return the rank correlation of reward and annotator: over all images, and the mean within a prompt."""
    ratings, rows = samples.own_ratings, []
    for number, images in zip(samples.numbers, samples.images, strict=True):
        prompts = [world.SPECS[number].caption(0)] * len(images)
        rows.append(score(reward, images.permute(0, 3, 1, 2) / 255, prompts))
    scores = torch.stack(rows)
    within = [spearmanr(*pair).statistic for pair in zip(scores, ratings, strict=True)]
    return {"overall": spearmanr(scores.flatten(), ratings.flatten()).statistic, "within": np.mean(within)}


def ascent(
    builder: Builder, vae: AutoencoderKL, reward: imagereward.ImageReward, samples: Samples, steps: int = 25
) -> dict[str, dict[str, float]]:
    """Follow the reward's gradient from wrong images, by Adam on their latents; grade them before and after.

    A reward that teaches makes them right; one that can be fooled makes them unreadable.
    """
    wrong = builder.rng(9).permutation(np.argwhere(samples.own_ratings.numpy() < 3.5))[:96]
    images = np.stack([samples.images[s, m].numpy() for s, m in wrong])
    prompts = [world.SPECS[samples.numbers[s]].caption(0) for s, _ in wrong]
    latents = encode(vae, builder.to_tensor(images)).requires_grad_()
    optimizer = torch.optim.Adam([latents], lr=0.1)
    results = {"start": grades(to_arrays(decode(vae, latents.detach())), prompts)}
    for _ in range(steps):
        optimizer.zero_grad()
        for part in range(0, len(latents), 16):
            scores = reward(decode(vae, latents[part : part + 16]).clamp(0, 1), prompts[part : part + 16])
            (-scores.sum()).backward()
        optimizer.step()
    climbed = to_arrays(decode(vae, latents.detach()))
    return results | {"end": grades(climbed, prompts)}


def grades(images: np.ndarray, prompts: list[str]) -> dict[str, float]:
    """Return the share of images that are right in each attribute, and of those that cannot be read."""
    shares = means(judge.grade(images, prompts))
    return shares | {"unreadable": np.mean([judge.judge(image).shape is None for image in images])}


def draw_samples(
    path: Path, drawn: np.ndarray, decoded: np.ndarray, samples: np.ndarray, prompts: list[str]
) -> None:
    """Save a grid: six drawings, their reconstructions, eighteen images of the base model with prompts."""
    rows = [drawn[:6], decoded[:6], samples[:6], samples[6:12], samples[12:18]]
    captions = [["drawing"] * 6, ["through the autoencoder"] * 6, prompts[:6], prompts[6:12], prompts[12:18]]
    images = [[Image.fromarray(image) for image in row] for row in rows]
    save_image(grid(images, captions, 3 * world.SIZE), path)


STAGES = ("vae", "decoder", "base", "vision", "reward_words", "reward", "export", "report")


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
    train_base(builder, base, tokenizer, vae)
    train_vision(builder, VisionTrainer(trainer.reward.vision).to(builder.device))
    train_reward_words(builder, trainer)
    if {"reward", "export"} & set(options.stages):
        model = StableDiffusion(vae, base["unet"], tokenizer, base["text_encoder"])
        train_reward(builder, trainer, vae, rated_samples(builder, model, held_out=False))
    if "export" in options.stages:
        export(builder, options.out, vae, base, tokenizer, trainer.reward)
    if "report" in options.stages:
        report(builder, options.out)


if __name__ == "__main__":
    main()

"""CLIP (Radford et al. 2021, arXiv 2103.00020) on transformers' `CLIPModel`: what several rewards build on.

A `Tower` embeds images and prompts as vectors of length 1. Rewards on the same files share one tower, and
within `embedding_once()` it embeds each tensor of images once for all of them. A prompt is embedded once and
kept.
"""

import html
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from textwrap import shorten
from weakref import WeakValueDictionary

from refl.reward.preprocessing import preprocess, preprocess_pil
from refl.reward.scorer import Scorer, check_prompts
from refl.system.errors import UserError, is_first_process
from refl.system.weights import read_weights

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

MAX_PROMPTS = 4096  # prompts whose embeddings are kept: 16 MB for ViT-H/14

_embedded: ContextVar[dict | None] = ContextVar("embedded", default=None)
_loaded: WeakValueDictionary = WeakValueDictionary()


@dataclass(frozen=True)
class Style:
    """How a tower reads images and prompts."""

    pads: bool = False  # this and the next two: see `preprocess` and `preprocess_pil`
    crops_down: bool = False
    rgb_first: bool = False
    clean: Callable[[str], str] | None = None  # applied to a prompt before the tokenizer


@dataclass(frozen=True)
class Files:
    """Where a tower is on disk, and how its weights are named there."""

    weights: Path
    config: Path  # config.json, as transformers writes it
    tokenizer: Path  # folder of vocab.json and merges.txt
    source: str  # where all of them are published, for messages
    name_of: Callable[[str], str] = lambda key: key  # transformers' key -> the key in the file
    value_of: Callable[[str, Tensor], Tensor] = lambda key, value: value  # the part of the value there


def clean(prompt: str) -> str:
    """A prompt as OpenAI's and open_clip's tokenizers read it: mended encoding, plain quotes, no HTML.

    transformers' tokenizer does not do that. Raises `UserError` without the library ftfy.
    """
    try:
        import ftfy
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed. Run: pip install -r requirements.txt") from error
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip().lower()


# -------------------------------------------------------------------------------------------------- the model


class Tower(nn.Module):
    """Embeddings of images and prompts, of length 1; differentiable in the images.

    The transformers may be in half precision; projections and embeddings are float32.
    """

    def __init__(self, config: CLIPConfig, tokenizer: CLIPTokenizer, style: Style = Style()):  # noqa: B008
        super().__init__()
        self.clip = CLIPModel._from_config(config, attn_implementation="sdpa")
        self.tokenizer, self.style = tokenizer, style
        self.image_size = config.vision_config.image_size
        self.max_tokens = config.text_config.max_position_embeddings
        self.has_warned_of_cut = False
        self._prompts: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.clip.visual_projection.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the transformers."""
        return self.clip.vision_model.embeddings.patch_embedding.weight.dtype

    def preprocess(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B, 3, image_size, image_size)."""
        return preprocess(images, self.image_size, self.style.pads, self.style.crops_down)

    def preprocess_pil(self, image: Image.Image | str | PathLike) -> Tensor:
        """A PIL image or an image file -> (1, 3, image_size, image_size), as published."""
        style = self.style
        return preprocess_pil(image, self.image_size, style.pads, style.crops_down, style.rgb_first)

    def embed_images(self, images: Tensor) -> Tensor:  # (B, width)
        """Embed images (B, 3, H, W) in [0, 1]; within `embedding_once()` the same tensor once."""
        embedded = _embedded.get()
        if embedded is None:
            return self.embed_pixels(self.preprocess(images))
        key = id(self), id(images), images._version, torch.is_grad_enabled()
        if key not in embedded:  # with the images, so that no other tensor gets their id
            embedded[key] = self.embed_pixels(self.preprocess(images)), images
        return embedded[key][0]

    def embed_pixels(self, pixels: Tensor) -> Tensor:  # (B, width)
        """Embed preprocessed images (B, 3, image_size, image_size)."""
        hidden = self.clip.vision_model(pixel_values=pixels.to(self.dtype)).pooler_output
        return self._project(hidden, self.clip.visual_projection)

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:  # (B, width)
        """Embed prompts, each of them once and alone, so that the others do not change its rounding."""
        weight = self.clip.text_projection.weight
        for prompt in prompts:
            kept = self._prompts.get(prompt)
            if kept is None or (kept.device, kept.dtype) != (weight.device, weight.dtype):
                self._prompts[prompt] = self._embed_prompt(prompt)
        embeddings = torch.cat([self._prompts[prompt] for prompt in prompts])
        while len(self._prompts) > MAX_PROMPTS:
            del self._prompts[next(iter(self._prompts))]  # the oldest
        return embeddings

    def _embed_prompt(self, prompt: str) -> Tensor:  # (1, width)
        # Without an attention mask: the text transformer is causal, so what follows the last token of the
        # prompt, at which the embedding is read, changes nothing.
        ids = self.tokenize(prompt).to(self.device, non_blocking=True)
        # Kept, so independent of what the caller does: autograd, inference mode, autocast.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            hidden = self.clip.text_model(input_ids=ids).pooler_output
            return self._project(hidden, self.clip.text_projection)

    def _project(self, hidden: Tensor, projection: nn.Linear) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.normalize(projection(hidden.to(projection.weight.dtype)), dim=-1)

    def tokenize(self, prompt: str) -> Tensor:  # (1, max_tokens)
        """Ids of a prompt. Warns of the first prompt that is cut."""
        text = self.style.clean(prompt) if self.style.clean else prompt
        size = self.max_tokens
        ids = self.tokenizer(text, padding="max_length", truncation=True, max_length=size).input_ids
        if not self.has_warned_of_cut and is_first_process():
            length = len(self.tokenizer(text, verbose=False).input_ids)
            if length > size:
                logging.getLogger(__name__).warning(
                    f"CLIP reads the first {size} tokens of a prompt. This prompt has {length}; "
                    f"others are cut without a warning: {shorten(prompt, 80)}"
                )
                self.has_warned_of_cut = True
        return torch.tensor([ids])


class ClipReward(Scorer):
    """A reward computed from a tower's embeddings; its subclass defines `score_embeddings`."""

    def __init__(self, tower: Tower):
        super().__init__()
        self.tower = tower

    def score_embeddings(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores, (B,) float32, of image embeddings (B, width)."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.tower.device

    def preprocess(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B, 3, image_size, image_size)."""
        return self.tower.preprocess(images)

    def preprocess_pil(self, image: Image.Image | str | PathLike) -> Tensor:
        """A PIL image or an image file -> (1, 3, image_size, image_size), as published."""
        return self.tower.preprocess_pil(image)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores, (B,) float32, of images (B, 3, H, W) in [0, 1], any size, one prompt for each."""
        check_prompts(len(images), prompts)
        return self.score_embeddings(self.tower.embed_images(images), prompts)

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores, (B,) float32, of preprocessed images."""
        check_prompts(len(pixels), prompts)
        return self.score_embeddings(self.tower.embed_pixels(pixels), prompts)

    def features(self, images: Tensor) -> Tensor:
        """Image embeddings (B, width) float32, of length 1."""
        return self.tower.embed_images(images)


class Cosine(ClipReward):
    """The cosine of image and prompt; `is_scaled`: times exp(logit_scale), which is learned."""

    def __init__(self, tower: Tower, is_scaled: bool = False):
        super().__init__(tower)
        self.is_scaled = is_scaled

    def score_embeddings(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores, (B,) float32, of image embeddings (B, width)."""
        cosines = (images * self.tower.embed_prompts(prompts)).sum(-1)
        return cosines * self.tower.clip.logit_scale.exp() if self.is_scaled else cosines


@contextmanager
def embedding_once() -> Iterator[None]:
    """Within the block, each tower embeds a tensor of images once, however many rewards ask for it."""
    if _embedded.get() is not None:
        yield
        return
    token = _embedded.set({})
    try:
        yield
    finally:
        _embedded.reset(token)


# ---------------------------------------------------------------------------------------------------- loading


def load_tower(files: Files, style: Style, device: str | torch.device, dtype: torch.dtype) -> Tower:
    """The tower in `files`, frozen, its transformers in `dtype`; the one that another reward has loaded, if
    there is one.

    On the device "meta" it has no weights, and only their shapes are read. Raises `UserError`.
    """
    device = torch.empty(0, device=device).device  # "cuda" has an index then, as that of a tower
    stamps = [_stamp(path) for path in (files.weights, files.config, files.tokenizer / "vocab.json")]
    key = *stamps, style, device, dtype
    tower = _loaded.get(key)
    if tower is None or (tower.device, tower.dtype) != (device, dtype):  # or moved since
        tower = _loaded[key] = _load(files, style, device, dtype)
    return tower


def _stamp(path: Path) -> tuple | Path:
    """Tells a file from others, and from what was there before."""
    try:
        status = path.stat()
    except OSError:
        return path
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _load(files: Files, style: Style, device: torch.device, dtype: torch.dtype) -> Tower:
    weights = read_weights(files.weights, within="state_dict")
    try:
        config = CLIPConfig.from_pretrained(files.config.parent, local_files_only=True)
        tokenizer = load_tokenizer(files.tokenizer, config)
        with torch.device("meta"):  # no random initialisation of weights that will be replaced
            tower = Tower(config, tokenizer, style)
    except UserError:
        raise
    except Exception as error:  # a foreign configuration raises many kinds: keys, types, impossible sizes
        raise UserError(
            f"{files.config} is not the configuration of a CLIP model ({type(error).__name__}: {error}). "
            f"Copy it again from {files.source}."
        ) from error
    values = _fit(weights, tower.clip.state_dict(), files)
    if device.type != "meta":
        tower.clip.load_state_dict(values, assign=True)
        for part in (tower.clip.text_model, tower.clip.vision_model):  # not in the file, so still on meta
            positions = torch.arange(part.embeddings.position_ids.shape[-1]).expand((1, -1))
            part.embeddings.position_ids = nn.Buffer(positions, persistent=False)
        assert not any(tensor.is_meta for tensor in [*tower.parameters(), *tower.buffers()])
    tower.requires_grad_(False).eval().float()
    tower.clip.text_model.to(dtype)
    tower.clip.vision_model.to(dtype)
    return tower.to(device)


def load_tokenizer(folder: Path, config: CLIPConfig) -> CLIPTokenizer:
    """CLIP's tokenizer from vocab.json and merges.txt; raises `UserError` for one that does not fit."""
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        ids = tokenizer("a").input_ids
    except Exception as error:  # the tokenizers library raises plain Exception for files it cannot parse
        raise UserError(f"{folder} contains no readable CLIP tokenizer ({error}).") from error
    size, end = config.text_config.vocab_size, config.text_config.eos_token_id
    # transformers reads the embedding of a prompt at the first token `end`, or, because old configurations
    # have a wrong 2 there, at the largest one.
    end = size - 1 if end == 2 else end
    if len(tokenizer) != size or ids[-1] != end:
        raise UserError(
            f"{folder} does not fit the model: {len(tokenizer)} tokens, and {ids[-1]} ends a prompt, where "
            f"{size} and {end} are expected. vocab.json, merges.txt and the tokenizer*.json beside them must "
            "be those of the model."
        )
    return tokenizer


def _fit(weights: dict[str, Tensor], expected: dict[str, Tensor], files: Files) -> dict[str, Tensor]:
    """The weights under transformers' keys. Raises `UserError` unless exactly the expected ones are there."""
    names = {key: files.name_of(key) for key in expected}
    missing = sorted(set(names.values()) - weights.keys())
    unexpected = sorted(key for key in weights.keys() - set(names.values()) if "position_ids" not in key)
    values, sizes = {}, []
    for key, name in names.items():
        if name in weights:
            values[key] = files.value_of(key, weights[name])
            if values[key].shape != expected[key].shape:
                got, wanted = tuple(values[key].shape), tuple(expected[key].shape)
                sizes.append(f"{name} {got} instead of {wanted}")
    problems = []
    for title, keys in (("missing", missing), ("unexpected", unexpected), ("of another size", sizes)):
        if keys:
            shown = keys if len(keys) <= 3 else [*keys[:3], "..."]
            problems.append(f"{len(keys)} {title}: {', '.join(shown)}")
    if problems:
        raise UserError(
            f"{files.weights} does not fit {files.config}: {'; '.join(problems)}. Get both as "
            "checkpoint/README.md says."
        )
    return values


def weights_file(folder: Path) -> Path:
    """The file of weights in a model's folder from the Hub, whether or not it exists."""
    file, other = folder / "model.safetensors", folder / "pytorch_model.bin"
    return other if other.exists() and not file.exists() else file


def model_files(folder: Path, source: str) -> dict[Path, str]:
    """Configuration and weights in a model's folder, and where they are published."""
    return dict.fromkeys((folder / "config.json", weights_file(folder)), source)


def tokenizer_files(folder: Path, source: str) -> dict[Path, str]:
    """The files of CLIP's tokenizer in `folder`, and where they are published."""
    return dict.fromkeys((folder / "vocab.json", folder / "merges.txt"), source)

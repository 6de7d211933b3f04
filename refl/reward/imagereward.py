"""ImageReward (Xu et al. 2023, arXiv 2304.05977) on transformers' BLIP classes, from the published files.

    scorer = imagereward.load("checkpoint")
    scorer.score("a red fox", "fox.png")             # the published score of an image
    scorer.rank("a red fox", ["1.png", "2.png"])     # places, 1 is the best, and scores
    scorer(images, prompts)                          # tensors in [0, 1]; differentiable

    python -m refl score "a red fox" *.png           # the same as a table

A BLIP vision tower encodes the image, a BERT with cross-attention to the image encodes the prompt, and a
linear head turns the feature of the first token into a score. `ImageReward.pt` is loaded as published: only
its keys are renamed. Files in the same format at other sizes load as well: sizes are read from the shapes of
the weights, and heads, activation and normalisation of the score from `med_config.json`, where keys that the
published file lacks default to the published values.
"""

import logging
import math
import re
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from textwrap import shorten

from refl.reward.contract import RewardSpec
from refl.reward.preprocessing import preprocess, preprocess_pil
from refl.reward.scorer import Scorer, check_prompts
from refl.system.errors import UserError, is_first_process
from refl.system.reading import Count, Positive, check_folder, exists, read_object
from refl.system.weights import read_weights

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import (
    BatchEncoding,
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

MAX_TOKENS = 35  # longer prompts are cut here, as published
# Indices of the linear layers in `mlp.layers`; the dropouts between them are inactive.
HEAD_LAYERS = (0, 2, 4, 6, 7)
# The published normalisation of the head's output.
SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072

# Published keys and ours. "#" is a number, "*" the rest of the key.
KEYS = (
    ("blip.visual_encoder.cls_token", "vision.embeddings.class_embedding"),
    ("blip.visual_encoder.pos_embed", "vision.embeddings.position_embedding"),
    ("blip.visual_encoder.patch_embed.proj.*", "vision.embeddings.patch_embedding.*"),
    ("blip.visual_encoder.blocks.#.norm#.*", "vision.encoder.layers.#.layer_norm#.*"),
    ("blip.visual_encoder.blocks.#.attn.qkv.*", "vision.encoder.layers.#.self_attn.qkv.*"),
    ("blip.visual_encoder.blocks.#.attn.proj.*", "vision.encoder.layers.#.self_attn.projection.*"),
    ("blip.visual_encoder.blocks.#.mlp.*", "vision.encoder.layers.#.mlp.*"),
    ("blip.visual_encoder.norm.*", "vision.post_layernorm.*"),
    ("blip.text_encoder.*", "text.*"),
    ("mlp.layers.*", "head.*"),
)
PUBLISHED = tuple((ours, published) for published, ours in KEYS)
# Types of the entries of med_config.json that are used.
MED_CONFIG = {
    "hidden_act": str,
    "layer_norm_eps": Positive,
    "num_attention_heads": Count,
    "score_mean": float,
    "score_std": Positive,
    "vision_hidden_act": str,
    "vision_image_size": Count,
    "vision_layer_norm_eps": Positive,
    "vision_num_attention_heads": Count,
    "vision_patch_size": Count,
}
# Keys whose shapes determine the sizes of the model.
SIZING_KEYS = (
    "vision.embeddings.position_embedding",
    "vision.embeddings.patch_embedding.weight",
    "vision.encoder.layers.0.mlp.fc1.weight",
    "text.embeddings.word_embeddings.weight",
    "text.embeddings.position_embeddings.weight",
    "text.encoder.layer.0.intermediate.dense.weight",
    *(f"head.{layer}.weight" for layer in HEAD_LAYERS),
)
UNUSED_KEYS = re.compile(r"^blip\.(text_encoder\.embeddings\.position_ids$|vision_proj\.|text_proj\.)")


# -------------------------------------------------------------------------------------------------- the model


class VisionAttention(BlipAttention):
    """BLIP's self-attention by torch's fused kernel, which saves no (tokens x tokens) matrix for backward."""

    def forward(self, hidden_states: Tensor, **_) -> tuple[Tensor, None]:  # (B, tokens, width)
        states = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = states.permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(query, key, value)  # (B, heads, tokens, head width)
        return self.projection(context.transpose(1, 2).flatten(2)), None


class TextAttention(BlipTextSelfAttention):
    """The text tower's self-attention or cross-attention by the same kernel."""

    def forward(
        self,
        hidden_states: Tensor,  # (B, tokens, width)
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,  # (B, image tokens, image width)
        **_,
    ) -> tuple[Tensor, None]:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            states.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for states in (self.query(hidden_states), self.key(source), self.value(source))
        )
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return context.transpose(1, 2).flatten(2), None


class ImageReward(Scorer):
    """Human-preference score of an image for a prompt; differentiable in the image.

    `head_widths`: output widths of the head's linear layers; the last one is 1.
    """

    def __init__(
        self,
        vision_config: BlipVisionConfig,
        text_config: BlipTextConfig,
        tokenizer: BertTokenizer,
        head_widths: tuple[int, ...] = (1024, 128, 64, 16, 1),
        score_mean: float = SCORE_MEAN,
        score_std: float = SCORE_STD,
    ):
        super().__init__()
        self.vision = BlipVisionModel(vision_config)
        for layer in self.vision.encoder.layers:
            layer.self_attn = VisionAttention(vision_config)
        self.text = BlipTextModel(text_config, add_pooling_layer=False)
        for layer in self.text.encoder.layer:
            layer.attention.self = TextAttention(text_config, is_cross_attention=False)
            layer.crossattention.self = TextAttention(text_config, is_cross_attention=True)
        self.head = nn.Sequential(*(nn.Identity() for _ in range(HEAD_LAYERS[-1] + 1)))
        width = text_config.hidden_size
        for layer, head_width in zip(HEAD_LAYERS, head_widths, strict=True):
            self.head[layer] = nn.Linear(width, head_width)
            width = head_width
        self.tokenizer = tokenizer
        self.score_mean, self.score_std = score_mean, score_std
        self.image_size = vision_config.image_size
        self.has_warned_of_cut = False

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.head[0].weight.device

    def preprocess(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B, 3, image_size, image_size)."""
        return preprocess(images, self.image_size)

    def preprocess_pil(self, image: Image.Image | str | PathLike) -> Tensor:
        """A PIL image or an image file -> (1, 3, image_size, image_size), bit for bit as published."""
        return preprocess_pil(image, self.image_size)

    def features(self, images: Tensor) -> Tensor:
        """The vision tower's first token for images (B, 3, H, W) in [0, 1], (B, width) float32, of length
        1."""
        pixels = self.preprocess(images).to(self.vision.dtype)
        return F.normalize(self.vision(pixels).last_hidden_state[:, 0].float(), dim=-1)

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores, (B,) float32, of preprocessed images (B, 3, image_size, image_size)."""
        check_prompts(len(pixels), prompts)
        tokens = self.tokenize(prompts).to(pixels.device, non_blocking=True)
        # Added to the attention scores, (B, 1, 1, tokens). transformers would look for zeros in a mask of two
        # dimensions, which makes the CPU wait for the GPU.
        mask = tokens.attention_mask
        padding = torch.zeros_like(mask, dtype=self.text.dtype).masked_fill(mask == 0, -math.inf)
        hidden = self.text(
            input_ids=tokens.input_ids,
            attention_mask=padding[:, None, None],
            encoder_hidden_states=self.vision(pixels.to(self.vision.dtype)).last_hidden_state,
        ).last_hidden_state  # (B, tokens, width)
        with torch.autocast(pixels.device.type, enabled=False):
            score = self.head(hidden[:, 0].to(self.head[0].weight.dtype)).squeeze(-1)
        return (score - self.score_mean) / self.score_std

    def tokenize(self, prompts: Sequence[str]) -> BatchEncoding:
        """Ids and mask, (B, 35). Warns of the first prompt that is cut."""
        prompts = list(prompts)
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS)
        if not self.has_warned_of_cut and is_first_process():
            self._warn_of_cut(prompts, tokens.attention_mask)
        return tokens.convert_to_tensors("pt")

    def _warn_of_cut(self, prompts: list[str], masks: list[list[int]]) -> None:
        for prompt, mask in zip(prompts, masks, strict=True):
            if all(mask) and (length := len(self.tokenizer(prompt).input_ids)) > MAX_TOKENS:
                logging.getLogger(__name__).warning(
                    f"ImageReward reads the first {MAX_TOKENS} tokens of a prompt, as published. This prompt "
                    f"has {length}; others are cut without a warning: {shorten(prompt, 80)}"
                )
                self.has_warned_of_cut = True
                return


# ---------------------------------------------------------------------------------------------------- loading


def load(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> ImageReward:
    """ImageReward from a folder with ImageReward.pt (or .safetensors), med_config.json and
    bert-base-uncased/, or from such a file with the other two beside it; frozen.

    The towers are in `dtype`, the head and the score always in float32. Raises `UserError` for files that are
    damaged or belong to another model.
    """
    model, weights = _read(_weights_file(path))
    model.load_state_dict(weights, assign=True)
    positions = torch.arange(model.text.config.max_position_embeddings).expand((1, -1))
    # Not in the file, so still on meta.
    model.text.embeddings.position_ids = nn.Buffer(positions, persistent=False)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    return _freeze(model, dtype).to(device)


def load_empty(path: str | Path, dtype: torch.dtype = torch.float32) -> ImageReward:
    """As `load`, with all tensors on the meta device; reads no more of the weights than their shapes."""
    return _freeze(_read(_weights_file(path))[0], dtype)


def required_files(path: str | Path) -> dict[Path, str]:
    """Each file that `load` needs, and where it is published."""
    file = _weights_file(path)
    tokenizer = file.with_name("bert-base-uncased")
    return {
        file: "THUDM/ImageReward",
        file.with_name("med_config.json"): "THUDM/ImageReward",
        tokenizer / "vocab.txt" if exists(tokenizer) else tokenizer: "google-bert/bert-base-uncased",
    }


SPEC = RewardSpec(
    load,
    required_files,
    load_empty,
    default_target=2.0,  # as published
    scale="about -2 to 2, mean 0 over its training images",
)


def _weights_file(path: str | Path) -> Path:
    """The file of weights, given itself or its folder; whether or not it exists."""
    path = Path(path)
    if path.suffix in (".pt", ".safetensors"):
        return path
    file, other = path / "ImageReward.pt", path / "ImageReward.safetensors"
    return other if exists(other) and not exists(file) else file


def _freeze(model: ImageReward, dtype: torch.dtype) -> ImageReward:
    model.requires_grad_(False).eval()
    model.vision.to(dtype)
    model.text.to(dtype)
    model.head.float()
    return model


def _read(file: Path) -> tuple[ImageReward, dict[str, Tensor]]:
    """A model on the meta device that fits `file`, and the weights under its keys. Raises `UserError`."""
    weights = _rename(read_weights(file), KEYS)
    med_config_file, tokenizer_folder = file.with_name("med_config.json"), file.with_name("bert-base-uncased")
    tokenizer = load_tokenizer(tokenizer_folder)
    med_config = read_object(med_config_file, MED_CONFIG)
    if missing := [key for key in SIZING_KEYS if key not in weights]:
        unexpected = [key for key in weights if not re.match(r"(vision|text|head)\.", key)]
        raise _not_imagereward(file, missing, unexpected)
    try:
        vision_config, text_config = _configs(weights, med_config)
        head_widths = tuple(weights[f"head.{layer}.weight"].shape[0] for layer in HEAD_LAYERS)
        normalisation = med_config.get("score_mean", SCORE_MEAN), med_config.get("score_std", SCORE_STD)
        with torch.device("meta"):  # no random initialisation of weights that will be replaced
            model = ImageReward(vision_config, text_config, tokenizer, head_widths, *normalisation)
    except Exception as error:  # files of another model raise many kinds: keys, types, impossible sizes
        raise UserError(
            f"{file} and {med_config_file.name} are not those of an ImageReward model "
            f"({type(error).__name__}: {error}). Get both from THUDM/ImageReward on the Hugging Face Hub."
        ) from error
    expected = model.state_dict()
    shapes = {
        key: f"{tuple(weights[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in weights and weights[key].shape != expected[key].shape
    }
    if expected.keys() != weights.keys() or shapes:
        missing, unexpected = expected.keys() - weights.keys(), weights.keys() - expected.keys()
        raise _not_imagereward(file, missing, unexpected, shapes)
    if len(tokenizer) != text_config.vocab_size:  # transformers creates an empty one from an empty folder
        raise UserError(
            f"{tokenizer_folder} does not fit {file.name}: {len(tokenizer)} tokens instead of "
            f"{text_config.vocab_size}. vocab.txt, tokenizer.json and tokenizer_config.json of "
            "google-bert/bert-base-uncased belong in that folder."
        )
    return model, weights


def load_tokenizer(folder: str | Path) -> BertTokenizer:
    """BERT's tokenizer with the two tokens that BLIP adds; `[CLS]` stays first, as in the published
    scorer."""
    check_folder(folder)
    try:
        tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer("a", padding="max_length", truncation=True, max_length=MAX_TOKENS)
    except Exception as error:  # the tokenizers library raises plain Exception for files it cannot parse
        raise UserError(f"{folder} contains no readable BERT tokenizer ({error}).") from error
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    return tokenizer


def published_state_dict(model: ImageReward) -> dict[str, Tensor]:
    """The weights under the keys of the published `ImageReward.pt`."""
    return _rename(model.state_dict(), PUBLISHED)


def _not_imagereward(
    file: Path, missing: Iterable[str], unexpected: Iterable[str], shapes: dict[str, str] | None = None
) -> UserError:
    """The error for weights that do not fit, by the names in the file."""
    problems = []
    for title, keys in (
        ("missing", dict.fromkeys(missing, "")),
        ("unexpected", dict.fromkeys(unexpected, "")),
        ("of another size", shapes or {}),
    ):
        names = [f"{key} {note}".strip() for key, note in sorted(_rename(keys, PUBLISHED).items())]
        if names:
            shown = names if len(names) <= 3 else [*names[:3], "..."]
            problems.append(f"{len(names)} {title}: {', '.join(shown)}")
    return UserError(
        f"{file} is not an ImageReward model that fits med_config.json: {'; '.join(problems)}. "
        "Get both from THUDM/ImageReward on the Hugging Face Hub."
    )


def _rename(weights: dict[str, Tensor], keys: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """Rename each key of `weights` by the first (source, target) in `keys` whose source matches; drop unused
    ones."""
    rules = []
    for source, target in keys:
        pattern = re.escape(source).replace(r"\#", r"(\d+)").replace(r"\*", r"(.+)")
        rules.append((re.compile(pattern), re.sub(r"[#*]", "{}", target)))
    renamed = {}
    for key, value in weights.items():
        if not UNUSED_KEYS.match(key):
            matches = ((pattern.fullmatch(key), target) for pattern, target in rules)
            renamed[next((target.format(*match.groups()) for match, target in matches if match), key)] = value
    return renamed


def _configs(weights: dict[str, Tensor], med_config: dict) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """Configurations by the shapes of the weights, and for the rest by `med_config` or as published."""
    _, num_positions, vision_width = weights["vision.embeddings.position_embedding"].shape
    patch_size = weights["vision.embeddings.patch_embedding.weight"].shape[-1]
    vision_config = BlipVisionConfig(
        hidden_size=vision_width,
        intermediate_size=weights["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_num_layers(weights, r"vision\.encoder\.layers\.(\d+)\."),
        num_attention_heads=med_config.get("vision_num_attention_heads", 16),
        image_size=med_config.get("vision_image_size", math.isqrt(num_positions - 1) * patch_size),
        patch_size=med_config.get("vision_patch_size", patch_size),
        hidden_act=med_config.get("vision_hidden_act", "gelu"),
        layer_norm_eps=med_config.get("vision_layer_norm_eps", 1e-6),
    )
    vocab_size, text_width = weights["text.embeddings.word_embeddings.weight"].shape
    text_config = BlipTextConfig(
        vocab_size=vocab_size,
        hidden_size=text_width,
        encoder_hidden_size=vision_width,  # the published `encoder_width` belongs to another model
        intermediate_size=weights["text.encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_num_layers(weights, r"text\.encoder\.layer\.(\d+)\."),
        num_attention_heads=med_config["num_attention_heads"],
        max_position_embeddings=weights["text.embeddings.position_embeddings.weight"].shape[0],
        hidden_act=med_config["hidden_act"],
        layer_norm_eps=med_config["layer_norm_eps"],
        bos_token_id=None,  # not used here; the default does not exist in a small vocabulary
        sep_token_id=None,
        is_decoder=True,  # creates the cross-attention layers; the forward pass stays bidirectional
    )
    return vision_config, text_config


def _num_layers(weights: dict[str, Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for key in weights if (match := re.match(pattern, key)))

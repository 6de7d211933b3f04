"""ImageReward (Xu et al. 2023, arXiv 2304.05977) on transformers' BLIP classes, from the published files.

A BLIP vision tower reads the picture, a BERT with cross attention reads the prompt while looking at the
picture, and a linear head turns the feature of the first token into a score. `ImageReward.pt` is loaded as
published: only its keys are renamed. Files that follow the same format at other sizes load as well: sizes are
read from the weights' shapes, and what shapes do not tell (heads, activation, normalisation of the score)
from `med_config.json`, where keys that the published file lacks default to the published values.
"""

import json
import math
import re
import zipfile
from pathlib import Path

from refl.errors import UserError

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

MAX_TOKENS = 35  # longer prompts are cut here, as published
# The linear layers among `mlp.layers`; the dropouts between them do nothing here.
HEAD_LAYERS = (0, 2, 4, 6, 7)
SCORE_MEAN, SCORE_STD = (
    0.16717362830052426,
    1.0333394966054072,
)  # published normalisation of the head's output
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, as BLIP uses them
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

# Published keys and ours. "#" stands for a number, "*" for the rest.
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
UNUSED_KEYS = re.compile(r"^blip\.(text_encoder\.embeddings\.position_ids$|vision_proj\.|text_proj\.)")


class ImageReward(nn.Module):
    """Human-preference score of a picture for a prompt; differentiable in the picture.

    `head_widths` are the output widths of the head's linear layers, the last one 1.
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
        self.text = BlipTextModel(text_config, add_pooling_layer=False)
        self.head = nn.Sequential(*(nn.Identity() for _ in range(HEAD_LAYERS[-1] + 1)))
        width = text_config.hidden_size
        for layer, head_width in zip(HEAD_LAYERS, head_widths, strict=True):
            self.head[layer] = nn.Linear(width, head_width)
            width = head_width
        self.tokenizer = tokenizer
        self.score_mean, self.score_std = score_mean, score_std
        self.image_size = vision_config.image_size

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores, (B,) float32, of images (B, 3, H, W) in [0, 1], any size, each for its own prompt."""
        pixels = preprocess(images, self.image_size).to(self.vision.dtype)  # (B, 3, S, S)
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(images.device)
        hidden = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=self.vision(pixels).last_hidden_state,
        ).last_hidden_state  # (B, tokens, width)
        with torch.autocast(images.device.type, enabled=False):
            score = self.head(hidden[:, 0].to(self.head[0].weight.dtype)).squeeze(-1)
        return (score - self.score_mean) / self.score_std


def preprocess(images: Tensor, size: int) -> Tensor:
    """Short side to `size`, centre crop, CLIP normalisation: (B, 3, H, W) in [0, 1] -> (B, 3, size, size),
    float32 at least.

    The resize is antialiased: without it most of the gradient's energy lies above what `size` pixels can
    carry.
    """
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    if scale != 1:
        resized = (int(height * scale + 1e-6), int(width * scale + 1e-6))
        images = F.interpolate(images, size=resized, mode="bicubic", antialias=True, align_corners=False)
    top, left = (round((side - size) / 2) for side in images.shape[-2:])
    images = images[..., top : top + size, left : left + size]
    mean, std = (torch.tensor(stat, device=images.device).view(3, 1, 1) for stat in (PIXEL_MEAN, PIXEL_STD))
    return (images - mean) / std


def load_tokenizer(folder: str | Path) -> BertTokenizer:
    """BERT's tokenizer with the two tokens that BLIP adds; `[CLS]` stays first, as in the published
    scorer."""
    try:
        tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception for files it cannot parse
        raise UserError(f"{folder} holds no tokenizer of BERT that can be read ({error}).") from error
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    return tokenizer


def load(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> ImageReward:
    """ImageReward from `folder`/{ImageReward.pt, med_config.json, bert-base-uncased/}, frozen.

    The towers are in `dtype`, the head and the score always in float32. Raises `UserError` for files that are
    damaged or are something else.
    """
    folder = Path(folder)
    weights = _rename(read_weights(folder / "ImageReward.pt"), KEYS)
    tokenizer = load_tokenizer(folder / "bert-base-uncased")
    try:
        med_config = json.loads((folder / "med_config.json").read_text())
        vision_config, text_config = _configs(weights, med_config)
        head_widths = tuple(weights[f"head.{layer}.weight"].shape[0] for layer in HEAD_LAYERS)
        score_mean, score_std = (
            med_config.get("score_mean", SCORE_MEAN),
            med_config.get("score_std", SCORE_STD),
        )
        with torch.device("meta"):  # no random initialisation of weights that are about to be replaced
            model = ImageReward(vision_config, text_config, tokenizer, head_widths, score_mean, score_std)
    except (
        Exception
    ) as error:  # whatever a foreign file makes of it: keys, types, sizes that no model can have
        raise UserError(
            f"{folder}: ImageReward.pt and med_config.json are not those of an ImageReward model "
            f"({type(error).__name__}: {error}). Get both from THUDM/ImageReward on the Hugging Face Hub."
        ) from error
    if len(tokenizer) != text_config.vocab_size:  # transformers makes an empty one of an empty folder
        raise UserError(
            f"{folder / 'bert-base-uncased'} does not fit ImageReward.pt: {len(tokenizer)} tokens instead of "
            f"{text_config.vocab_size}. vocab.txt, tokenizer.json and tokenizer_config.json of "
            "google-bert/bert-base-uncased belong there."
        )
    expected = model.state_dict()
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    wrong = [key for key in expected.keys() & weights.keys() if expected[key].shape != weights[key].shape]
    if missing or unexpected or wrong:
        raise UserError(
            f"{folder / 'ImageReward.pt'} does not fit med_config.json: "
            f"missing {missing[:3]}, unexpected {unexpected[:3]}, of another shape {sorted(wrong)[:3]}."
        )
    model.load_state_dict(weights, assign=True)
    positions = torch.arange(text_config.max_position_embeddings).expand((1, -1))
    model.text.embeddings.position_ids = nn.Buffer(
        positions, persistent=False
    )  # not in the file, so still on meta
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    model.requires_grad_(False).eval()
    model.vision.to(dtype)
    model.text.to(dtype)
    model.head.float()
    return model.to(device)


def published_state_dict(model: ImageReward) -> dict[str, Tensor]:
    """The model's weights under the keys of the published `ImageReward.pt`."""
    return _rename(model.state_dict(), tuple((ours, published) for published, ours in KEYS))


def read_weights(path: Path) -> dict[str, Tensor]:
    """A file of tensors and nothing else, memory-mapped where its format allows; raises `UserError`."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # the unpickler and the zip reader raise many kinds
        raise UserError(
            f"{path} is damaged or is not a file of weights ({type(error).__name__}). "
            "Copy it again from its source."
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} holds something other than a table of weights.")
    return weights


def _rename(weights: dict[str, Tensor], keys: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """`weights` under the target of the first source in `keys` that a key matches, unused ones left out."""
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
    """Sizes from the weights' shapes; what shapes do not tell from `med_config`, or as published."""
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
        encoder_hidden_size=vision_width,  # the published `encoder_width` is another model's
        intermediate_size=weights["text.encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_num_layers(weights, r"text\.encoder\.layer\.(\d+)\."),
        num_attention_heads=med_config["num_attention_heads"],
        max_position_embeddings=weights["text.embeddings.position_embeddings.weight"].shape[0],
        hidden_act=med_config["hidden_act"],
        layer_norm_eps=med_config["layer_norm_eps"],
        bos_token_id=None,  # not used here; the default does not exist in a small vocabulary
        sep_token_id=None,
        is_decoder=True,  # creates the cross-attention layers; the forward pass is bidirectional all the same
    )
    return vision_config, text_config


def _num_layers(weights: dict[str, Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for key in weights if (match := re.match(pattern, key)))

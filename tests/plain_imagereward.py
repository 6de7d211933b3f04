"""The published scorer in plain tensor algebra, on the published file's own keys.

ViT (Dosovitskiy et al. 2021), BERT with cross attention (BLIP, Li et al. 2022), a linear head. Slow and
obvious: what ours is held against.
"""

from torch import Tensor, cat
from torch.nn.functional import gelu

SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072


def plain_score(
    weights: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor, vision_heads: int, text_heads: int
) -> Tensor:
    """Scores (B,) of preprocessed images (B, 3, S, S) for prompts as ids and mask (B, tokens)."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        variance, mean = x.var(-1, correction=0, keepdim=True), x.mean(-1, keepdim=True)
        return (x - mean) / (variance + eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, seen: Tensor | None = None) -> Tensor:
        outputs = []
        for q, k, v in zip(*(x.chunk(heads, dim=-1) for x in (query, key, value)), strict=True):
            logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
            if seen is not None:
                logits = logits.masked_fill(seen[:, None] == 0, -float("inf"))
            outputs.append(logits.softmax(-1) @ v)
        return cat(outputs, dim=-1)

    # image -> (B, 1 + patches, width)
    name = "blip.visual_encoder"
    kernel = weights[f"{name}.patch_embed.proj.weight"]
    side = kernel.shape[-1]
    patches = (
        pixels.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    )
    x = patches @ kernel.flatten(1).T + weights[f"{name}.patch_embed.proj.bias"]
    x = cat([weights[f"{name}.cls_token"].expand(len(x), -1, -1), x], dim=1) + weights[f"{name}.pos_embed"]
    for block in range(count(weights, f"{name}.blocks.")):
        prefix = f"{name}.blocks.{block}"
        query, key, value = linear(norm(x, f"{prefix}.norm1", 1e-6), f"{prefix}.attn.qkv").chunk(3, dim=-1)
        x = x + linear(attend(query, key, value, vision_heads), f"{prefix}.attn.proj")
        x = x + linear(
            gelu(linear(norm(x, f"{prefix}.norm2", 1e-6), f"{prefix}.mlp.fc1")), f"{prefix}.mlp.fc2"
        )
    image = norm(x, f"{name}.norm", 1e-6)

    # prompt, looking at the image -> (B, tokens, width)
    name = "blip.text_encoder.embeddings"
    x = weights[f"{name}.word_embeddings.weight"][ids]
    x = x + weights[f"{name}.position_embeddings.weight"][: ids.shape[1]]
    x = norm(x, f"{name}.LayerNorm", 1e-12)
    for layer in range(count(weights, "blip.text_encoder.encoder.layer.")):
        prefix = f"blip.text_encoder.encoder.layer.{layer}"
        for attention, source, seen in (("attention", None, mask), ("crossattention", image, None)):
            one = f"{prefix}.{attention}"
            source = x if source is None else source
            query = linear(x, f"{one}.self.query")
            key, value = linear(source, f"{one}.self.key"), linear(source, f"{one}.self.value")
            attended = linear(attend(query, key, value, text_heads, seen), f"{one}.output.dense")
            x = norm(x + attended, f"{one}.output.LayerNorm", 1e-12)
        wide = gelu(linear(x, f"{prefix}.intermediate.dense"))
        x = norm(x + linear(wide, f"{prefix}.output.dense"), f"{prefix}.output.LayerNorm", 1e-12)

    # the first token, [CLS] -> score
    x = x[:, 0]
    for layer in (0, 2, 4, 6, 7):
        x = linear(x, f"mlp.layers.{layer}")
    return (x[:, 0] - SCORE_MEAN) / SCORE_STD


def count(weights: dict[str, Tensor], prefix: str) -> int:
    """How many numbered things follow `prefix` in the keys."""
    return len({key.removeprefix(prefix).split(".")[0] for key in weights if key.startswith(prefix)})

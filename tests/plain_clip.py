"""CLIP in plain tensor algebra, on open_clip's own keys: what ours is held against.

ViT and causal text transformer, pre-norm (Radford et al. 2021). Slow and obvious.
"""

from torch import Tensor, cat, inf, ones
from torch.nn.functional import gelu


def embed_image(weights: dict[str, Tensor], pixels: Tensor, heads: int) -> Tensor:
    """Embeddings (B, width) of length 1 of preprocessed images (B, 3, S, S)."""
    kernel = weights["visual.conv1.weight"]
    side = kernel.shape[-1]
    patches = pixels.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(3)
    x = patches.flatten(1, 2) @ kernel.flatten(1).T
    x = cat([weights["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = norm(weights, x + weights["visual.positional_embedding"], "visual.ln_pre")
    x = transformer(weights, x, "visual.transformer.resblocks.", heads, is_causal=False)
    return unit(norm(weights, x[:, 0], "visual.ln_post") @ weights["visual.proj"])


def embed_prompt(weights: dict[str, Tensor], ids: list[int], heads: int) -> Tensor:
    """Embedding (1, width) of length 1 of a prompt's ids, from its start to its end and not further."""
    x = weights["token_embedding.weight"][ids][None] + weights["positional_embedding"][: len(ids)]
    x = transformer(weights, x, "transformer.resblocks.", heads, is_causal=True)
    return unit(norm(weights, x[:, -1], "ln_final") @ weights["text_projection"])


def transformer(weights: dict[str, Tensor], x: Tensor, prefix: str, heads: int, is_causal: bool) -> Tensor:
    """All blocks under `prefix`, (B, tokens, width) -> the same."""
    later = ones(x.shape[1], x.shape[1]).triu(1).bool() if is_causal else None
    num_blocks = len({key.removeprefix(prefix).split(".")[0] for key in weights if key.startswith(prefix)})
    for block in (f"{prefix}{index}" for index in range(num_blocks)):
        joint = norm(weights, x, f"{block}.ln_1") @ weights[f"{block}.attn.in_proj_weight"].T
        outputs = []
        for q, k, v in zip(
            *(part.chunk(heads, -1) for part in (joint + weights[f"{block}.attn.in_proj_bias"]).chunk(3, -1)),
            strict=True,
        ):
            logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
            logits = logits if later is None else logits.masked_fill(later, -inf)
            outputs.append(logits.softmax(-1) @ v)
        x = x + linear(weights, cat(outputs, -1), f"{block}.attn.out_proj")
        hidden = gelu(linear(weights, norm(weights, x, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
        x = x + linear(weights, hidden, f"{block}.mlp.c_proj")
    return x


def linear(weights: dict[str, Tensor], x: Tensor, name: str) -> Tensor:
    """A linear layer."""
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights: dict[str, Tensor], x: Tensor, name: str) -> Tensor:
    """Layer normalisation."""
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1."""
    return x / x.norm(dim=-1, keepdim=True)

"""Text conditioning of a batch of samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from refl.system import devices

import torch
from torch import Tensor

Embeds = dict[str, Tensor]  # text embeddings by the names under which the model's family takes them


@dataclass
class Conditioning:
    """Text embeddings of B samples: each prompt's and, where guidance is used, the empty prompt's."""

    prompt: Embeds  # each (B, ...); Stable Diffusion: encoder_hidden_states (B, tokens, width)
    empty: Embeds | None = None

    @classmethod
    def stack(cls, prompts: Sequence[Embeds], empty: Embeds | None = None) -> "Conditioning":
        """Conditioning of B samples from each prompt's embeddings, without a batch dimension."""
        prompt = {name: torch.stack([embeds[name] for embeds in prompts]) for name in prompts[0]}
        if empty is not None:
            empty = {name: value.expand_as(prompt[name]) for name, value in empty.items()}
        return cls(prompt, empty)

    @classmethod
    def cat(cls, parts: Sequence["Conditioning"]) -> "Conditioning":
        """One batch of several."""
        empty = [part.empty for part in parts if part.empty is not None]
        return cls(cat_embeds([part.prompt for part in parts]), cat_embeds(empty) if empty else None)

    def __getitem__(self, samples: slice) -> "Conditioning":
        """Conditioning of some of the samples."""
        return self._map(lambda tensor: tensor[samples])

    def to(self, device: torch.device) -> "Conditioning":
        """The same on `device`; a GPU copies it asynchronously."""
        return self._map(lambda tensor: devices.send(tensor, device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Conditioning":
        prompt, empty = (
            embeds and {name: function(tensor) for name, tensor in embeds.items()}
            for embeds in (self.prompt, self.empty)
        )
        return Conditioning(prompt, empty)


def cat_embeds(parts: Sequence[Embeds]) -> Embeds:
    """Embeddings of several batches, one after the other."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

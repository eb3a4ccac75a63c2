"""What a model keeps of the tokens that it has read, so that each is read once."""

import torch
from torch import Tensor, nn

from stepline.models.config import CANON_TAPS, ModelConfig


class KVCache:
    """Keys and values of the tokens that a model has read, for all its layers; their memory is taken at once.

    `Transformer.forward` appends the tokens that it reads.
    """

    def __init__(
        self, config: ModelConfig, capacity: int, batch: int = 1, *, device: torch.device, dtype: torch.dtype
    ):
        """capacity: tokens of a sequence; dtype: of the model's weights."""
        shape = (config.num_layers, 2, batch, config.kv_heads, capacity, config.dim_per_head)
        self.stored = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0
        """Tokens read; 0 forgets them."""
        self.last: dict[nn.Module, Tensor] = {}
        """The last inputs of each Canon layer, `[batch, 3, dim]`."""

    def layers(self) -> list["LayerCache"]:
        """Each layer's part."""
        return [LayerCache(self, i) for i in range(len(self.stored))]


class LayerCache:
    """One layer's part of a cache."""

    def __init__(self, cache: KVCache, layer: int):
        self.cache, self.stored = cache, cache.stored[layer]

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Takes keys and values of new tokens, `[batch, kv_heads, seq, head_dim]` each; gives those of all tokens so
        far. Raises ValueError where there is no room."""
        start = self.cache.length
        end = start + keys.shape[2]
        if end > self.stored.shape[3]:
            raise ValueError(f"a cache of {self.stored.shape[3]} tokens cannot hold {end}")
        for stored, new in zip(self.stored, (keys, values), strict=True):
            stored[:, :, start:end] = new
        return tuple(self.stored[:, :, :, :end])

    def before(self, canon: nn.Module, x: Tensor) -> Tensor:
        """The inputs ahead of `x` `[batch, seq, dim]`, its next ones: `[batch, 3, dim]`, zeros ahead of the first."""
        early = self.cache.last.get(canon) if self.cache.length else None
        if early is None:
            early = x.new_zeros(x.shape[0], CANON_TAPS - 1, x.shape[2])
        self.cache.last[canon] = torch.cat((early, x), 1)[:, -(CANON_TAPS - 1) :].clone()
        return early

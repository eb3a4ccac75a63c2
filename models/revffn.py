"""Reversible transformer blocks of two streams (RevFFN, arXiv 2512.20920).

With n a norm, for streams X1 and X2 of half the hidden width each:

    coupling exact     Y1 = X1 + Attn(n X2)              Y2 = X2 + FFN(n Y1)
    coupling revffn    Y1 = X1 + Attn(q: n X1, kv: n X2)  Y2 = X2 + FFN(n Y1)

Streams are in fp32 (float64 where the weights are), what a branch reads is cast to its weights' type after the norm.
Canon layers follow the norms of X2 (A) and of Y1 (C). With adapters, Attn and FFN are P_down . Attn . P_up and
P_down . FFN . P_up at the full hidden width.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from stepline.kernels.rms_norm import rms_norm
from stepline.models.attention import Attention
from stepline.models.cache import LayerCache
from stepline.models.canon import make_canon, mix
from stepline.models.config import ModelConfig, RevFFNConfig
from stepline.models.ffn import SwiGLU
from stepline.models.norm import RMSNorm
from stepline.models.reversible import Chain, Half, Streams


def inner_config(config: ModelConfig) -> ModelConfig:
    """The shape of the attention and feed-forward layers inside of a reversible block."""
    return config.model_copy(
        update={"hidden_size": config.inner_size, "head_dim": config.dim_per_head, "blocks": "standard"}
    )


def streams_of(config: RevFFNConfig) -> Streams:
    """Arithmetic of the streams; its `limit()` is what `stream_max` must stay below."""
    return Streams(config.grid_bits if config.streams == "grid" else None)


def norm_cast(norm: RMSNorm, x: Tensor) -> Tensor:
    """The norm of a stream in the stream's type, then cast to the weights'; `[..., dim]`.

    Under mixed precision the weights have the compute type, and a norm in fp32 wants its own in fp32.
    """
    return rms_norm(x, norm.weight.to(x.dtype), norm.eps).to(norm.weight.dtype)


class RevBlock(nn.Module):
    """A reversible pair of halves, attention and feed-forward.

    Args:
        config: of the whole model.
        make_ffn: called with `inner_config(config)`; makes the module called as `ffn(x, *routing)`, from and to
            `[batch, seq, width]`. If it has `record()` and `replay(object)`, context managers, what the first
            forward's `record` yielded is given to `replay` around the recompute, where it must count nothing.
    """

    def __init__(self, config: ModelConfig, make_ffn: Callable[[ModelConfig], nn.Module] = SwiGLU):
        super().__init__()
        inner, width, full = inner_config(config), config.hidden_size // 2, config.hidden_size
        adapters = config.revffn.adapters

        def adapter(n_in: int, n_out: int) -> nn.Module:
            return nn.Linear(n_in, n_out, bias=False) if adapters else nn.Identity()

        self.attn_norm = RMSNorm(width, config.norm_eps)
        self.attn_kv_norm = RMSNorm(width, config.norm_eps) if config.coupling == "revffn" else None
        self.attn_up, self.attn_down = adapter(width, full), adapter(full, width)
        self.attn_canon = make_canon(config, "A", width)
        self.attn = Attention(inner)
        self.ffn_norm = RMSNorm(width, config.norm_eps)
        self.ffn_up, self.ffn_down = adapter(width, full), adapter(full, width)
        self.ffn_canon = make_canon(config, "C", width)
        self.ffn = make_ffn(inner)
        self.streams = streams_of(config.revffn)
        self.iterations = config.revffn.iterations if config.coupling == "revffn" else 0
        self.stream_max: Tensor | None = None
        """Largest |value| of the streams, 0-dim, since `take_max`; only on a grid."""
        self.residual: Tensor | None = None
        """Largest residual of the fixed point, 0-dim, since `take_max`; only of coupling revffn, set in backward."""

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        chain: Chain | None,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        *routing: Any,
        positions: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Streams after the block.

        Args:
            x1, x2: `[batch, seq, hidden / 2]`, in at least fp32, on the grid if there is one.
            chain: of this forward; None: backward stores activations (the reference, bit-equal on a grid).
            cos, sin, mask, cache: as in `Attention`; a cache makes no backward.
            routing: further arguments of the feed-forward layer.
            positions: as in `Canon`.
        """
        near = {"positions": positions, "cache": cache}
        attend = functools.partial(self._attend, cos=cos, sin=sin, mask=mask, **near)
        attention = Half(attend, self.streams, iterations=self.iterations, on_residual=self._note_residual)
        feed = Half(functools.partial(self._feed, routing=routing, **near), self.streams, routed=self.ffn)
        if chain is None or not torch.is_grad_enabled():
            y1 = attention.plain(x1, x2)
            y2 = feed.plain(x2, y1)
        else:
            y1 = chain.run(attention, x1, x2)
            y2 = chain.run(feed, x2, y1)
        if self.streams.bits is not None:
            for y in (y1, y2):
                low, high = y.detach().aminmax()  # a tenth of the time of an infinity norm
                self.stream_max = _maximum(self.stream_max, torch.maximum(high, -low))
        return y1, y2

    def _attend(
        self, x1: Tensor, x2: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, positions: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:  # fmt: skip
        if self.attn_kv_norm is None:
            read = mix(self.attn_canon, norm_cast(self.attn_norm, x2), positions, cache)
            q, kv = self.attn_up(read), None
        else:
            q = self.attn_up(norm_cast(self.attn_norm, x1))
            kv = self.attn_up(norm_cast(self.attn_kv_norm, x2))
        return self.attn_down(self.attn(q, cos, sin, mask, kv, cache))

    def _feed(
        self, _x2: Tensor, y1: Tensor, routing: tuple, positions: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        read = mix(self.ffn_canon, norm_cast(self.ffn_norm, y1), positions, cache)
        return self.ffn_down(self.ffn(self.ffn_up(read), *routing))

    def _note_residual(self, residual: Tensor) -> None:
        self.residual = _maximum(self.residual, residual)


def _maximum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else torch.maximum(a, b)


def take_max(layers: Iterable[RevBlock], name: str) -> Tensor | None:
    """The largest `stream_max` or `residual` of these blocks since the last call, 0-dim on the device, or None."""
    largest = None
    for layer in layers:
        if (value := getattr(layer, name)) is not None:
            largest = _maximum(largest, value)
            setattr(layer, name, None)
    return largest


def run_reversible(
    layers: Iterable[nn.Module],
    x: Tensor,
    config: RevFFNConfig,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None = None,
    *routing: Any,
    stored: bool = False,
    positions: Tensor | None = None,
    caches: Iterable[LayerCache | None] = itertools.repeat(None),
) -> Tensor:
    """Splits `x` into two streams, runs the blocks, and joins the streams.

    Args:
        layers: RevBlocks, wrapped or not.
        x: the embedding, `[batch, seq, hidden]`.
        config: `model.revffn`.
        cos, sin, mask: as in `Attention`; tables in at least fp32.
        routing: further arguments of the feed-forward layers.
        stored: backward by stored activations, same arithmetic: the reference.
        positions: as in `Canon`.
        caches: of each layer, as in `Attention`.

    Returns:
        `[batch, seq, hidden]` in the streams' type, for `norm_cast`.
    """
    # each stream is a tensor of its own: views of one would share a base with what hooks of the blocks return
    x1, x2 = (streams_of(config).enter(half.contiguous()) for half in x.chunk(2, -1))
    chain = None
    for i, (layer, cache) in enumerate(zip(layers, caches, strict=False)):
        if not stored and (chain is None or (config.anchor_every and i % config.anchor_every == 0)):
            chain = Chain()  # the one before keeps its last streams: an anchor
        x1, x2 = layer(x1, x2, chain, cos, sin, mask, *routing, positions=positions, cache=cache)
    return torch.cat((x1, x2), -1)

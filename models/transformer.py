"""A Llama-family decoder-only transformer (arXiv 2302.13971), of standard or of reversible blocks."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from stepline.kernels.cross_entropy import LossSums, linear_cross_entropy
from stepline.models.attention import (
    Attention,
    causal_mask,
    document_mask,
    document_positions,
    rope_tables,
)
from stepline.models.cache import KVCache, LayerCache
from stepline.models.canon import make_canon, mix
from stepline.models.config import ModelConfig
from stepline.models.ffn import SwiGLU
from stepline.models.moe import MoE, Routing
from stepline.models.norm import RMSNorm
from stepline.models.revffn import RevBlock, norm_cast, run_reversible


def make_ffn(config: ModelConfig) -> nn.Module:
    """The feed-forward layer that `config` asks for, of width `config.hidden_size`."""
    return MoE(config) if config.ffn == "moe" else SwiGLU(config)


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm feed-forward layer, each added to the residual stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn_canon = make_canon(config, "A", config.hidden_size)
        self.attn = Attention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn_canon = make_canon(config, "C", config.hidden_size)
        self.ffn = make_ffn(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, *routing: Routing,
        positions: Tensor | None = None, cache: LayerCache | None = None,
    ) -> Tensor:  # fmt: skip
        """`x` and result `[batch, seq, hidden]`; tables of `rope_tables`; mask and cache as in `Attention`; routing: of
        a MoE; positions as in `Canon`."""
        read = mix(self.attn_canon, self.attn_norm(x), positions, cache)
        x = x + self.attn(read, cos, sin, mask, cache=cache)
        return x + self.ffn(mix(self.ffn_canon, self.ffn_norm(x), positions, cache), *routing)


@contextlib.contextmanager
def _counting(moes: list[MoE]) -> Iterator[None]:
    """Within it these layers count; outside, where backward recomputes, they do not."""
    for moe in moes:
        moe.counting = True
    try:
        yield
    finally:
        for moe in moes:
            moe.counting = False


class Transformer(nn.Module):
    """Embedding, blocks, norm and head. Its buffers, those of experts' balance, all begin with zeros.

    The loss uses the head's weight directly: keep embedding, norm and head in the root's FSDP group.
    Weights are those of torch's constructors until `stepline.models.init` sets them.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config) if config.blocks == "standard" else RevBlock(config, make_ffn)
            for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = (
            None if config.tied_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, doc_ids: Tensor | None = None,
        loss_scale: Tensor | None = None, cache: KVCache | None = None,
    ) -> Tensor | LossSums:  # fmt: skip
        """Logits `[batch, seq, vocab]`, or with targets the sums of the loss over them.

        Args:
            tokens: `[batch, seq]` int64.
            targets: `[batch, seq]` int64, the token that follows each; -100 carries no loss. The loss to
                differentiate is `nll + config.z_loss * z`, times any constant.
            doc_ids: `[batch, seq]` integers; a run of equal ids is a document. Attention is confined to it
                and positions start again with it. Ids may not return later in a row.
            loss_scale: 0-dim, with targets: the constant that the loss is multiplied by before backward. The routers
                of experts then count, and backward adds their losses with the same factor.
            cache: holds the tokens before these, all of one document, and then these too.
        """
        x = self.embed(tokens)
        caches: list[LayerCache | None] = [None] * len(self.layers)
        within: Tensor | None = None  # positions, where they do not follow from a token's place in the row
        if doc_ids is None:
            past, seq, device = 0 if cache is None else cache.length, tokens.shape[1], tokens.device
            positions = torch.arange(past, past + seq, device=device)
            mask = causal_mask(seq, past + seq, device) if past and seq > 1 else None
            if cache is not None:
                caches = cache.layers()
        else:
            positions, mask = document_positions(doc_ids), document_mask(doc_ids)
            within = None if self.config.canon == "none" else positions
        # bf16 tables would round the angles' cosines to 8 bits; rotation is done in at least fp32
        cos, sin = rope_tables(self.config, positions, torch.promote_types(x.dtype, torch.float32))
        moes = [layer.ffn for layer in self.layers] if self.config.ffn == "moe" else []
        routing = [] if loss_scale is None or not moes else [Routing(targets != -100, loss_scale)]
        with _counting(moes):
            if self.config.blocks == "revffn":
                x = run_reversible(
                    self.layers,
                    x,
                    self.config.revffn,
                    cos,
                    sin,
                    mask,
                    *routing,
                    positions=within,
                    caches=caches,
                )
                x = norm_cast(self.norm, x)
            else:
                for layer, own in zip(self.layers, caches, strict=True):
                    x = layer(x, cos, sin, mask, *routing, positions=within, cache=own)
                x = self.norm(x)
        if cache is not None:
            cache.length += tokens.shape[1]
        weight = self.embed.weight if self.head is None else self.head.weight
        if targets is None:
            return nn.functional.linear(x, weight)
        return linear_cross_entropy(x, weight, targets, self.config.z_loss)

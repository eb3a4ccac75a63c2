"""Causal grouped-query attention with rotary position embedding."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepline.kernels.rotary import rotate
from stepline.models.cache import LayerCache
from stepline.models.config import ModelConfig, RopeScaling
from stepline.models.norm import RMSNorm


def rope_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Angular frequencies of RoPE, `[head_dim / 2]` in radians per token, float32.

    theta^(-2i/d) (arXiv 2104.09864, section 3.2.2), stretched as `rope_scaling` says (arXiv 2407.21783).
    """
    dim = config.dim_per_head
    freqs = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, device=device).float() / dim)
    if config.rope_scaling is None:
        return freqs
    if config.rope_scaling.type == "linear":
        return freqs / config.rope_scaling.factor
    return _llama3_frequencies(freqs, config.rope_scaling)


def _llama3_frequencies(freqs: Tensor, scaling: RopeScaling) -> Tensor:
    """High frequencies kept, low ones divided by `factor`, those between interpolated."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # same order of operations as transformers, whose fp32 roundings show at long contexts
    turns = scaling.original_context / (2 * math.pi / freqs)  # rotations within the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * freqs / scaling.factor + kept * freqs


def rope_tables(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tables of `rotate`, `[..., seq, 1, head_dim]` each, for `positions` `[..., seq]`.

    Recomputed in each forward: a few microseconds, and no buffer that `to_empty` would lose.
    """
    angles = (positions.unsqueeze(-1) * rope_frequencies(config, positions.device)).unsqueeze(-2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def document_positions(doc_ids: Tensor) -> Tensor:
    """Position of each token in its document, `[batch, seq]`; a document is a run of equal ids."""
    index = torch.arange(doc_ids.shape[1], device=doc_ids.device)
    starts = torch.zeros_like(doc_ids, dtype=torch.int64)
    starts[:, 1:] = index[1:] * (doc_ids[:, 1:] != doc_ids[:, :-1])
    return index - starts.cummax(dim=1).values


def document_mask(doc_ids: Tensor) -> Tensor:
    """True where a query may see a key: same document, not later. `[batch, 1, seq, seq]`."""
    same = doc_ids.unsqueeze(2) == doc_ids.unsqueeze(1)
    return same.tril().unsqueeze(1)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """True where each of the last `queries` of `keys` tokens may see a key: itself or an earlier one."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) through `scaled_dot_product_attention`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim, head_dim = config.hidden_size, config.dim_per_head
        self.head_dim = head_dim
        self.wq = nn.Linear(dim, config.num_heads * head_dim, bias=False)
        self.wk = nn.Linear(dim, config.kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(dim, config.kv_heads * head_dim, bias=False)
        self.wo = nn.Linear(config.num_heads * head_dim, dim, bias=False)
        self.q_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, kv: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:  # fmt: skip
        """`x` and result `[batch, seq, hidden]`; without `mask`, causal over the whole sequence.

        Keys and values are made of `kv`, shaped as `x`, where it is given; `cache` puts those of earlier tokens
        before them.
        """
        batch, seq, _ = x.shape
        kv = x if kv is None else kv
        q, k, v = (
            w(s).view(batch, seq, -1, self.head_dim) for w, s in ((self.wq, x), (self.wk, kv), (self.wv, kv))
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        if cache is not None:
            k, v = cache.extend(k, v)
        out = attend(q, k, v, mask)
        return self.wo(out.transpose(1, 2).flatten(2))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of `q` `[batch, heads, seq, head_dim]` to `k`, `v` of as many heads or a divisor of it.

    Without a mask it is causal; a single query, the last token, sees all keys.
    """
    groups = q.shape[1] // k.shape[1]
    # Grouped heads as they are take flash and cuDNN's kernel: in half precision, flash without a mask.
    native = not q.is_cuda or (mask is None and q.dtype in (torch.float16, torch.bfloat16))
    if groups > 1 and not native:
        k, v = (t.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for t in (k, v))
        groups = 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1, enable_gqa=groups > 1
    )

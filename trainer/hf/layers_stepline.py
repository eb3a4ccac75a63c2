"""Layers of a Stepline model for `transformers`; a copy stands in the folder of an export."""

import math

import torch
import torch.nn.functional as F
from torch import nn

CANON_TAPS = 4


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, with statistics in at least fp32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = (
            torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            .square()
            .div(x.shape[-1])
            .add(self.eps)
            .rsqrt()
        )
        return (wide * rstd * self.weight.to(wide.dtype)).to(self.weight.dtype)


def rotary_tables(config, positions):
    """Cosines and sines, `[batch, seq, 1, head_dim]` each in fp32, for `positions` `[batch, seq]`."""
    dim, scaling = config.head_dim, config.rotary["scaling"]
    freqs = 1.0 / config.rotary["theta"] ** (torch.arange(0, dim, 2, device=positions.device).float() / dim)
    if scaling is not None and scaling["rope_type"] == "linear":
        freqs = freqs / scaling["factor"]
    elif (
        scaling is not None
    ):  # llama3: high frequencies are kept, low ones divided, those between interpolated
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] / (2 * math.pi / freqs)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = (1 - kept) * freqs / scaling["factor"] + kept * freqs
    angles = (positions.unsqueeze(-1) * freqs).unsqueeze(2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):
    """`x` `[batch, seq, heads, head_dim]`, in at least fp32 on the way."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * cos).addcmul(wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention; keys and values may come from another input than the queries."""

    def __init__(self, config, layer):
        super().__init__()
        dim, self.head_dim, self.layer = inner_width(config), config.head_dim, layer
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.wq = nn.Linear(dim, config.num_attention_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, config.num_key_value_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, config.num_key_value_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(config.num_attention_heads * self.head_dim, dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x, kv, cos, sin, mask, cache):
        q, k, v = (
            w(s).view(*x.shape[:2], -1, self.head_dim)
            for w, s in ((self.wq, x), (self.wk, kv), (self.wv, kv))
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        if x.device.type != "cpu":
            k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        grouped = k.shape[1] < q.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
        return self.wo(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, width, inner):
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Router(nn.Module):
    """Logits in at least fp32, and a bias that is added to the scores for the choice alone."""

    def __init__(self, experts, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.balance_bias = nn.Parameter(torch.zeros(experts), requires_grad=False)

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide))


class Experts(nn.Module):
    """One SwiGLU for each expert, their weights stacked."""

    def __init__(self, experts, width, inner):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(experts, inner, width))
        self.w3 = nn.Parameter(torch.empty(experts, inner, width))
        self.w2 = nn.Parameter(torch.empty(experts, width, inner))

    def forward(self, x, chosen, weights):
        """`x` `[tokens, width]`; chosen and weights: `[tokens, top_k]`."""
        top_k = chosen.shape[1]
        slots = chosen.flatten().argsort(stable=True)
        parts = []
        for expert, rows in enumerate(
            slots.split(chosen.flatten().bincount(minlength=len(self.w1)).tolist())
        ):
            part = x[rows // top_k]
            inner = F.silu(F.linear(part, self.w1[expert])) * F.linear(part, self.w3[expert])
            parts.append(F.linear(inner, self.w2[expert]))
        y = torch.cat(parts) * weights.flatten()[slots].unsqueeze(1)
        return y[slots.argsort()].view(len(x), top_k, -1).sum(1).to(x.dtype)


class MoE(nn.Module):
    """A token goes to the experts with the largest biased scores, which weigh without the bias; none is dropped."""

    def __init__(self, config):
        super().__init__()
        width = inner_width(config)
        self.top_k, self.score, self.renormalise = (
            config.num_experts_per_tok,
            config.router_score,
            config.norm_topk_prob,
        )
        self.router = Router(config.num_experts, width)
        self.experts = Experts(config.num_experts, width, config.intermediate_size)
        self.shared = SwiGLU(width, config.shared_expert_size) if config.shared_expert_size else None

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        logits = self.router(rows)
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        chosen = (scores + self.router.balance_bias.to(scores.dtype)).topk(self.top_k).indices
        weights = scores.gather(1, chosen)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        out = self.experts(rows, chosen, weights)
        if self.shared is not None:
            out = out + self.shared(rows)
        return out.view(x.shape)


class Canon(nn.Module):
    """y_t = x_t + sum over j in 0..3 of w_j * x_(t-j), channel by channel (arXiv 2512.17351)."""

    def __init__(self, dim, layer):
        """layer: of the cache."""
        super().__init__()
        self.weight, self.layer = nn.Parameter(torch.zeros(CANON_TAPS * dim)), layer

    def forward(self, x, positions, kept, cache):
        """`x` `[batch, seq, dim]`; nothing is read from before position 0, nor where `kept`, `[batch, seq, 1]`, is 0.
        The cache, if there is one, has the inputs as keys of one head, under a layer of their own, so that beams are
        reordered with them."""
        x = x if kept is None else x * kept
        taps, seq, wide = self.weight.view(CANON_TAPS, -1), x.shape[1], x
        if cache is not None:
            wide = cache.update(x.unsqueeze(1), x.new_empty(len(x), 1, seq, 0), self.layer)[0].squeeze(1)
        wide = F.pad(wide, (0, 0, CANON_TAPS - 1, 0))[:, -(seq + CANON_TAPS - 1) :]
        y = x
        for j, tap in enumerate(taps):
            shifted = wide[:, CANON_TAPS - 1 - j :][:, :seq]
            y = torch.addcmul(y, torch.where((positions >= j).unsqueeze(-1), shifted, 0), tap)
        return y


def make_canon(config, place, layer, dim):
    """The layer at `place`, A or C, of block `layer`, or None; in a cache they stand behind attention's."""
    if place not in config.canon:
        return None
    return Canon(dim, config.num_hidden_layers + layer * len(config.canon) + config.canon.index(place))


def canon_layers(config):
    """How many there are."""
    return 0 if config.canon == "none" else len(config.canon) * config.num_hidden_layers


def inner_width(config):
    """Width of what attention and feed-forward layers read and write."""
    return config.hidden_size // 2 if config.reversible and not config.adapters else config.hidden_size


def make_ffn(config):
    return MoE(config) if config.num_experts else SwiGLU(inner_width(config), config.intermediate_size)

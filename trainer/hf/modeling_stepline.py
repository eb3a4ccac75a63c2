"""A Stepline model for `transformers`, for inference; a copy stands in the folder of an export.

Standard pre-norm blocks, or reversible ones of two streams (RevFFN, arXiv 2512.20920), whose backward is an ordinary
one here; dense SwiGLU layers, or a mixture of experts whose choice a bias may even out (arXiv 2408.15664).

Operations and their order are those of the training: where streams are rounded to a grid, a last bit that differs
before the rounding may be a whole step after it.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from stepline.trainer.hf.configuration_stepline import SteplineConfig


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


def inner_width(config):
    """Width of what attention and feed-forward layers read and write."""
    return config.hidden_size // 2 if config.reversible and not config.adapters else config.hidden_size


def make_ffn(config):
    return MoE(config) if config.num_experts else SwiGLU(inner_width(config), config.intermediate_size)


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm feed-forward layer, each added to the residual stream."""

    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = make_ffn(config)

    def forward(self, x, *attention):
        normed = self.attn_norm(x)
        x = x + self.attn(normed, normed, *attention)
        return x + self.ffn(self.ffn_norm(x))


class ReversibleBlock(nn.Module):
    """Y1 = X1 + Attn(n X2) and Y2 = X2 + FFN(n Y1); with queries of the own stream, Attn(q: n X1, kv: n X2)."""

    def __init__(self, config, layer):
        super().__init__()
        full, width, eps = config.hidden_size, config.hidden_size // 2, config.rms_norm_eps

        def adapter(n_in, n_out):
            return nn.Linear(n_in, n_out, bias=False) if config.adapters else nn.Identity()

        self.bits = config.grid_bits
        self.attn_norm = RMSNorm(width, eps)
        self.attn_kv_norm = RMSNorm(width, eps) if config.queries_of_own_stream else None
        self.attn_up, self.attn_down = adapter(width, full), adapter(full, width)
        self.attn = Attention(config, layer)
        self.ffn_norm = RMSNorm(width, eps)
        self.ffn_up, self.ffn_down = adapter(width, full), adapter(full, width)
        self.ffn = make_ffn(config)

    def forward(self, x1, x2, *attention):
        if self.attn_kv_norm is None:
            q = kv = self.attn_up(self.attn_norm(x2))
        else:
            q, kv = self.attn_up(self.attn_norm(x1)), self.attn_up(self.attn_kv_norm(x2))
        y1 = add(x1, self.attn_down(self.attn(q, kv, *attention)), self.bits)
        return y1, add(x2, self.ffn_down(self.ffn(self.ffn_up(self.ffn_norm(y1)))), self.bits)


def add(x, h, bits):
    """x + h in the type of `x`, with `h` on the grid of multiples of 2^-bits, if there is one."""
    h = h.to(x.dtype)
    return x + (h if bits is None else h.mul(2.0**bits).round() * 2.0**-bits)


class SteplineModel(nn.Module):
    """Embedding, blocks and norm."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        block = ReversibleBlock if config.reversible else Block
        self.layers = nn.ModuleList(block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, positions, mask, cache):
        attention = (*rotary_tables(self.config, positions), mask, cache)
        if not self.config.reversible:
            for layer in self.layers:
                x = layer(x, *attention)
            return self.norm(x)
        wide, bits = torch.promote_types(x.dtype, torch.float32), self.config.grid_bits
        x1, x2 = (add(torch.zeros_like(half, dtype=wide), half, bits) for half in x.chunk(2, -1))
        for layer in self.layers:
            x1, x2 = layer(x1, x2, *attention)
        return self.norm(torch.cat((x1, x2), -1))


class SteplineForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model; `generate` works with and without a cache, and with padding on the left."""

    config_class = SteplineConfig
    base_model_prefix = "model"
    _no_split_modules = ("Block", "ReversibleBlock")
    _keep_in_fp32_modules_strict = ("balance_bias",)
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.model = SteplineModel(config)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding, Router)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, Experts):
            for weight in (module.w1, module.w2, module.w3):
                nn.init.normal_(weight, std=self.config.initializer_range)

    def get_input_embeddings(self):
        return self.model.embed

    def set_input_embeddings(self, value):
        self.model.embed = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **_,
    ):
        """Logits `[batch, seq, vocab]`.

        attention_mask: `[batch, past + seq]`, 0 for padding. labels: `[batch, seq]`, -100 carries no loss; token t + 1
        is the target of t.
        """
        x = self.model.embed(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        keys = torch.arange(past + x.shape[1], device=x.device)
        queries, padded = keys[past:], attention_mask is not None and attention_mask.ndim == 2
        padded = padded and not bool(attention_mask.all())
        mask = None
        if padded or past:
            mask = (keys <= queries.unsqueeze(1)).expand(len(x), 1, -1, -1)
        if padded:
            # a query that is padding sees itself alone: no row of the softmax is empty
            mask = mask & (attention_mask[:, None, None, : len(keys)].bool() | (keys == queries.unsqueeze(1)))
            if position_ids is None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        if position_ids is None:
            position_ids = queries.unsqueeze(0)
        x = self.model(x, position_ids, mask, past_key_values)
        x = x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else x[:, logits_to_keep]
        logits = F.linear(x, self.model.embed.weight) if self.lm_head is None else self.lm_head(x)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None
        )

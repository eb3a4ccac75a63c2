"""A Stepline model for `transformers`, for inference; a copy stands in the folder of an export.

Standard pre-norm blocks, or reversible ones of two streams (RevFFN, arXiv 2512.20920), whose backward is an ordinary
one here; dense SwiGLU layers, or a mixture of experts whose choice a bias may even out (arXiv 2408.15664).

Operations and their order are those of the training: where streams are rounded to a grid, a last bit that differs
before the rounding may be a whole step after it.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from stepline.trainer.hf.configuration_stepline import SteplineConfig
from stepline.trainer.hf.layers_stepline import (
    Attention,
    Experts,
    RMSNorm,
    Router,
    canon_layers,
    make_canon,
    make_ffn,
    rotary_tables,
)


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm feed-forward layer, each added to the residual stream."""

    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn_canon = make_canon(config, "A", layer, config.hidden_size)
        self.attn = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_canon = make_canon(config, "C", layer, config.hidden_size)
        self.ffn = make_ffn(config)

    def forward(self, x, context, *attention):
        near = (context, attention[-1])
        read = mix(self.attn_canon, self.attn_norm(x), *near)
        x = x + self.attn(read, read, *attention)
        return x + self.ffn(mix(self.ffn_canon, self.ffn_norm(x), *near))


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
        self.attn_canon = make_canon(config, "A", layer, width)
        self.attn = Attention(config, layer)
        self.ffn_norm = RMSNorm(width, eps)
        self.ffn_canon = make_canon(config, "C", layer, width)
        self.ffn_up, self.ffn_down = adapter(width, full), adapter(full, width)
        self.ffn = make_ffn(config)

    def forward(self, x1, x2, context, *attention):
        near = (context, attention[-1])
        if self.attn_kv_norm is None:
            q = kv = self.attn_up(mix(self.attn_canon, self.attn_norm(x2), *near))
        else:
            q, kv = self.attn_up(self.attn_norm(x1)), self.attn_up(self.attn_kv_norm(x2))
        y1 = add(x1, self.attn_down(self.attn(q, kv, *attention)), self.bits)
        read = mix(self.ffn_canon, self.ffn_norm(y1), *near)
        return y1, add(x2, self.ffn_down(self.ffn(self.ffn_up(read))), self.bits)


def mix(canon, x, context, cache):
    """`x` through a Canon layer, if there is one; context: positions and what is no padding."""
    return x if canon is None else canon(x, *context, cache)


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

    def forward(self, x, positions, kept, mask, cache):
        extra = canon_layers(self.config)
        if extra and cache is not None and cache.layers:  # made for as many layers as the config has
            while len(cache.layers) < self.config.num_hidden_layers + extra:
                cache.layers.append(type(cache.layers[0])())
        attention = ((positions, kept), *rotary_tables(self.config, positions), mask, cache)
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
        kept = attention_mask[:, past:, None].to(x.dtype) if padded else None
        x = self.model(x, position_ids, kept, mask, past_key_values)
        x = x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else x[:, logits_to_keep]
        logits = F.linear(x, self.model.embed.weight) if self.lm_head is None else self.lm_head(x)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None
        )

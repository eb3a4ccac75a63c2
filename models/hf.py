"""Names and configuration of the same model in `transformers`: Llama, or Qwen3 with qk_norm."""

import re
from collections.abc import Mapping
from typing import TypeVar

from stepline.models.config import ModelConfig

T = TypeVar("T")

OUTER = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn.wq": "self_attn.q_proj",
    "attn.wk": "self_attn.k_proj",
    "attn.wv": "self_attn.v_proj",
    "attn.wo": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "ffn.w1": "mlp.gate_proj",
    "ffn.w3": "mlp.up_proj",
    "ffn.w2": "mlp.down_proj",
}


def to_hf_name(name: str) -> str:
    """`layers.0.attn.wq.weight` → `model.layers.0.self_attn.q_proj.weight`; KeyError for an unknown name."""
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name):
        return f"model.layers.{match[1]}.{INNER[match[2]]}.weight"
    return OUTER[name.removesuffix(".weight")] + ".weight"


def from_hf_name(name: str) -> str:
    """The inverse of `to_hf_name`."""
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name):
        inner = {theirs: ours for ours, theirs in INNER.items()}
        return f"layers.{match[1]}.{inner[match[2]]}.weight"
    outer = {theirs: ours for ours, theirs in OUTER.items()}
    return outer[name.removesuffix(".weight")] + ".weight"


def to_hf_state(state: Mapping[str, T]) -> dict[str, T]:
    """A state dict of `Transformer` under the names of `transformers`; the values are untouched."""
    return {to_hf_name(name): value for name, value in state.items()}


def from_hf_state(state: Mapping[str, T], config: ModelConfig) -> dict[str, T]:
    """A state dict of `transformers` under the names of `Transformer`; a tied head's copy is left out."""
    kept = {n: v for n, v in state.items() if not (config.tied_embeddings and n == "lm_head.weight")}
    return {from_hf_name(name): value for name, value in kept.items()}


def hf_config_dict(config: ModelConfig, max_positions: int) -> dict:
    """The contents of `config.json`: a LlamaConfig, or a Qwen3Config with qk_norm.

    `max_positions` is the longest sequence in tokens that the model has been trained on.
    """
    rope = None
    if (scaling := config.rope_scaling) is not None:
        rope = {"rope_type": scaling.type, "factor": scaling.factor}
        if scaling.type == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_context,
            }
    kind, model_type = ("Qwen3ForCausalLM", "qwen3") if config.qk_norm else ("LlamaForCausalLM", "llama")
    return {
        "architectures": [kind],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.dim_per_head,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": config.std,
    }

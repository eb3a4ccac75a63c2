"""Names and configuration of the same model in `transformers`: Llama, Qwen3 (qk_norm) or Qwen3-MoE."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from stepline.models.config import ModelConfig

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
    "ffn.router": "mlp.gate",
}
EXPERT = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


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


def to_hf_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `Transformer` under the names of the files of `transformers`; the values are untouched.

    Stacked experts become one matrix each. Balance biases have no place there: see `hf_config_dict`.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if match := re.fullmatch(r"layers\.(\d+)\.ffn\.experts\.(w\d)", name):
            for e, matrix in enumerate(value):
                renamed[f"model.layers.{match[1]}.mlp.experts.{e}.{EXPERT[match[2]]}.weight"] = matrix
        elif not name.endswith(".balance_bias"):
            renamed[to_hf_name(name)] = value
    return renamed


def from_hf_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A state dict of `transformers` files under the names of `Transformer`; a tied head's copy is left out."""
    ours = {theirs: name for name, theirs in EXPERT.items()}
    stacks: dict[str, dict[int, Tensor]] = {}
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if config.tied_embeddings and name == "lm_head.weight":
            continue
        if match := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(\w+)\.weight", name):
            stack = f"layers.{match[1]}.ffn.experts.{ours[match[3]]}"
            stacks.setdefault(stack, {})[int(match[2])] = value
        else:
            renamed[from_hf_name(name)] = value
    return renamed | {name: torch.stack([s[e] for e in range(len(s))]) for name, s in stacks.items()}


def hf_config_dict(config: ModelConfig, max_positions: int) -> dict:
    """The contents of `config.json`: a LlamaConfig, with qk_norm a Qwen3Config, with experts a Qwen3MoeConfig.

    `max_positions` is the longest sequence in tokens that the model has been trained on. Raises ValueError where no
    stock architecture computes the same; that the balance biases of a mixture are zero is up to the caller.
    """
    if config.blocks != "standard":
        raise ValueError("no stock architecture has reversible blocks")
    mixture = config.ffn == "moe"
    if mixture and (moe := config.moe) and (not config.qk_norm or moe.shared_size or moe.score != "softmax"):
        raise ValueError(
            "the stock mixture is Qwen3-MoE, which needs qk_norm, softmax scores and no shared expert"
        )
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
    experts = {}
    if mixture:
        kind, model_type = "Qwen3MoeForCausalLM", "qwen3_moe"
        experts = {
            "moe_intermediate_size": config.ffn_size,
            "num_experts": config.moe.experts,
            "num_experts_per_tok": config.moe.top_k,
            "norm_topk_prob": config.moe.renormalise,
        }
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
        **experts,
    }

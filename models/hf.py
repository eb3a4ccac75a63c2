"""Names and configuration of the same model in `transformers`: Llama, Qwen3, Qwen3-MoE or Mixtral."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stepline.models.config import ModelConfig

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
"""`model_type` and architecture of what Stepline reads and writes as stock models."""

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
MIXTRAL = {"ffn.router": "block_sparse_moe.gate"}
EXPERTS = {
    "mlp.experts": {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"},
    "block_sparse_moe.experts": {"w1": "w1", "w3": "w3", "w2": "w2"},
}
"""Where Qwen3-MoE and Mixtral have their experts, and what they call an expert's matrices."""

IN_OLD_FILES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""A buffer that old versions of transformers wrote, and which follows from the configuration."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 2048},
    "qwen3": {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 32768, "head_dim": 128,
              "num_key_value_heads": 32},
    "qwen3_moe": {
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 32768, "norm_topk_prob": False,
        "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "router_aux_loss_coef": 1e-3,
    },
    "mixtral": {
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 131072, "num_key_value_heads": 8,
        "num_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 1e-3,
    },
}  # fmt: skip
"""What transformers assumes where a config.json leaves a value out."""


def stock_family(config: ModelConfig) -> str:
    """The `model_type` of the stock architecture that computes the same; raises ValueError where there is none.

    That the balance biases of a mixture are zero is up to the caller. A capacity is of training: nothing is dropped
    by a stock mixture.
    """
    if config.blocks != "standard":
        raise ValueError("no stock architecture has reversible blocks")
    if config.canon != "none":
        raise ValueError("no stock architecture has Canon layers")
    if config.ffn != "moe":
        return "qwen3" if config.qk_norm else "llama"
    if config.moe.shared_size or config.moe.score != "softmax":
        raise ValueError("the stock mixtures have softmax scores and no shared expert")
    if config.qk_norm:
        return "qwen3_moe"
    if not config.moe.renormalise:
        raise ValueError("the stock mixture without qk_norm is Mixtral, which renormalises the scores")
    return "mixtral"


def to_hf_name(name: str, family: str = "qwen3_moe") -> str:
    """`layers.0.attn.wq.weight` → `model.layers.0.self_attn.q_proj.weight`; KeyError for an unknown name."""
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name):
        inner = INNER | MIXTRAL if family == "mixtral" else INNER
        return f"model.layers.{match[1]}.{inner[match[2]]}.weight"
    return OUTER[name.removesuffix(".weight")] + ".weight"


def to_hf_names(name: str, experts: int, family: str) -> list[str]:
    """The matrices of the files that a parameter becomes: one, or of stacked experts one for each, in their order."""
    if match := re.fullmatch(r"layers\.(\d+)\.ffn\.experts\.(w\d)", name):
        place = "block_sparse_moe.experts" if family == "mixtral" else "mlp.experts"
        inner = EXPERTS[place][match[2]]
        return [f"model.layers.{match[1]}.{place}.{e}.{inner}.weight" for e in range(experts)]
    return [to_hf_name(name, family)]


def from_hf_name(name: str) -> str:
    """The inverse of `to_hf_name`, of any family; KeyError for an unknown name."""
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name):
        inner = {theirs: ours for table in (INNER, MIXTRAL) for ours, theirs in table.items()}
        return f"layers.{match[1]}.{inner[match[2]]}.weight"
    outer = {theirs: ours for ours, theirs in OUTER.items()}
    return outer[name.removesuffix(".weight")] + ".weight"


def from_hf_matrix(name: str) -> tuple[str, int | None]:
    """Our parameter and, of an expert's matrix, the place in the stack; KeyError for an unknown name."""
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(\w+\.experts)\.(\d+)\.(\w+)\.weight", name):
        ours = {theirs: w for w, theirs in EXPERTS[match[2]].items()}
        return f"layers.{match[1]}.ffn.experts.{ours[match[4]]}", int(match[3])
    return from_hf_name(name), None


def to_hf_state(state: Mapping[str, Tensor], family: str = "qwen3_moe") -> dict[str, Tensor]:
    """A state dict of `Transformer` under the names of the files of `transformers`; the values are untouched.

    Stacked experts become one matrix each. Balance biases have no place there: see `hf_config_dict`.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(".balance_bias"):
            continue
        names = to_hf_names(name, len(value), family)
        renamed |= zip(names, value if ".ffn.experts." in name else [value], strict=True)
    return renamed


def from_hf_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A state dict of `transformers` files under the names of `Transformer`; a tied head's copy is left out."""
    stacks: dict[str, dict[int, Tensor]] = {}
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if config.tied_embeddings and name == "lm_head.weight":
            continue
        ours, expert = from_hf_matrix(name)
        if expert is None:
            renamed[ours] = value
        else:
            stacks.setdefault(ours, {})[expert] = value
    return renamed | {name: torch.stack([s[e] for e in range(len(s))]) for name, s in stacks.items()}


def common_config_dict(config: ModelConfig, max_positions: int) -> dict[str, Any]:
    """What the `config.json` of any decoder says; `max_positions`: longest sequence trained on, in tokens."""
    rope = None
    if (scaling := config.rope_scaling) is not None:
        rope = {"rope_type": scaling.type, "factor": scaling.factor}
        if scaling.type == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_context,
            }
    return {
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


def hf_config_dict(config: ModelConfig, max_positions: int) -> dict[str, Any]:
    """The contents of `config.json` for `stock_family(config)`.

    `max_positions` is the longest sequence in tokens that the model has been trained on. Raises ValueError where no
    stock architecture computes the same; that the balance biases of a mixture are zero is up to the caller.
    """
    family = stock_family(config)
    experts: dict[str, Any] = {}
    if family == "qwen3_moe":
        experts = {
            "moe_intermediate_size": config.ffn_size,
            "num_experts": config.moe.experts,
            "norm_topk_prob": config.moe.renormalise,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    elif family == "mixtral":
        experts = {"num_local_experts": config.moe.experts, "sliding_window": None}
    if experts:
        coefficient = config.moe.balance_loss / _balance_factor(config.moe.top_k, config.num_layers)
        experts |= {
            "num_experts_per_tok": config.moe.top_k, "router_aux_loss_coef": float(f"{coefficient:.12g}"),
        }  # fmt: skip
    kind = {"architectures": [FAMILIES[family]], "model_type": family}
    return kind | common_config_dict(config, max_positions) | experts


def _balance_factor(top_k: int, layers: int) -> float:
    """Stepline's weight of the balance loss over that of transformers, which counts each of a token's choices in full
    and takes the mean over the layers; here shares of all choices are summed over the layers."""
    return top_k / layers


def config_from_hf(raw: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    """The model of a `config.json`, and its `max_position_embeddings`.

    A mixture is balanced by the loss that `router_aux_loss_coef` weighs, not by biases, so that the trained model is
    one of its family again. Raises ValueError, naming it, for an architecture or an option that Stepline does not
    compute, and KeyError for a value that is missing.
    """
    family = raw.get("model_type")
    if family not in FAMILIES:
        named = raw.get("architectures") or [family]
        raise ValueError(
            f"the architecture {named[0]} is not supported; these are: {', '.join(FAMILIES.values())}"
        )
    rope = raw.get("rope_parameters") or {}
    values = DEFAULTS[family] | {name: value for name, value in raw.items() if value is not None}
    values |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    _refuse_options(family, values)
    model: dict[str, Any] = {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "num_kv_heads": values.get("num_key_value_heads"),
        "head_dim": values.get("head_dim"),
        "ffn_size": values["moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"],
        "rope_theta": values["rope_theta"],
        "rope_scaling": _scaling(rope or values.get("rope_scaling") or {}),
        "norm_eps": values["rms_norm_eps"],
        "qk_norm": family in ("qwen3", "qwen3_moe"),
        "tied_embeddings": values.get("tie_word_embeddings", False),
    }
    if family in ("qwen3_moe", "mixtral"):
        factor = _balance_factor(values["num_experts_per_tok"], values["num_hidden_layers"])
        balance = values["router_aux_loss_coef"] * factor
        model |= {
            "ffn": "moe",
            "moe": {
                "experts": raw.get("num_local_experts") or values["num_experts"],
                "top_k": values["num_experts_per_tok"],
                "renormalise": family == "mixtral" or values["norm_topk_prob"],
                "balance": "global",
                "balance_loss": float(f"{balance:.12g}"),
            },
        }
    return ModelConfig(**model), values["max_position_embeddings"]


def _refuse_options(family: str, values: Mapping[str, Any]) -> None:
    """Raises ValueError for what a family's config.json can ask for and Stepline does not compute."""
    wanted = {
        "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (False,),
        "decoder_sparse_step": (1,), "mlp_only_layers": ([],), "partial_rotary_factor": (1, 1.0),
        "quantization_config": (), "pretraining_tp": (1,),
    }  # fmt: skip
    if family == "mixtral":  # the others look at it with use_sliding_window alone
        wanted["sliding_window"] = ()
    for name, allowed in wanted.items():
        if name in values and values[name] not in allowed:
            raise ValueError(f"{FAMILIES[family]} with {name} {values[name]!r} is not supported")


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling` of the config, from what transformers 4 (`type` in old files) or 5 wrote."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return {"type": "linear", "factor": rope["factor"]}
    if kind == "llama3":
        return {
            "type": "llama3",
            "factor": rope["factor"],
            "low_freq_factor": rope["low_freq_factor"],
            "high_freq_factor": rope["high_freq_factor"],
            "original_context": rope["original_max_position_embeddings"],
        }
    raise ValueError(f"RoPE scaling {kind!r} is not supported; these are: linear, llama3")

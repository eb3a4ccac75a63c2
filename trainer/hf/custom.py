"""Models that no stock architecture computes: reversible blocks, Canon layers, and mixtures with a balance
bias, sigmoid scores or a shared expert. Their exports bring the modelling code along."""

from pathlib import Path
from typing import Any

from stepline.models.config import ModelConfig
from stepline.models.hf import common_config_dict

CODE = ("configuration_stepline.py", "layers_stepline.py", "modeling_stepline.py")
PACKAGE = "from stepline.trainer.hf."
MODEL_TYPE, ARCHITECTURE = "stepline", "SteplineForCausalLM"


def custom_name(name: str) -> str:
    """`layers.0.attn.wq.weight` → `model.layers.0.attn.wq.weight`, `head.weight` → `lm_head.weight`."""
    return "lm_head.weight" if name == "head.weight" else f"model.{name}"


def from_custom_name(name: str) -> str:
    """The inverse of `custom_name`; KeyError for a name that it does not give."""
    if name == "lm_head.weight":
        return "head.weight"
    if not name.startswith("model."):
        raise KeyError(name)
    return name.removeprefix("model.")


def custom_config_dict(config: ModelConfig, max_positions: int) -> dict[str, Any]:
    """The contents of `config.json`; `max_positions`: longest sequence trained on, in tokens."""
    common, reversible = common_config_dict(config, max_positions), config.blocks == "revffn"
    rotary = {"theta": common.pop("rope_theta"), "scaling": common.pop("rope_scaling")}
    experts: dict[str, Any] = {}
    if config.ffn == "moe":
        experts = {
            "num_experts": config.moe.experts,
            "num_experts_per_tok": config.moe.top_k,
            "shared_expert_size": config.moe.shared_size,
            "router_score": config.moe.score,
            "norm_topk_prob": config.moe.renormalise,
        }
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": "configuration_stepline.SteplineConfig",
            "AutoModelForCausalLM": f"modeling_stepline.{ARCHITECTURE}",
        },
        **{
            name: value for name, value in common.items() if not name.startswith(("attention_", "hidden_act"))
        },
        "rotary": rotary,
        "qk_norm": config.qk_norm,
        "canon": config.canon,
        "reversible": reversible,
        "queries_of_own_stream": reversible and config.coupling == "revffn",
        "adapters": reversible and config.revffn.adapters,
        "grid_bits": config.revffn.grid_bits if reversible and config.revffn.streams == "grid" else None,
        **experts,
        "stepline": config.model_dump(mode="json"),
    }


def write_code(folder: Path) -> None:
    """Copies the modelling code, which imports nothing of Stepline there."""
    here = Path(__file__).resolve().parent
    for name in CODE:
        text = (here / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace(PACKAGE, "from ."), encoding="utf-8")

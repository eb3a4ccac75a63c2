"""The kind of the models that a law was fitted on: what they are beside N and D, as keys of the config.

Layers that a model has or has not move its loss and its best learning rate: a law of one kind is a guess for another.
Imports no torch.
"""

from stepline.trainer.config import Config


def kind_of(config: Config) -> str:
    """`ffn=dense blocks=standard canon=none qk_norm=true sparse=none`; a mixture's experts, a reversible block's
    coupling, and what is trained where that is not all, too."""
    model = config.model
    said: dict[str, object] = {"ffn": model.ffn}
    if model.ffn == "moe":
        said |= {"experts": model.moe.experts, "top_k": model.moe.top_k}
    said["blocks"] = model.blocks
    if model.blocks == "revffn":
        said |= {"coupling": model.coupling, "adapters": "true" if model.revffn.adapters else "false"}
    said |= {
        "canon": model.canon,
        "qk_norm": "true" if model.qk_norm else "false",
        "sparse": config.sparse.mode,
    }
    if config.optimizer.only == "adapters":
        said["trained"] = "adapters"
    return " ".join(f"{key}={value}" for key, value in said.items())


def differences(law: str, model: str) -> list[str]:
    """`canon=none, not AC` for each key that both kinds have, with other values; what one does not tell is no
    difference."""
    mine, its = _parts(model), _parts(law)
    for parts in filter(None, (mine, its)):
        parts.setdefault("trained", "all")
    return [f"{key}={value}, not {mine[key]}" for key, value in its.items() if mine.get(key, value) != value]


def _parts(kind: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in kind.split() if "=" in part)

"""Smaller and larger models of one family: the shapes of a sweep. Imports no torch."""

import math

from stepline.models.config import GROUPED, ModelConfig
from stepline.models.flops import parameter_counts
from stepline.trainer.errors import UserError

ASPECT_WEIGHT = 0.3
"""What a factor e in width/depth costs beside a factor e in N (`scaled_shape`)."""
FFN_MULTIPLE = 8


def with_heads(model: ModelConfig, heads: int, layers: int) -> ModelConfig:
    """The model with another width and depth.

    Kept: head_dim, the width per head, query heads per key-value head, and ffn_size / hidden_size (that of a shared
    expert too), rounded to a multiple of 8. heads must be a multiple of the query heads per key-value head.
    """
    hidden = model.hidden_size * heads // model.num_heads

    def scaled(size: int) -> int:
        if heads == model.num_heads or not size:
            return size
        return max(1, round(size * heads / model.num_heads / FFN_MULTIPLE)) * FFN_MULTIPLE

    kv_heads = None if model.num_kv_heads is None else heads * model.kv_heads // model.num_heads
    changed = {
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "ffn_size": scaled(model.ffn_size),
        "moe": model.moe.model_dump() | {"shared_size": scaled(model.moe.shared_size)},
    }
    return ModelConfig.model_validate(model.model_dump() | changed)


def _head_step(model: ModelConfig) -> int:
    """The number of heads grows in such steps: whole key-value groups, and a whole width that layers can read."""
    group = model.num_heads // model.kv_heads
    narrow = model.hidden_size // model.inner_size  # 2 where layers read a stream
    read = narrow * (GROUPED if model.ffn == "moe" else 1)
    unit = math.lcm(2 if model.blocks == "revffn" else 1, read)
    whole = model.num_heads * unit // math.gcd(model.num_heads * unit, model.hidden_size)
    return math.lcm(group, whole)


def scaled_shape(model: ModelConfig, fraction: float) -> ModelConfig:
    """The shape with about `fraction` of the model's N (non-embedding linear weights).

    Over layers and heads (at constant head_dim) it minimises

        |ln(N / wanted N)| + 0.3 |ln(aspect / the model's aspect)|,    aspect = hidden_size / num_layers,

    with at least two layers where the model has two: attention in a single layer cannot build on attention.
    """
    wanted = fraction * parameter_counts(model).linear
    step, best = _head_step(model), (math.inf, model)
    own, most = model.num_heads / model.num_layers, max(1.0, fraction)
    for layers in range(min(2, model.num_layers), math.ceil(model.num_layers * most) + 1):
        # Outside of this factor the aspect alone costs more than the best shape so far.
        factor = math.exp(min(best[0] / ASPECT_WEIGHT, 50.0))
        first = max(1, math.floor(own * layers / factor / step)) * step
        last = min(math.ceil(model.num_heads * most), math.ceil(own * layers * factor))
        for heads in range(first, last + step, step):
            shape = with_heads(model, heads, layers)
            aspect = heads / layers / own
            miss = abs(math.log(parameter_counts(shape).linear / wanted))
            score = miss + ASPECT_WEIGHT * abs(math.log(aspect))
            best = min(best, (score, shape), key=lambda pair: pair[0])
            if parameter_counts(shape).linear > 2 * wanted:
                break  # wider ones are farther still
    return best[1]


def widened_shape(model: ModelConfig, width: int) -> ModelConfig:
    """The model at this hidden_size and its own depth; raises UserError for a width that heads cannot fill."""
    unit = model.hidden_size * _head_step(model) // model.num_heads
    if width % unit or width < unit:
        near = max(1, round(width / unit)) * unit
        raise UserError(
            f"--widths {width} is no multiple of {unit}, the width of "
            f"{_head_step(model)} heads of this model; the nearest is {near}"
        )
    return with_heads(model, model.num_heads * width // model.hidden_size, model.num_layers)

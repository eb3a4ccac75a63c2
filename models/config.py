"""The shape of a model. Imports no torch, so that the planner can count parameters in milliseconds."""

import math
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

CANON_TAPS = 4
"""Tokens that a Canon layer reads, the current one included."""
GROUPED = 8
"""Grouped products take multiples of it in width: rows begin at multiples of 16 bytes."""


def nearest_multiple(number: int, unit: int) -> int:
    """The multiple of `unit` that is nearest to `number`, at least `unit`."""
    return max(1, round(number / unit)) * unit


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` that is nearest to `wanted`, the smaller of two."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return min(small + [number // d for d in small], key=lambda d: (abs(d - wanted), d))


def kinds_in(annotation: Any) -> set[Any]:
    """The types that a field's annotation names, at any depth."""
    if get_origin(annotation) is Literal:
        return set(map(type, get_args(annotation)))
    return {annotation}.union(*map(kinds_in, get_args(annotation)))


class Section(BaseModel):
    """A section of the configuration: unknown keys are refused, attribute docstrings become help."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_number(cls, value: object, info: ValidationInfo) -> object:
        """YAML reads `yes` and `on` as true, which pydantic would take for 1."""
        kinds = kinds_in(cls.model_fields[info.field_name].annotation) if isinstance(value, bool) else set()
        if {int, float} & kinds and bool not in kinds:
            raise PydanticCustomError("no_number", "true and false are no numbers")
        return value


class RopeScaling(Section):
    """How RoPE's frequencies are stretched to a longer context; names and formulas of `transformers`."""

    type: Literal["linear", "llama3"] = "llama3"
    """`linear` divides every frequency by `factor`; `llama3` leaves the high ones alone (Llama 3.1)."""
    factor: float = Field(8.0, ge=1)
    """How many times longer the context becomes."""
    low_freq_factor: float = Field(1.0, gt=0)
    """llama3: wavelengths above original_context / low_freq_factor are divided by `factor`."""
    high_freq_factor: float = Field(4.0, gt=0)
    """llama3: wavelengths below original_context / high_freq_factor are kept."""
    original_context: int = Field(8192, ge=1)
    """llama3: context length of the first training, in tokens."""

    @model_validator(mode="after")
    def _check(self) -> "RopeScaling":
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.type == "llama3" and low >= high:
            raise ValueError(f"high_freq_factor {high:g} must be above low_freq_factor {low:g}")
        return self


class MoEConfig(Section):
    """A mixture of experts in the place of each block's feed-forward layer; an expert's width is `ffn_size`."""

    experts: int = Field(8, ge=1)
    """Experts of a layer."""
    top_k: int = Field(2, ge=1)
    """Experts that a token is sent to."""
    shared_size: int = Field(0, ge=0)
    """Inner width of an expert that every token passes (DeepSeekMoE, arXiv 2401.06066); 0: none."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """What makes scores of the router's logits, in fp32."""
    renormalise: bool = True
    """Divide the chosen experts' scores by their sum."""
    balance: Literal["bias", "global", "switch", "none"] = "bias"
    """What evens the experts' load: a bias on the choice alone (arXiv 2408.15664), alike at any number of ranks and
    micro-batches; the Switch loss (arXiv 2101.03961) with the load of all ranks' micro-batches (global, arXiv
    2501.11873; of a replica's where `parallel.sync` is not all_reduce) or of each alone (switch)."""
    bias_rate: float = Field(1e-3, gt=0, le=1)
    """Balance bias: by how much a bias moves in a step."""
    balance_loss: float = Field(1e-2, ge=0)
    """Balance global and switch: weight of the loss."""
    z_loss: float = Field(1e-3, ge=0)
    """Weight of the router's z-loss, mean(logsumexp(logits)^2) (ST-MoE, arXiv 2202.08906)."""
    capacity: float | None = Field(None, gt=0)
    """Tokens that an expert takes of a training's micro-batch, as a multiple of its even share; the rest is dropped.
    Default: nothing is."""

    @model_validator(mode="after")
    def _choice(self) -> "MoEConfig":
        if self.top_k > self.experts:
            raise ValueError(
                f"top_k {self.top_k} is more than the {self.experts} experts there are; "
                f"the nearest possible: {self.experts}"
            )
        return self


class RevFFNConfig(Section):
    """Reversible blocks of two streams, each half of hidden_size wide (RevFFN, arXiv 2512.20920)."""

    streams: Literal["grid", "fp32"] = "grid"
    """grid: what is added to a stream is rounded to multiples of 2^-grid_bits, so that subtracting it again is exact;
    fp32: as it comes."""
    grid_bits: int = Field(14, ge=4, le=20)
    """Exact while a stream is smaller than 2^(24 - grid_bits)."""
    anchor_every: int | None = Field(None, ge=1)
    """Blocks after which the streams are kept, as where reconstruction begins anew; default: only at the end."""
    iterations: int = Field(4, ge=1, le=64)
    """Coupling revffn: fixed-point iterations that invert the attention half."""
    adapters: bool = False
    """Full-width layers between a linear adapter up and one down, as pre-trained layers need."""


class ModelConfig(Section):
    """A Llama-family decoder-only transformer."""

    vocab_size: int = Field(ge=2)
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    hidden_size: int = Field(ge=1)
    """Width of the residual stream."""
    num_layers: int = Field(ge=1, le=100_000)
    """Number of blocks."""
    num_heads: int = Field(ge=1)
    """Query heads."""
    num_kv_heads: int | None = Field(None, ge=1)
    """Key and value heads (grouped-query attention); default: as many as query heads."""
    head_dim: int | None = Field(None, ge=2)
    """Width of one head; default: hidden_size / num_heads."""
    ffn_size: int = Field(ge=1)
    """Inner width of the SwiGLU feed-forward layer, or of each expert."""
    ffn: Literal["dense", "moe"] = "dense"
    """Feed-forward layers: one for all tokens, or a mixture of experts."""
    moe: MoEConfig = MoEConfig()
    """Of ffn moe."""
    blocks: Literal["standard", "revffn"] = "standard"
    """standard pre-norm blocks, or reversible ones, whose activations are computed again in backward."""
    coupling: Literal["exact", "revffn"] = "exact"
    """Of reversible blocks: exact, attention reads the other stream alone, so that it inverts explicitly; revffn,
    queries come from the attention's own stream, as published, and a fixed-point iteration inverts it."""
    revffn: RevFFNConfig = RevFFNConfig()
    """Of blocks revffn."""
    canon: Literal["none", "A", "C", "AC"] = "none"
    """Canon layers (arXiv 2512.17351), which mix a token with the three before it: between norm and attention (A),
    between norm and feed-forward layer (C), or both."""
    rope_theta: float = Field(10_000.0, gt=0)
    """Base of the rotary frequencies (RoPE, arXiv 2104.09864)."""
    rope_scaling: RopeScaling | None = None
    """Stretching of the rotary frequencies; none by default."""
    norm_eps: float = Field(1e-5, gt=0, lt=1)
    """Epsilon of RMSNorm."""
    qk_norm: bool = False
    """RMSNorm over each query and key head before RoPE (as in Qwen3)."""
    tied_embeddings: bool = False
    """Use the embedding's weight as the output head."""
    z_loss: float = Field(0.0, ge=0)
    """Weight of the z-loss, mean(logsumexp(logits)^2) (PaLM, arXiv 2204.02311, section 5)."""
    init_std: float | None = Field(None, gt=0)
    """Standard deviation of the initial weights; default sqrt(2 / (5 * width)) of what layers read ("small init",
    arXiv 1910.05895); the projections that write to the residual stream are divided by sqrt(2 * num_layers)."""

    @model_validator(mode="after")
    def _shapes(self, info: ValidationInfo) -> "ModelConfig":
        units = self.units(*(info.context or {}).get("multiples", ()))
        self._check_widths(units)
        if self.blocks == "revffn" and self.coupling == "revffn" and "A" in self.canon:
            raise ValueError(
                f"canon {self.canon} has a layer before attention, which with coupling revffn reads two streams; "
                "canon C and coupling exact work"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}; the nearest "
                f"num_kv_heads: {nearest_divisor(self.num_heads, self.kv_heads)}"
            )
        return self

    def _check_widths(self, units: dict[str, int]) -> None:
        """Streams and heads divide the hidden width, heads are even, and grouped products take multiples."""
        width, halves = self.hidden_size, self.blocks == "revffn"
        near = nearest_multiple(width, units["hidden_size"])
        parts = [(2, "2 streams")] if halves else []
        if self.head_dim is None and halves and not self.revffn.adapters:
            parts.append((2 * self.num_heads, f"the streams' heads, 2 x num_heads {self.num_heads}"))
        elif self.head_dim is None:
            parts.append((self.num_heads, f"num_heads {self.num_heads}"))
        for unit, what in parts:
            if width % unit:
                also = "" if near == nearest_multiple(width, unit) else ", and suits all layers"
                raise ValueError(
                    f"hidden_size {width} is not divisible by {what}; the nearest width that is{also}: {near}"
                )
        if self.dim_per_head % 2:
            what = f"hidden_size {width} gives heads an odd width of {self.dim_per_head}"
            if self.head_dim is not None:
                what = f"head_dim {self.head_dim} is odd"
                near = nearest_multiple(self.head_dim, units["head_dim"])
            raise ValueError(f"{what}, and RoPE rotates pairs; the nearest possible: {near}")
        for name, read in (("hidden_size", self.inner_size), ("ffn_size", self.ffn_size)):
            if self.ffn == "moe" and read % GROUPED:
                near = nearest_multiple(getattr(self, name), units[name])
                key = "" if getattr(self, name) == read else f" {name}"
                raise ValueError(
                    f"{name} gives experts a width of {read}, and grouped products take multiples of {GROUPED}; the "
                    f"nearest{key}: {near}"
                )

    def units(self, layers: int = 1, keys: int = 1) -> dict[str, int]:
        """Of what `hidden_size`, `ffn_size` and `head_dim` must be multiples.

        layers, keys: of what a run's products take multiples (2:4 sparse, FP8): in the widths that layers read, and in
        that of attention's keys, of all heads together.
        """
        layers = math.lcm(layers, GROUPED if self.ffn == "moe" else 1)
        head = math.lcm(2, keys // math.gcd(keys, nearest_divisor(self.num_heads, self.kv_heads)))
        inner = math.lcm(layers, self.num_heads * head if self.head_dim is None else 1)
        halves = self.blocks == "revffn"
        hidden = 2 * inner if halves and not self.revffn.adapters else math.lcm(inner, 2 if halves else 1)
        return {"hidden_size": hidden, "ffn_size": layers, "head_dim": head}

    @property
    def inner_size(self) -> int:
        """Width of what attention and feed-forward layers read and write: a stream's in reversible blocks."""
        narrow = self.blocks == "revffn" and not self.revffn.adapters
        return self.hidden_size // 2 if narrow else self.hidden_size

    @property
    def dim_per_head(self) -> int:
        """Width of one head."""
        return self.head_dim if self.head_dim is not None else self.inner_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads if self.num_kv_heads is not None else self.num_heads

    @property
    def std(self) -> float:
        """Standard deviation of the initial weights."""
        return self.init_std if self.init_std is not None else (2 / (5 * self.inner_size)) ** 0.5

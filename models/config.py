"""The shape of a model. Imports no torch, so that the planner can count parameters in milliseconds."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A section of the configuration: unknown keys are refused, attribute docstrings become help."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


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


class ModelConfig(Section):
    """A Llama-family decoder-only transformer."""

    vocab_size: int = Field(ge=2)
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    hidden_size: int = Field(ge=1)
    """Width of the residual stream."""
    num_layers: int = Field(ge=1)
    """Number of blocks."""
    num_heads: int = Field(ge=1)
    """Query heads."""
    num_kv_heads: int | None = Field(None, ge=1)
    """Key and value heads (grouped-query attention); default: as many as query heads."""
    head_dim: int | None = Field(None, ge=2)
    """Width of one head; default: hidden_size / num_heads."""
    ffn_size: int = Field(ge=1)
    """Inner width of the SwiGLU feed-forward layer."""
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
    """Standard deviation of the initial weights; default sqrt(2 / (5 * hidden_size)) ("small init",
    arXiv 1910.05895); the projections that write to the residual stream are divided by sqrt(2 * num_layers)."""

    @model_validator(mode="after")
    def _shapes(self) -> "ModelConfig":
        if self.head_dim is None and self.hidden_size % self.num_heads:
            near = max(1, round(self.hidden_size / self.num_heads)) * self.num_heads
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}; "
                f"the nearest width that is: {near}"
            )
        if self.dim_per_head % 2:
            raise ValueError(f"head_dim {self.dim_per_head} is odd; RoPE rotates pairs and needs an even one")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}")
        return self

    @property
    def dim_per_head(self) -> int:
        """Width of one head."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads if self.num_kv_heads is not None else self.num_heads

    @property
    def std(self) -> float:
        """Standard deviation of the initial weights."""
        return self.init_std if self.init_std is not None else (2 / (5 * self.hidden_size)) ** 0.5

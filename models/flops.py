"""Exact counts of parameters and floating-point operations, from the shape alone (no torch)."""

from dataclasses import dataclass

from stepline.models.config import CANON_TAPS, ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of weights."""

    total: int
    """All of them; a tied head is counted once."""
    embedding: int
    """Embedding, and the head when it is not tied."""
    linear: int
    """Linear weights without embedding and head: the N of the scaling laws and of Step Law
    (arXiv 2503.04715)."""
    norm: int
    """Weights of the norms."""
    canon: int
    """Weights of the Canon layers."""
    active: int
    """Linear weights that one token uses: `linear` in a dense model, those of top_k experts in a mixture."""


@dataclass(frozen=True)
class FlopsPerToken:
    """Floating-point operations of forward and backward for one token, recomputation not counted."""

    matmul: int
    """6 for each weight of a product, the head's included (2 forward, 4 backward); norms and Canon layers are no
    products."""
    attention_full: int
    """12 * layers * heads * head_dim * seq: scores and values as if every token saw the whole sequence."""
    attention_causal: int
    """Half of it: what a causal mask leaves to compute."""

    @property
    def total(self) -> int:
        """`matmul + attention_causal`: only work that must be done. Stepline's MFU uses this; it is the
        lower of the two conventions."""
        return self.matmul + self.attention_causal

    @property
    def total_full(self) -> int:
        """`matmul + attention_full`: the convention of PaLM (arXiv 2204.02311, appendix B), nanoGPT and
        torchtitan, to compare with their MFU."""
        return self.matmul + self.attention_full


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Numbers of weights of the model with this shape."""
    dim, head_dim, layers = config.inner_size, config.dim_per_head, config.num_layers
    reversible = config.blocks == "revffn"
    width = config.hidden_size // 2 if reversible else config.hidden_size  # of a stream
    adapters = 4 * width * config.hidden_size if reversible and config.revffn.adapters else 0
    norms = 3 if reversible and config.coupling == "revffn" else 2
    attention = 2 * dim * head_dim * (config.num_heads + config.kv_heads)  # wq and wo, wk and wv
    expert = 3 * dim * config.ffn_size
    if config.ffn == "moe":
        always = dim * config.moe.experts + 3 * dim * config.moe.shared_size  # router and shared expert
        held, used = config.moe.experts * expert + always, config.moe.top_k * expert + always
    else:
        held = used = expert
    linear = layers * (attention + held + adapters)
    embedding = config.vocab_size * config.hidden_size * (1 if config.tied_embeddings else 2)
    norm = layers * (norms * width + (2 * head_dim if config.qk_norm else 0)) + config.hidden_size
    canon = layers * sum(place in config.canon for place in "AC") * CANON_TAPS * width
    active = linear - layers * (held - used)
    return ParameterCounts(linear + embedding + norm + canon, embedding, linear, norm, canon, active)


def flops_per_token(config: ModelConfig, seq_len: int) -> FlopsPerToken:
    """Operations of one training step for each token of sequences of `seq_len` tokens."""
    weights = parameter_counts(config).active + config.vocab_size * config.hidden_size
    if config.blocks == "revffn" and config.revffn.adapters and config.coupling == "revffn":
        weights += (
            config.num_layers * config.hidden_size**2 // 2
        )  # the adapter of queries takes keys and values too
    full = 12 * config.num_layers * config.num_heads * config.dim_per_head * seq_len
    return FlopsPerToken(6 * weights, full, full // 2)

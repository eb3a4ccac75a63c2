"""Configuration of a Stepline model for `transformers`; a copy stands in the folder of an export."""

from transformers import PretrainedConfig


class SteplineConfig(PretrainedConfig):
    """A decoder of standard or reversible blocks, with dense layers or a mixture of experts."""

    model_type = "stepline"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rotary=None,
        initializer_range=0.02,
        qk_norm=False,
        canon="none",
        reversible=False,
        queries_of_own_stream=False,
        adapters=False,
        grid_bits=None,
        num_experts=0,
        num_experts_per_tok=2,
        shared_expert_size=0,
        router_score="softmax",
        norm_topk_prob=True,
        use_cache=True,
        tie_word_embeddings=False,
        stepline=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rotary = rotary or {"theta": 10000.0, "scaling": None}
        """Under a name of its own, as versions of transformers rewrite `rope_theta` and `rope_scaling` differently."""
        self.initializer_range = initializer_range
        self.qk_norm = qk_norm
        self.canon = canon
        """Canon layers (arXiv 2512.17351) before attention (A), feed-forward layers (C), both (AC), or none."""
        self.reversible = reversible
        """Blocks of two streams, each half of hidden_size wide."""
        self.queries_of_own_stream = queries_of_own_stream
        """Reversible: queries come from the attention's own stream, keys and values from the other."""
        self.adapters = adapters
        """Reversible: layers of the full width between linear adapters."""
        self.grid_bits = grid_bits
        """Reversible: what is added to a stream is rounded to multiples of 2^-grid_bits."""
        self.num_experts = num_experts
        """0: dense feed-forward layers."""
        self.num_experts_per_tok = num_experts_per_tok
        self.shared_expert_size = shared_expert_size
        self.router_score = router_score
        self.norm_topk_prob = norm_topk_prob
        self.use_cache = use_cache
        self.stepline = stepline
        """The model section of Stepline's own configuration, from which `stepline import` makes a run."""
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

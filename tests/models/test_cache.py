"""Logits with a cache of keys and values are those of the whole sequence, at every position."""

import pytest
import torch

from stepline.models.cache import KVCache
from stepline.models.config import ModelConfig
from stepline.models.init import init_model
from stepline.models.sparse_linear import Recipe, convert
from stepline.models.transformer import Transformer

SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 48,
    "init_std": 0.2,
}  # fmt: skip
MOE = {"ffn": "moe", "moe": {"experts": 6, "top_k": 2, "shared_size": 16, "capacity": 0.5}}
KINDS = {
    "standard": {"qk_norm": True},
    "tied, head_dim, linear scaling": {
        "tied_embeddings": True, "head_dim": 24, "rope_scaling": {"type": "linear", "factor": 3}
    },
    "one key head, llama3 scaling": {"num_kv_heads": 1, "rope_scaling": {"original_context": 12, "factor": 4}},
    "mixture with a capacity, which is of training": MOE,
    "revffn exact": {"blocks": "revffn", "qk_norm": True},
    "revffn, own queries, fp32 streams": {
        "blocks": "revffn", "coupling": "revffn", "revffn": {"streams": "fp32"}
    },
    "revffn mixture with adapters": {"blocks": "revffn", "revffn": {"adapters": True}, **MOE},
    "canon": {"canon": "AC", "qk_norm": True},
    "canon, revffn mixture with adapters": {
        "canon": "AC", "blocks": "revffn", "revffn": {"adapters": True}, **MOE
    },
    "2:4 sparse": {},
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_equal_those_of_the_whole_sequence(kind):
    config = ModelConfig(**SHAPE | KINDS[kind])
    model = Transformer(config).double()
    if "sparse" in kind:
        convert(model, Recipe(sparse=True), Recipe())
    init_model(model, config, seed=0)
    for name, p in model.named_parameters():
        if "canon" in name:
            p.copy_(torch.linspace(-0.5, 0.5, p.numel()))
    for name, buffer in model.named_buffers():
        if name.endswith("beta"):
            buffer.fill_(1.25)
        elif name.endswith("balance_bias"):
            buffer.copy_(torch.linspace(-0.1, 0.1, buffer.numel()))
    model.eval()
    tokens = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(1))
    whole = model(tokens)
    assert whole.std() > 0.3
    # a prompt, single tokens, and several at once behind a past
    cache = KVCache(config, 24, batch=2, device=tokens.device, dtype=torch.float64)
    parts = [model(part, cache=cache) for part in tokens.split([9, 1, 1, 5, 1, 7], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
    cache.length = 0  # begins anew, with nothing of what it held
    torch.testing.assert_close(model(tokens[:, :9], cache=cache), whole[:, :9], rtol=0, atol=1e-12)
    cache.length = 24
    with pytest.raises(ValueError, match="a cache of 24 tokens cannot hold 25"):
        model(tokens[:, :1], cache=cache)

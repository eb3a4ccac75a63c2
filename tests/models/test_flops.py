"""Counts from the shape against modules on the meta device and torch's own operation counter."""

import functools
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stepline.models import transformer
from stepline.models.config import ModelConfig
from stepline.models.flops import flops_per_token, parameter_counts
from stepline.models.init import init_model
from stepline.models.revffn import run_reversible
from stepline.models.transformer import Transformer

SMALL = {"vocab_size": 96, "hidden_size": 48, "num_layers": 3, "num_heads": 6, "ffn_size": 80}
SHAPES = {
    "mha": ModelConfig(**SMALL),
    "gqa tied": ModelConfig(**SMALL, num_kv_heads=2, tied_embeddings=True),
    "wide heads": ModelConfig(**SMALL, num_kv_heads=3, head_dim=16, qk_norm=True),
    "canon": ModelConfig(**SMALL, canon="AC"),
    "reversible": ModelConfig(**SMALL, blocks="revffn"),
    "reversible, canon": ModelConfig(**SMALL, blocks="revffn", canon="C"),
    "reversible, adapters": ModelConfig(
        **SMALL, blocks="revffn", coupling="revffn", qk_norm=True, revffn={"adapters": True}
    ),
    "reversible experts": ModelConfig(**SMALL, blocks="revffn", ffn="moe", moe={"experts": 6, "top_k": 2}),
    "experts": ModelConfig(**SMALL, ffn="moe", moe={"experts": 6, "top_k": 2, "shared_size": 24}),
}
LLAMA3_8B = ModelConfig(
    vocab_size=128256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_size=14336
)


@pytest.mark.parametrize("config", [*SHAPES.values(), LLAMA3_8B], ids=[*SHAPES, "llama3 8b"])
def test_parameters_equal_modules(config):
    with torch.device("meta"):
        model = Transformer(config)
    counts = parameter_counts(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert counts.total == sum(sizes.values())
    assert counts.embedding == sum(n for k, n in sizes.items() if k in ("embed.weight", "head.weight"))
    assert counts.norm == sum(n for k, n in sizes.items() if "norm" in k)
    assert counts.canon == sum(n for k, n in sizes.items() if "canon" in k)
    assert counts.linear == counts.total - counts.embedding - counts.norm - counts.canon
    unused = sum(n // 6 * 4 for k, n in sizes.items() if "experts" in k)  # 4 of 6 experts
    assert counts.active == counts.linear - unused


def test_llama3_8b_has_its_published_size():
    assert parameter_counts(LLAMA3_8B).total == 8_030_261_248


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_flops_equal_torch_counter(config, monkeypatch):
    # the recompute of reversible blocks is no work that must be done
    monkeypatch.setattr(transformer, "run_reversible", functools.partial(run_reversible, stored=True))
    batch, seq = 2, 32
    tokens = torch.randint(0, config.vocab_size, (batch, seq))
    experts = config.ffn == "moe"  # whose products need their tokens' numbers: real tensors
    with torch.device("cpu" if experts else "meta"):
        model = Transformer(config)
        tokens = tokens.to(model.norm.weight.device)
    if experts:
        init_model(model, config, seed=0)
    counter = FlopCounterMode(display=False)
    with counter:
        nll, _ = model(tokens, tokens)
        nll.backward()
    counts = counter.get_flop_counts()["Global"]
    flops = flops_per_token(config, seq)
    products = sum(n for op, n in counts.items() if "attention" not in str(op))
    attention = sum(n for op, n in counts.items() if "attention" in str(op))
    if experts:  # torch does not count the CPU's attention kernel
        attention = flops.attention_full * batch * seq
    elif attention == 0:  # the math path: two of the products are attention's
        products, attention = flops.matmul * batch * seq, products - flops.matmul * batch * seq
    assert products == flops.matmul * batch * seq
    assert attention in (flops.attention_full * batch * seq, flops.attention_full * batch * seq * 7 // 6)
    assert flops.total == flops.matmul + flops.attention_full // 2
    assert flops.total_full == flops.matmul + flops.attention_full


def test_counts_do_not_import_torch():
    code = "import sys, stepline.models.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

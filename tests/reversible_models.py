"""Small reversible models for tests: backward reads stored activations where it is asked to, the reference. Loaded with
`runpy.run_path`; names are what it returns."""

import contextlib
import functools
from unittest import mock

import torch

from stepline.models import transformer
from stepline.models.config import ModelConfig
from stepline.models.init import init_parameter
from stepline.models.reversible import Half
from stepline.models.revffn import run_reversible
from stepline.models.transformer import Transformer

VOCAB = 61
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
EXPERTS, TOP_K = 5, 2
MOES = {
    "bias": {"balance": "bias"},
    "switch": {"balance": "switch", "balance_loss": 0.5, "z_loss": 0.1, "score": "sigmoid", "shared_size": 8},
}
"""Keys of `model.moe`, by name."""


def shape(layers=4, coupling="exact", streams="grid", **revffn) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=layers, num_heads=2, num_kv_heads=1, ffn_size=24,
        init_std=0.2, blocks="revffn", coupling=coupling, revffn={"streams": streams, **revffn},
    )  # fmt: skip


def mixture(moe: str) -> dict:
    """Of a `ModelConfig`."""
    return {"ffn": "moe", "moe": {"experts": EXPERTS, "top_k": TOP_K} | MOES[moe]}


class Model(Transformer):
    """With `stored`, backward reads stored activations: the reference, of the same arithmetic."""

    def forward(self, *inputs, stored=False, **more):
        run = functools.partial(run_reversible, stored=stored)
        with mock.patch.object(transformer, "run_reversible", run):
            return super().forward(*inputs, **more)


@torch.no_grad()
def tilt(model):
    """Biases of the mixtures' choices that do something."""
    for i, layer in enumerate(model.layers):
        layer.ffn.router.balance_bias.copy_(torch.linspace(-0.05, 0.05, EXPERTS).roll(i))


def targets_of(tokens):
    """The tokens behind them; the last three of the first row carry no loss, and the routers do not count them."""
    targets = tokens.roll(-1, 1)
    targets[0, -3:] = -100
    return targets


@torch.no_grad()
def build(config, dtype=torch.float32):
    model = Model(config)
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        p.copy_(init_parameter(name, p.shape, config, seed=0))
        if p.ndim == 1:  # norms that do something
            p.add_(torch.rand(p.shape, generator=generator))
    return model.to(dtype)


def gentle(model):
    """A fixed point needs a contraction: streams that are large beside what attention adds."""
    with torch.no_grad():
        model.embed.weight.mul_(5)
        for layer in model.layers:
            layer.attn.wo.weight.mul_(0.3)
    return model


def tokens(seed=1, batch=2, seq=10):
    return torch.randint(0, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


def loss_of(logits):
    return logits.float().logsumexp(-1).sum() - logits.float()[..., 7].sum()


def taken(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def read_streams(model):
    """The streams that each block reads, by block: a list that fills up."""
    seen = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _m, args: seen.append((args[0].detach(), args[1].detach())))
    return seen


@contextlib.contextmanager
def inversions():
    """A list of the (own, other) that backward finds, by half, last half first."""
    found, invert = [], Half.invert

    def spy(half, y, other):
        own = invert(half, y, other)
        found.append((own, other))
        return own

    with mock.patch.object(Half, "invert", spy):
        yield found

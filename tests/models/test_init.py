"""Initial weights: slices equal the whole bit for bit; the distribution is the documented normal."""

from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepline.models.config import ModelConfig
from stepline.models.init import GAMMA, init_model, init_parameter, normal, normal_quantile, stream_key
from stepline.models.transformer import Transformer

CONFIG = ModelConfig(vocab_size=50, hidden_size=32, num_layers=3, num_heads=4, ffn_size=80, qk_norm=True)
MASK = (1 << 64) - 1


def one_value(key, index):
    """The same stream in Python integers and the library's quantile."""
    x = (key + index * GAMMA) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    x ^= x >> 31
    return NormalDist().inv_cdf(((x >> 12) + 0.5) / 2**52)


def test_values_equal_python_integers():
    key = stream_key(3, "layers.0.attn.wq.weight")
    index = torch.cat((torch.arange(500), torch.arange(2**40, 2**40 + 500)))
    expected = torch.tensor([one_value(key, i) for i in index.tolist()], dtype=torch.float64)
    torch.testing.assert_close(normal(index, key), expected, rtol=3e-7, atol=0)


def test_quantile_far_in_the_tails():
    u = torch.tensor([1e-15, 1e-12, 1e-5, 0.0749, 0.0751, 0.5, 0.9249, 0.9251, 1 - 1e-9], dtype=torch.float64)
    expected = torch.tensor([NormalDist().inv_cdf(x) for x in u.tolist()], dtype=torch.float64)
    torch.testing.assert_close(normal_quantile(u), expected, rtol=3e-7, atol=0)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_slice_equals_whole(data):
    shape = data.draw(st.lists(st.integers(1, 17), min_size=2, max_size=3))
    offset = [data.draw(st.integers(0, n)) for n in shape]
    extent = [data.draw(st.integers(0, n - o)) for n, o in zip(shape, offset, strict=True)]
    whole = init_parameter("embed.weight", shape, CONFIG, seed=1)
    part = init_parameter("embed.weight", shape, CONFIG, 1, offset, extent)
    expected = whole[tuple(slice(o, o + n) for o, n in zip(offset, extent, strict=True))]
    assert part.shape == expected.shape
    assert torch.equal(part, expected)


def test_slice_equals_whole_across_chunks_and_threads():
    shape = (1501, 1003)
    whole = init_parameter("head.weight", shape, CONFIG, seed=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        parts = [
            init_parameter("head.weight", shape, CONFIG, 1, (o, 0), (n, 1003))
            for o, n in ((0, 376), (376, 376), (752, 376), (1128, 373))
        ]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat(parts), whole)


def test_normal_moments():
    x = normal(torch.arange(10**6), stream_key(0, "x"))
    assert abs(x.mean()) < 0.004  # four standard errors
    assert abs(x.var() - 1) < 0.006
    assert abs(x.pow(3).mean()) < 0.016
    assert abs(x.pow(4).mean() - 3) < 0.04
    for lag in (1, 2, 1000):
        assert abs((x[lag:] * x[:-lag]).mean()) < 0.004


def test_names_and_seeds_are_uncorrelated():
    streams = [normal(torch.arange(10**5), stream_key(s, n)) for s in (0, 1) for n in ("a", "b", "layers.1")]
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(6, dtype=torch.float64)
    assert correlation.abs().max() < 0.015


@pytest.mark.parametrize("tied", [False, True])
def test_model_has_documented_stds(tied):
    config = ModelConfig(
        vocab_size=900, hidden_size=128, num_layers=8, num_heads=4, ffn_size=300, tied_embeddings=tied
    )
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    init_model(model, config, seed=5)
    std = (2 / (5 * 128)) ** 0.5
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, torch.ones_like(p))
            continue
        expected = std / 4 if name.endswith(("wo.weight", "w2.weight")) else std  # sqrt(2 * 8 layers) = 4
        assert p.std().item() == pytest.approx(expected, rel=0.03), name


def test_init_model_equals_init_parameter():
    model = Transformer(CONFIG)
    init_model(model, CONFIG, seed=2)
    w = model.layers[1].ffn.w2.weight
    assert torch.equal(w, init_parameter("layers.1.ffn.w2.weight", w.shape, CONFIG, 2))
    assert not torch.equal(w, init_parameter("layers.1.ffn.w2.weight", w.shape, CONFIG, 3))
    assert (model.layers[0].attn.q_norm.weight == 1).all()

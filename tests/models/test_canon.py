"""Canon layers against the equation in float64, inside blocks too."""

import itertools

import pytest
import torch
from pydantic import ValidationError

from stepline.models.canon import Canon
from stepline.models.config import CANON_TAPS, ModelConfig
from stepline.models.init import init_model
from stepline.models.transformer import Transformer

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_size": 48,
    "init_std": 0.2,
}
LENGTHS = (5, 1, 9, 3)


def equation(x, w):
    """y_t = x_t + sum_j w_j * x_(t-j) of one document `[seq, dim]`, token by token; `w` `[4, dim]`."""
    rows = []
    for t in range(len(x)):
        y = x[t]
        for j in range(min(CANON_TAPS, t + 1)):
            y = y + w[j] * x[t - j]
        rows.append(y)
    return torch.stack(rows)


def layer(dim=6, seed=0):
    canon = Canon(dim).double()
    with torch.no_grad():
        canon.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return canon


@pytest.mark.parametrize("seq", [1, 2, 3, 4, 11])
def test_values_and_gradients_are_those_of_the_equation(seq):
    canon, draw = layer(), torch.Generator().manual_seed(seq)
    x, target = (torch.randn(3, seq, 6, dtype=torch.float64, generator=draw) for _ in range(2))
    x.requires_grad_()
    taps = canon.weight.detach().view(CANON_TAPS, 6).requires_grad_()
    expected = torch.stack([equation(row, taps) for row in x])
    torch.testing.assert_close(canon(x), expected, rtol=0, atol=1e-14)
    wanted = torch.autograd.grad((expected * target).sum(), (x, taps))
    got = torch.autograd.grad((canon(x) * target).sum(), (x, canon.weight))
    torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(got[1].view(CANON_TAPS, 6), wanted[1], rtol=0, atol=1e-13)


def test_nothing_is_read_from_another_document():
    draw = torch.Generator().manual_seed(1)
    canon, x = layer(), torch.randn(1, sum(LENGTHS), 6, dtype=torch.float64, generator=draw)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0)
    expected = torch.cat([canon(part) for part in x.split(LENGTHS, 1)], 1)
    torch.testing.assert_close(canon(x, positions), expected, rtol=0, atol=1e-14)


def test_at_first_it_does_nothing():
    """So that a model with Canon layers begins as the same model without."""
    config = ModelConfig(**SHAPE)
    tokens, logits = torch.arange(20).view(2, 10), []
    for changed in ({}, {"canon": "AC"}):
        model = Transformer(config.model_copy(update=changed))
        init_model(model, model.config, seed=3)
        logits.append(model(tokens))
    assert torch.equal(*logits)


@pytest.mark.parametrize("canon", ["A", "C", "AC"])
@pytest.mark.parametrize("blocks", ["standard", "revffn"])
def test_a_model_reads_earlier_tokens_of_the_same_document_alone(canon, blocks):
    model = random_model(canon=canon, blocks=blocks)
    assert sum(name.endswith("canon.weight") for name, _ in model.named_parameters()) == 2 * len(canon)
    tokens = torch.randint(0, 61, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    whole, changed = model(tokens), tokens.clone()
    changed[0, 7] += 1
    apart = (model(changed) - whole).abs().amax(-1)[0]
    assert apart[:7].max() == 0
    assert apart[7:].min() > 0
    packed = model(
        tokens, doc_ids=torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS)).unsqueeze(0)
    )
    for start, end in itertools.pairwise((0, *itertools.accumulate(LENGTHS))):
        alone = model(tokens[:, start:end])
        torch.testing.assert_close(
            packed[:, start:end], alone, rtol=0, atol=1e-6
        )  # RoPE's tables are in fp32


def random_model(**changed):
    config = ModelConfig(**SHAPE | changed)
    model = Transformer(config).double()
    init_model(model, config, seed=0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "canon" in name:
                p.normal_(0, 0.5, generator=generator)
    return model


def test_two_streams_at_once_are_refused():
    with pytest.raises(ValidationError, match="with coupling revffn reads two streams; canon C and"):
        ModelConfig(**SHAPE, canon="AC", blocks="revffn", coupling="revffn")
    assert ModelConfig(**SHAPE, canon="C", blocks="revffn", coupling="revffn").canon == "C"

"""The mixture against a loop over tokens written from the equations, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from stepline.models.config import ModelConfig
from stepline.models.init import init_model
from stepline.models.moe import SUMS, MoE, Routing
from stepline.models.transformer import Transformer

WIDTH, EXPERTS, TOP_K = 16, 5, 2
SHAPE = {
    "vocab_size": 31,
    "hidden_size": WIDTH,
    "num_layers": 2,
    "num_heads": 2,
    "ffn_size": 24,
    "ffn": "moe",
}


def layer(**moe) -> MoE:
    config = ModelConfig(**SHAPE, moe={"experts": EXPERTS, "top_k": TOP_K} | moe)
    torch.manual_seed(1)
    made = MoE(config).double()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return made


def inputs(batch=2, seq=7):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, seq, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)


def swiglu(x, w1, w3, w2):
    return w2 @ (F.silu(w1 @ x) * (w3 @ x))


def naive(moe: MoE, x):
    """(result, choices): one token after the other, as in the equations."""
    c, experts = moe.config, moe.experts
    out, choices = [], []
    left = [
        math.inf if c.capacity is None else round(c.capacity * TOP_K * x[..., 0].numel() / EXPERTS)
    ] * EXPERTS
    for token in x.reshape(-1, WIDTH):
        logits = moe.router.weight @ token
        scores = logits.softmax(0) if c.score == "softmax" else 1 / (1 + torch.exp(-logits))
        best = sorted(range(EXPERTS), key=lambda e: -float(scores[e].detach() + moe.router.balance_bias[e]))[
            :TOP_K
        ]
        total = sum(scores[e] for e in best) if c.renormalise else 1.0
        y = torch.zeros(WIDTH, dtype=torch.float64)
        for e in best:
            if left[e] > 0:
                y = y + scores[e] / total * swiglu(token, experts.w1[e], experts.w3[e], experts.w2[e])
            left[e] -= 1
        if moe.shared is not None:
            y = y + swiglu(token, moe.shared.w1.weight, moe.shared.w3.weight, moe.shared.w2.weight)
        out.append(y)
        choices.append(best)
    return torch.stack(out).view_as(x), torch.tensor(choices)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score": "sigmoid"},
        {"renormalise": False},
        {"shared_size": 8},
        {"capacity": 0.8},
        {"score": "sigmoid", "renormalise": False, "shared_size": 16, "capacity": 1.2},
    ],
)
def test_equals_the_loop_over_tokens(options):
    moe, x = layer(**options), inputs()
    moe.router.balance_bias.copy_(torch.linspace(-0.3, 0.3, EXPERTS))
    expected, _ = naive(moe, x)
    out = moe(x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    variables = [x, *moe.parameters()]
    grad = torch.randn_like(out)
    for mine, reference in zip(
        torch.autograd.grad(out, variables, grad), torch.autograd.grad(expected, variables, grad), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("balance", ["switch", "global", "bias"])
def test_the_losses_of_the_router(score, balance):
    """Switch: E sum f P; z: mean logsumexp^2; both as sums over the valid tokens, scaled as the loss is."""
    moe, x = layer(score=score, balance=balance, balance_loss=0.3, z_loss=0.2), inputs()
    others = torch.tensor([3, 1, 0, 4, 2])  # tokens that other ranks sent to each expert
    moe.sum_ranks = lambda load: load + others
    moe.counting = True
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, 4:] = False
    scale = torch.tensor(0.125, dtype=torch.float64)
    out = moe(x, Routing(valid, scale))
    variables = [x, moe.router.weight]
    mine = torch.autograd.grad(out.sum(), variables)

    tokens = x.reshape(-1, WIDTH)[valid.flatten()]
    logits = tokens @ moe.router.weight.T
    p = (
        logits.softmax(-1)
        if score == "softmax"
        else logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    )
    plain, chosen = naive(moe, x)
    load = torch.zeros(EXPERTS)
    for token in chosen[valid.flatten()]:
        for e in token:
            load[e] += 1
    shared = load + others if balance == "global" else load
    f = shared.double() / shared.sum()
    z = logits.exp().sum(-1).log().square().sum()
    switch = EXPERTS * (f * p.sum(0)).sum()
    loss = 0.2 * z + (0.3 * switch if balance != "bias" else 0)
    expected = torch.autograd.grad(plain.sum() + scale * loss, variables)
    for m, e in zip(mine, expected, strict=True):
        torch.testing.assert_close(m, e, rtol=1e-11, atol=1e-12)

    assert moe.load.tolist() == load.tolist()
    entropy = -(p * p.log()).sum()
    sums = dict(zip(SUMS, moe.sums.tolist(), strict=True))
    assert sums == pytest.approx(
        {"tokens": 11, "entropy": entropy.item(), "z": z.item(), "balance": switch.item(), "dropped": 0},
        rel=1e-6,
    )


def test_padding_is_not_among_what_is_dropped():
    """All tokens alike: each expert that they choose takes one of them."""
    moe = layer(top_k=2, capacity=1e-9)
    moe.counting = True
    x = torch.ones(1, 8, WIDTH, dtype=torch.float64)
    for padding_first in (False, True):
        valid = torch.arange(8)[None] >= 5 if padding_first else torch.arange(8)[None] < 3
        moe.sums.zero_()
        moe(x, Routing(valid, torch.tensor(1.0)))
        dropped, tokens = (int(moe.sums[SUMS.index(name)]) for name in ("dropped", "tokens"))
        assert tokens == 3
        assert dropped == (2 * 3 if padding_first else 2 * 3 - 2)  # both experts take the first token


def test_uniform_routing_has_a_balance_loss_of_one():
    moe = layer(top_k=1, balance="switch")
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[:, :EXPERTS] = torch.eye(EXPERTS) * 1e-9  # equal probabilities, each expert once
    x = torch.eye(EXPERTS, WIDTH, dtype=torch.float64)[None]
    moe.counting = True
    moe(x, Routing(torch.ones(1, EXPERTS, dtype=torch.bool), torch.tensor(1.0)))
    assert moe.load.tolist() == [1] * EXPERTS
    tokens, balance = moe.sums[SUMS.index("tokens")], moe.sums[SUMS.index("balance")]
    assert float(balance / tokens) == pytest.approx(1, abs=1e-8)


def test_the_bias_moves_towards_an_even_load():
    moe = layer(balance="bias", bias_rate=0.01)
    load = torch.tensor([10, 0, 4, 4, 2])  # mean 4
    moe.move_bias(load)
    signs = torch.tensor([-1.0, 1, 0, 0, 1])
    torch.testing.assert_close(moe.router.balance_bias, (0.01 * (signs - 0.2)).double())
    before = moe.router.balance_bias.clone()
    moe.move_bias(load, keep=torch.tensor(1.0))
    assert torch.equal(moe.router.balance_bias, before)


def test_a_recompute_counts_nothing_twice():
    config = ModelConfig(**SHAPE, moe={"experts": EXPERTS, "top_k": TOP_K})
    loads = []
    for recompute in (False, True):
        model = Transformer(config)
        init_model(model, config, seed=0)
        for block in model.layers:
            if recompute:
                forward = block.forward
                block.forward = lambda *a, f=forward, **k: checkpoint(f, *a, use_reentrant=False, **k)
        tokens = torch.arange(20).view(2, 10)
        model(tokens, tokens, loss_scale=torch.tensor(0.05)).nll.backward()
        loads.append(torch.stack([block.ffn.load for block in model.layers]))
    assert loads[0].sum(1).tolist() == [20 * TOP_K] * 2
    assert torch.equal(*loads)


def test_a_replay_sends_tokens_where_the_recorded_forward_did():
    moe, x = layer(), inputs()
    with moe.record() as recorded:
        first = moe(x)
    moe.router.balance_bias.copy_(torch.linspace(5, -5, EXPERTS))  # a flip of nearly every choice
    assert not torch.allclose(moe(x), first)
    with moe.replay(recorded):
        assert torch.equal(moe(x), first)


def test_the_router_computes_in_fp32():
    config = ModelConfig(**SHAPE, moe={"experts": EXPERTS, "top_k": TOP_K})
    model = Transformer(config)
    init_model(model, config, seed=0)
    moe = model.layers[0].ffn.bfloat16()
    x = torch.randn(1, 4, WIDTH).bfloat16()
    logits = moe.router(x.view(-1, WIDTH))
    assert torch.equal(logits, x.view(-1, WIDTH).float() @ moe.router.weight.float().T)
    with torch.autocast("cpu", torch.bfloat16):
        assert moe.router(x.view(-1, WIDTH)).dtype == torch.float32

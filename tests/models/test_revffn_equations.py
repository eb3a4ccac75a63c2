"""Reversible blocks against formulas in float64, with loops over layers, heads and positions."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from stepline.models.revffn import RevBlock, inner_config

reversible = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "reversible_models.py")))
shape, build, gentle = reversible.shape, reversible.build, reversible.gentle
tokens, taken = reversible.tokens, reversible.taken


def naive_logits(w, c, row):
    """One row, float64, loops over layers, heads and positions; `w`: weights by name."""
    seq, d, half = len(row), c.dim_per_head, c.hidden_size // 2
    exact = c.revffn.streams != "grid"
    frequencies = 1.0 / c.rope_theta ** (torch.arange(0, d, 2).float() / d)

    def on_grid(h):
        return h if exact else torch.round(h * 2**c.revffn.grid_bits) / 2**c.revffn.grid_bits

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    def turn(x, position):
        angle = position * frequencies  # in fp32, as in transformers
        z = torch.complex(x[: d // 2], x[d // 2 :]) * torch.complex(
            angle.cos().double(), angle.sin().double()
        )
        return torch.cat((z.real, z.imag))

    def adapt(x, name):
        return F.linear(x, w[name]) if c.revffn.adapters else x

    x1, x2 = on_grid(w["embed.weight"][row][:, :half]), on_grid(w["embed.weight"][row][:, half:])
    for i in range(c.num_layers):
        p = f"layers.{i}."
        if c.coupling == "exact":
            q_in = kv_in = norm(x2, w[p + "attn_norm.weight"])
        else:
            q_in, kv_in = norm(x1, w[p + "attn_norm.weight"]), norm(x2, w[p + "attn_kv_norm.weight"])
        q_in, kv_in = (adapt(s, p + "attn_up.weight") for s in (q_in, kv_in))
        q, k, v = (F.linear(s, w[f"{p}attn.w{n}.weight"]) for n, s in zip("qkv", (q_in, kv_in, kv_in)))
        heads = []
        for head in range(c.num_heads):
            mine = slice(head * d, head * d + d)
            group = head // (c.num_heads // c.kv_heads)
            theirs = slice(group * d, group * d + d)
            rows = []
            for t in range(seq):
                keys = torch.stack([turn(k[s, theirs], s) for s in range(t + 1)])
                rows.append((keys @ turn(q[t, mine], t) / d**0.5).softmax(0) @ v[: t + 1, theirs])
            heads.append(torch.stack(rows))
        attended = F.linear(torch.cat(heads, -1), w[p + "attn.wo.weight"])
        x1 = x1 + on_grid(adapt(attended, p + "attn_down.weight"))
        h = adapt(norm(x1, w[p + "ffn_norm.weight"]), p + "ffn_up.weight")
        gate, up = F.linear(h, w[p + "ffn.w1.weight"]), F.linear(h, w[p + "ffn.w3.weight"])
        fed = F.linear(gate * gate.sigmoid() * up, w[p + "ffn.w2.weight"])
        x2 = x2 + on_grid(adapt(fed, p + "ffn_down.weight"))
    return F.linear(norm(torch.cat((x1, x2), -1), w["norm.weight"]), w["head.weight"])


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("streams", ["fp32", "grid"])
@pytest.mark.parametrize("coupling", ["exact", "revffn"])
def test_logits_equal_formulas(coupling, streams, adapters):
    config = shape(2, coupling, streams, adapters=adapters)
    model, batch = build(config, torch.float64), tokens(batch=1, seq=6)
    expected = naive_logits(dict(model.named_parameters()), config, batch[0])
    torch.testing.assert_close(model(batch)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("coupling", ["exact", "revffn"])
def test_gradients_equal_those_of_formulas(coupling):
    config = shape(2, coupling, "fp32", adapters=True, iterations=64)
    model, batch = gentle(build(config, torch.float64)), tokens(batch=1, seq=5)
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    naive_logits(weights, config, batch[0]).logsumexp(-1).sum().backward()
    model(batch).logsumexp(-1).sum().backward()
    for name, gradient in taken(model).items():
        torch.testing.assert_close(gradient, weights[name].grad, rtol=1e-9, atol=1e-11, msg=name)


def test_names_and_widths():
    narrow = {n: tuple(p.shape) for n, p in RevBlock(shape()).named_parameters()}
    assert narrow["attn.wq.weight"] == (16, 16)
    assert narrow["attn.wk.weight"] == (8, 16)
    assert narrow["ffn.w1.weight"] == (24, 16)
    assert set(narrow) == {
        "attn_norm.weight", "attn.wq.weight", "attn.wk.weight", "attn.wv.weight", "attn.wo.weight",
        "ffn_norm.weight", "ffn.w1.weight", "ffn.w3.weight", "ffn.w2.weight",
    }  # fmt: skip
    full = {
        n: tuple(p.shape) for n, p in RevBlock(shape(coupling="revffn", adapters=True)).named_parameters()
    }
    assert full["attn.wq.weight"] == (32, 32)
    assert full["attn_up.weight"] == full["ffn_up.weight"] == (32, 16)
    assert full["attn_down.weight"] == full["ffn_down.weight"] == (16, 32)
    assert full["attn_norm.weight"] == full["attn_kv_norm.weight"] == full["ffn_norm.weight"] == (16,)
    assert inner_config(shape()).inner_size == 16

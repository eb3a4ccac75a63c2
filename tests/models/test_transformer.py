"""The transformer against formulas in float64, its own pieces, and one batch learnt by heart."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from stepline.models.attention import attend, document_mask, document_positions
from stepline.models.config import ModelConfig
from stepline.models.init import init_model
from stepline.models.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=48, init_std=0.2
)


def build(config=CONFIG, dtype=torch.float64, seed=0):
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu").to(dtype)
    init_model(model, config, seed)
    return model


def some_tokens(*shape, vocab=61):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(1))


def naive_logits(model, tokens):
    """One row, float64, written with loops over heads and positions."""
    c, w = model.config, {n: p.detach().double() for n, p in model.named_parameters()}
    d, seq = c.dim_per_head, len(tokens)

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    def turn(x, position):  # complex numbers x_i + j x_{i + d/2}
        angle = position * c.rope_theta ** (-torch.arange(0, d, 2).double() / d)
        z = torch.complex(x[: d // 2], x[d // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag))

    x = w["embed.weight"][tokens]
    for i in range(c.num_layers):
        p = f"layers.{i}."
        h = norm(x, w[p + "attn_norm.weight"])
        q, k, v = (h @ w[f"{p}attn.w{n}.weight"].T for n in "qkv")
        out = torch.zeros(seq, c.num_heads * d, dtype=torch.float64)
        for head in range(c.num_heads):
            mine = slice(head * d, head * d + d)
            group = head // (c.num_heads // c.kv_heads)
            theirs = slice(group * d, group * d + d)
            for t in range(seq):
                keys = torch.stack([turn(k[s, theirs], s) for s in range(t + 1)])
                scores = keys @ turn(q[t, mine], t) / d**0.5
                out[t, mine] = scores.softmax(0) @ v[: t + 1, theirs]
        x = x + out @ w[p + "attn.wo.weight"].T
        h = norm(x, w[p + "ffn_norm.weight"])
        gate, up = h @ w[p + "ffn.w1.weight"].T, h @ w[p + "ffn.w3.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w[p + "ffn.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["head.weight"].T


def test_logits_equal_formulas():
    model, tokens = build(), some_tokens(1, 9)
    # the angles are fp32, as in transformers
    torch.testing.assert_close(model(tokens)[0], naive_logits(model, tokens[0]), rtol=0, atol=1e-6)


def test_loss_equals_logits():
    config = CONFIG.model_copy(update={"z_loss": 0.01})
    model, tokens, targets = build(config), some_tokens(2, 12), some_tokens(2, 12).roll(1, 1)
    targets[1, 5:] = -100
    logits = model(tokens)[targets != -100]
    nll, z = model(tokens, targets)
    assert nll.dtype == torch.float64
    torch.testing.assert_close(nll, F.cross_entropy(logits, targets[targets != -100], reduction="sum"))
    torch.testing.assert_close(z, logits.logsumexp(-1).square().sum())


def test_tied_gradient_is_the_sum_of_both_uses():
    tied = build(CONFIG.model_copy(update={"tied_embeddings": True}))
    untied = build()
    untied.load_state_dict(tied.state_dict() | {"head.weight": tied.embed.weight})
    tokens = some_tokens(2, 12)
    for model in (tied, untied):
        model(tokens, tokens.roll(-1, 1)).nll.backward()
    torch.testing.assert_close(tied.embed.weight.grad, untied.embed.weight.grad + untied.head.weight.grad)


LENGTHS = (5, 1, 9, 3)


def documents():
    ids = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    return torch.stack((ids, ids.flip(0)))


def test_document_positions():
    lengths = (LENGTHS, LENGTHS[::-1])
    expected = [[i for n in row for i in range(n)] for row in lengths]
    assert document_positions(documents()).tolist() == expected
    assert document_mask(documents()).sum().item() == 2 * sum(n * (n + 1) // 2 for n in LENGTHS)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 3e-5)])
def test_documents_equal_separate_runs(dtype, tolerance):
    model, tokens = build(dtype=dtype), some_tokens(2, sum(LENGTHS))
    packed = model(tokens, doc_ids=documents())
    for row, lengths in enumerate((LENGTHS, LENGTHS[::-1])):
        for start, end in itertools.pairwise((0, *itertools.accumulate(lengths))):
            alone = model(tokens[row : row + 1, start:end])[0]
            torch.testing.assert_close(packed[row, start:end], alone, rtol=0, atol=tolerance)


def test_one_document_equals_no_documents():
    model, tokens = build(), some_tokens(2, 10)
    torch.testing.assert_close(model(tokens, doc_ids=torch.ones_like(tokens)), model(tokens))


@pytest.mark.parametrize("masked", [False, True])
def test_grouped_heads_equal_repeated_heads(masked):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 18, 8, generator=g)
    k, v = torch.randn(2, 2, 2, 18, 8, generator=g).unbind()
    mask = document_mask(documents()) if masked else None
    k3, v3 = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
    torch.testing.assert_close(attend(q, k, v, mask), attend(q, k3, v3, mask), rtol=0, atol=1e-6)


def test_learns_one_batch_by_heart():
    config = ModelConfig(vocab_size=61, hidden_size=48, num_layers=2, num_heads=4, ffn_size=96)
    model, tokens = build(config, torch.float32), some_tokens(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0, fused=True)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    first = None
    for _ in range(150):
        loss = model(inputs, targets).nll / targets.numel()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first == pytest.approx(torch.tensor(61.0).log().item(), abs=0.5)
    assert loss.item() < 0.01

"""The loss and its gradients against formulas written out in float64."""

import pytest
import torch

from stepline.kernels.cross_entropy import IGNORE, linear_cross_entropy

TOKENS, HIDDEN, VOCAB = 13, 6, 11


def batch(dtype=torch.float64, ignored=(2, 3, 12)):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=g, dtype=torch.float64)
    weight = torch.randn(VOCAB, HIDDEN, generator=g, dtype=torch.float64)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=g)
    targets[list(ignored)] = IGNORE
    return hidden.to(dtype), weight.to(dtype), targets


def reference(hidden, weight, targets, z_weight):
    """Loss and gradients, token by token: d nll / d logits = p - onehot, d lse^2 / d logits = 2 lse p."""
    hidden, weight = hidden.double(), weight.double()
    nll = z = 0.0
    grad_h, grad_w = torch.zeros_like(hidden), torch.zeros_like(weight)
    for i, t in enumerate(targets.tolist()):
        if t == IGNORE:
            continue
        logits = weight @ hidden[i]
        total = logits.exp().sum()
        p, lse = logits.exp() / total, total.log()
        nll, z = nll - p[t].log(), z + lse**2
        g = p * (1 + 2 * z_weight * lse)
        g[t] -= 1
        grad_h[i], grad_w = g @ weight, grad_w + g.outer(hidden[i])
    return nll, z, grad_h, grad_w


CHUNKS = [4, 13, 100, None]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("z_weight", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_equals_formula(chunk, z_weight, dtype, tolerance):
    hidden, weight, targets = batch(dtype)
    nll, z, grad_h, grad_w = reference(hidden, weight, targets, z_weight)
    hidden.requires_grad_()
    weight.requires_grad_()
    got_nll, got_z = linear_cross_entropy(hidden, weight, targets, z_weight, chunk)
    ((got_nll + z_weight * got_z) / 7).backward()
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    assert got_nll.dtype == got_z.dtype == dtype
    torch.testing.assert_close(got_nll.detach(), nll, **close)
    torch.testing.assert_close(got_z.detach(), z, **close)
    torch.testing.assert_close(hidden.grad, grad_h / 7, **close)
    torch.testing.assert_close(weight.grad, grad_w / 7, **close)


def test_bf16_inputs_have_fp32_loss_and_accumulation():
    hidden, weight, targets = batch(torch.bfloat16)
    nll, _, grad_h, grad_w = reference(hidden, weight, targets, 0.0)
    for chunk in CHUNKS:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        got, _ = linear_cross_entropy(h, w, targets, 0.0, chunk)
        got.backward()
        assert got.dtype == torch.float32
        assert w.grad.dtype == torch.bfloat16
        # the product's bf16 output is what limits the loss: 8 bits of each logit
        assert abs(got.item() - nll.item()) < 0.01 * nll.item()
        assert (h.grad - grad_h).norm() < 0.02 * grad_h.norm()
        assert (w.grad - grad_w).norm() < 0.02 * grad_w.norm()


@pytest.mark.parametrize("tokens", [98_304, 1_000_000, 3_932_160])
def test_bf16_gradients_carry_the_whole_scale(tokens):
    """1 / tokens in 8 bits would make all of the gradient too long or too short, by up to .4 %."""
    hidden, weight, targets = batch(torch.bfloat16)

    def gradients(divisor: int) -> torch.Tensor:
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        (linear_cross_entropy(*inputs, targets).nll / divisor).backward()
        return torch.cat([x.grad.double().flatten() for x in inputs])

    plain, scaled = gradients(1), gradients(tokens)
    assert scaled @ plain / (plain @ plain) * tokens == pytest.approx(1, abs=4e-4)


@pytest.mark.parametrize("z_weight", [0.0, 0.1])
def test_gradcheck(z_weight):
    hidden, weight, targets = batch()
    hidden.requires_grad_()
    weight.requires_grad_()

    def loss(h, w):
        nll, z = linear_cross_entropy(h, w, targets, z_weight, chunk=5)
        return nll + z_weight * z

    assert torch.autograd.gradcheck(loss, (hidden, weight))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_all_ignored(chunk):
    hidden, weight, targets = batch()
    hidden.requires_grad_()
    weight.requires_grad_()
    nll, z = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE), 0.1, chunk)
    (nll + 0.1 * z).backward()
    assert nll.item() == z.item() == 0
    assert hidden.grad.abs().max() == weight.grad.abs().max() == 0


def test_other_combination_is_refused_as_nan():
    hidden, weight, targets = batch()
    hidden.requires_grad_()
    nll, z = linear_cross_entropy(hidden, weight, targets, z_weight=0.1)
    (nll + 0.5 * z).backward()
    assert hidden.grad.isnan().all()


def test_no_grad_and_frozen_weight():
    hidden, weight, targets = batch()
    nll, z, grad_h, _ = reference(hidden, weight, targets, 0.0)
    weight.requires_grad_()
    with torch.no_grad():
        got = linear_cross_entropy(hidden, weight, targets, chunk=4)
    assert not got[0].requires_grad
    torch.testing.assert_close(torch.stack(got), torch.stack((nll, z)))
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight.detach(), targets, chunk=4)[0].backward()
    torch.testing.assert_close(hidden.grad, grad_h)


def test_leading_dimensions():
    hidden, weight, targets = batch()
    nll, z, *_ = reference(hidden[:12], weight, targets[:12], 0.0)
    got = linear_cross_entropy(hidden[:12].view(3, 4, -1), weight, targets[:12].view(3, 4))
    torch.testing.assert_close(torch.stack(got), torch.stack((nll, z)))

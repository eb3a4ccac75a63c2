"""Cross-entropy of a linear head, summed over the valid targets; chosen by device.

On CUDA the logits exist for one chunk of tokens at a time, and the gradients of the hidden states and of
the weight are computed along with the loss (three products in all, nothing is recomputed). On CPUs whole
logits are faster.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Targets with this value carry no loss."""
CHUNK_ELEMENTS = 2**27
"""Logits that exist at once on CUDA: 512 MiB in fp32."""


class LossSums(NamedTuple):
    """Sums over the valid targets, scalars in fp32 (fp64 when the inputs are): divide by their number."""

    nll: Tensor
    """Sum of -log p(target), in nats."""
    z: Tensor
    """Sum of logsumexp(logits)^2 (z-loss, arXiv 2204.02311, section 5)."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, z_weight: float = 0.0) -> LossSums:
    """Loss of `hidden @ weight.T` against `targets`, as sums over the valid ones.

    Args:
        hidden: `[..., hidden]`.
        weight: `[vocab, hidden]`.
        targets: `[...]` int64; IGNORE carries no loss.
        z_weight: weight of the z-loss. The loss to differentiate is `nll + z_weight * z`, times any
            constant; on CUDA the gradient of any other combination is NaN.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if hidden.is_cuda:
        return LossSums(*chunked_sums(hidden, weight, targets, z_weight))
    return whole_sums(hidden, weight, targets)


def whole_sums(hidden: Tensor, weight: Tensor, targets: Tensor) -> LossSums:
    """The loss from whole logits `[tokens, vocab]`; differentiable in any combination."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = F.log_softmax(logits, dim=-1)
    nll = F.nll_loss(log_p, targets, ignore_index=IGNORE, reduction="sum")
    # logits = log p + logsumexp at every entry, so one entry per token gives the logsumexp
    index = targets.clamp_min(0).unsqueeze(-1)
    lse = (logits.gather(-1, index) - log_p.gather(-1, index)).squeeze(-1)
    return LossSums(nll, lse.square().masked_fill(targets == IGNORE, 0).sum())


def chunked_sums(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_weight: float = 0.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """`(nll, z)` from logits of `chunk` tokens at a time; see `linear_cross_entropy`."""
    if chunk is None:
        chunk = max(128, CHUNK_ELEMENTS // weight.shape[0] // 128 * 128)
    return _ChunkedSums.apply(hidden, weight, targets, z_weight, chunk, torch.is_grad_enabled())


class _ChunkedSums(torch.autograd.Function):
    """With p = softmax(logits): d nll = p - onehot, d lse^2 = 2 lse p."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, z_weight, chunk, grad_enabled):
        need_hidden, need_weight = (n and grad_enabled for n in ctx.needs_input_grad[:2])
        exact = torch.promote_types(hidden.dtype, torch.float32)
        nll, z = hidden.new_zeros((), dtype=exact), hidden.new_zeros((), dtype=exact)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if need_weight else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            h, t = hidden[rows], targets[rows]
            logits = F.linear(h, weight).to(exact)
            valid = t != IGNORE
            index = t.clamp_min(0).unsqueeze(-1)
            lse = logits.logsumexp(-1)
            nll += ((lse - logits.gather(-1, index).squeeze(-1)) * valid).sum()
            z += (lse.square() * valid).sum()
            if not (need_hidden or need_weight):
                continue
            p = logits.sub_(lse.unsqueeze(-1)).exp_()
            p *= ((1 + 2 * z_weight * lse) * valid).unsqueeze(-1)
            grad = p.scatter_add_(-1, index, -valid.to(exact).unsqueeze(-1)).to(h.dtype)
            if need_hidden:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if need_weight:
                grad_weight += grad.T @ h
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.z_weight = z_weight
        return nll, z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_nll, grad_z):
        grad_hidden, grad_weight = ctx.saved_tensors
        # The gradients above are those of nll + z_weight * z; refuse others without waiting for the device.
        wanted = ctx.z_weight * grad_nll
        scale = torch.where((grad_z - wanted).abs() <= 1e-3 * wanted.abs(), grad_nll, torch.nan)
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * scale.to(grad_weight.dtype),
            *(None,) * 4,
        )

"""Cross-entropy of a linear head, summed over the valid targets, without whole logits.

The logits exist for one chunk of tokens at a time, in fp32, and the gradients of the hidden states and of the
weight are computed along with the loss: three products in all, nothing is recomputed. The size of the chunk
is chosen by device: large enough to fill a GPU, small enough to stay in a CPU's cache, where this takes
0.65 to 0.9 of the time of `F.cross_entropy` on whole logits.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Targets with this value carry no loss."""
CUDA_LOGITS = 2**27
"""Logits that exist at once on CUDA: 512 MiB in fp32."""
CPU_LOGITS = 2**21
"""Logits that exist at once on CPUs: 8 MiB in fp32."""


class LossSums(NamedTuple):
    """Sums over the valid targets, scalars in fp32 (fp64 when the inputs are): divide by their number."""

    nll: Tensor
    """Sum of -log p(target), in nats."""
    z: Tensor
    """Sum of logsumexp(logits)^2 (z-loss, arXiv 2204.02311, section 5)."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_weight: float = 0.0, chunk: int | None = None
) -> LossSums:
    """Loss of `hidden @ weight.T` against `targets`, as sums over the valid ones.

    Args:
        hidden: `[..., hidden]`.
        weight: `[vocab, hidden]`.
        targets: `[...]` int64; IGNORE carries no loss.
        z_weight: weight of the z-loss. The loss to differentiate is `nll + z_weight * z`, times any
            constant; the gradient of any other combination is NaN.
        chunk: tokens whose logits exist at once; default: by device and vocabulary.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if chunk is None:
        logits = CUDA_LOGITS if hidden.is_cuda else CPU_LOGITS
        chunk = max(128, logits // weight.shape[0] // 128 * 128)
    # grad mode is off inside a Function, whatever it is here
    return LossSums(*_ChunkedSums.apply(hidden, weight, targets, z_weight, chunk, torch.is_grad_enabled()))


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
            valid = t != IGNORE
            index = t.clamp_min(0).unsqueeze(-1)
            logits = F.linear(h, weight).to(exact)
            target_logit, top = logits.gather(-1, index).squeeze(-1), logits.amax(-1)
            # in place on CPUs, where fresh memory costs more than the arithmetic
            p = torch.softmax(logits, -1, out=None if logits.is_cuda else logits)
            del logits  # its memory is the next chunk's, as is that of the tensors below
            lse = top - p.amax(-1).log()  # the largest p is exp(top - lse), at least 1 / vocab
            nll += torch.where(valid, lse - target_logit, 0).sum()
            z += torch.where(valid, lse.square(), 0).sum()
            if not (need_hidden or need_weight):
                del p
                continue
            p *= ((1 + 2 * z_weight * lse) * valid).unsqueeze(-1)
            grad = p.scatter_add_(-1, index, -valid.to(exact).unsqueeze(-1)).to(h.dtype)
            if need_hidden:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if need_weight and h.dtype == exact:
                torch.addmm(grad_weight, grad.T, h, out=grad_weight)
            elif need_weight:
                grad_weight += grad.T @ h
            del p, grad
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
            None if grad_hidden is None else _times(grad_hidden, scale),
            None if grad_weight is None else _times(grad_weight, scale),
            *(None,) * 4,
        )


def _times(gradient: Tensor, scale: Tensor) -> Tensor:
    """In the scale's type, rounded to the gradient's at the end: a scale of 8 bits is wrong for all of it alike, by up
    to .4 %. A 0-dim tensor would be rounded first."""
    return torch.mul(gradient, scale[None], out=torch.empty_like(gradient))

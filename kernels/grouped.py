"""Rows sorted by group, each group with a matrix of its own: the products of a mixture's experts.

    y[r] = x[r] @ weight[g].T    for the rows r of group g

`grouped_linear` takes `F.grouped_mm` for half precision on CUDA and `loop_linear`, the reference, elsewhere: on CPUs a
loop over the groups is faster in fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16
"""Bytes that grouped products want between two rows."""


def loop_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """One product for each group. `x` `[rows, in]`, `weight` `[groups, out, in]`, `counts` `[groups]` rows of each.

    Reads `counts` on the host. Returns `[rows, out]`; groups without rows get a gradient of zeros.
    """
    groups = zip(x.split(counts.tolist()), weight.unbind(0), strict=True)
    products = [F.linear(part, w) for part, w in groups if len(part)]
    return torch.cat(products or [F.linear(x, weight[0])])


def grouped_mm_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The same as one grouped product (SM 80 and newer in bf16, or any CPU); nothing is read by the host.

    Raises ValueError where the widths are such that CUDA would refuse them, on every device.
    """
    for width in weight.shape[1:]:
        if width * weight.element_size() % ALIGNMENT:
            multiple = ALIGNMENT // weight.element_size()
            raise ValueError(f"grouped products take widths that are multiples of {multiple}, not {width}")
    ends = counts.cumsum(0).to(torch.int32)
    return F.grouped_mm(x, weight.mT, offs=ends)


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """`[rows, in]` to `[rows, out]` by whichever of the two is the faster here."""
    return (grouped_mm_linear if _as_one_product(x) else loop_linear)(x, weight, counts)


def loop_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, counts: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(dx `[rows, in]`, dweight `[groups, out, in]`) of `loop_linear` by `grad` `[rows, out]`, None where not `wanted`:
    as autograd makes them, for who does not let it keep `weight`."""
    rows = counts.tolist()
    parts = list(zip(grad.split(rows), x.split(rows), weight.unbind(0), strict=True))
    dx = torch.cat([g @ w for g, _, w in parts]) if wanted[0] else None
    return dx, torch.stack([g.mT @ part for g, part, _ in parts]) if wanted[1] else None


def grouped_mm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, counts: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The same of `grouped_mm_linear`."""
    ends, grad = counts.cumsum(0).to(torch.int32), grad.contiguous()
    dx = F.grouped_mm(grad, weight, offs=ends) if wanted[0] else None
    return dx, F.grouped_mm(grad.mT, x, offs=ends) if wanted[1] else None


def grouped_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, counts: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The same of `grouped_linear`."""
    return (grouped_mm_gradients if _as_one_product(x) else loop_gradients)(grad, x, weight, counts, wanted)


def _as_one_product(x: Tensor) -> bool:
    """Not of no rows, as a rank has that no token was sent to: its gradients would be products over nothing."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and x.shape[0] > 0


class _Dispatch(torch.autograd.Function):
    """`x[slots // top_k]`, whose backward sums a token's rows in a fixed order: that of indexing adds atomically."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.tokens, ctx.top_k = len(x), top_k
        return x[slots // top_k]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return _sum_of_slots(grad, slots, ctx.tokens, ctx.top_k), None, None


class _Combine(torch.autograd.Function):
    """The transpose of `_Dispatch`."""

    @staticmethod
    def forward(ctx, y: Tensor, slots: Tensor, tokens: int, top_k: int) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.top_k = top_k
        return _sum_of_slots(y, slots, tokens, top_k)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (slots,) = ctx.saved_tensors
        return grad[slots // ctx.top_k], None, None, None


def _sum_of_slots(rows: Tensor, slots: Tensor, tokens: int, top_k: int) -> Tensor:
    """Row i of `rows` belongs to slot `slots[i]`, unlike all others; a token's top_k slots are summed in order."""
    shape = (tokens * top_k, rows.shape[1])
    full = rows.new_empty(shape) if len(slots) == shape[0] else rows.new_zeros(shape)
    full[slots] = rows
    return full.view(tokens, top_k, -1).sum(1)


def dispatch(x: Tensor, slots: Tensor, top_k: int) -> Tensor:
    """A copy of its token's row for each slot: `[tokens, width]` to `[slots, width]`.

    slots: `[slots]` int64, distinct; slot s is choice s % top_k of token s // top_k.
    """
    return _Dispatch.apply(x, slots, top_k)


def combine(y: Tensor, slots: Tensor, tokens: int, top_k: int) -> Tensor:
    """The sum of each token's slots, `[slots, width]` to `[tokens, width]`; those that are not there count as zeros."""
    return _Combine.apply(y, slots, tokens, top_k)

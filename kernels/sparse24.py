"""2:4 sparsity by soft thresholds, and the minimum-variance unbiased 2:4 estimator: the references, in plain torch.

A group is four neighbours along the last dimension. S-STE (arXiv 2409.09099), t the second smallest |a| of a group:

    S(a)_i = sign(a_i) max(|a_i| - t, 0),     W~ = beta S(W),     beta = <W, S(W)> / <S(W), S(W)>
"""

import math

import torch
from torch import Tensor, nn

GROUP = 4


def groups(x: Tensor) -> Tensor:
    """`[..., n]` as `[..., n / 4, 4]`. Raises ValueError where n is no multiple of 4."""
    if x.shape[-1] % GROUP:
        near = max(1, round(x.shape[-1] / GROUP)) * GROUP
        raise ValueError(
            f"2:4 sparsity takes groups of 4, and {x.shape[-1]} is no multiple; the nearest is {near}"
        )
    return x.unflatten(-1, (-1, GROUP))


def threshold(x: Tensor) -> Tensor:
    """t `[..., n / 4, 1]`: the second smallest magnitude of each group of `[..., n]`."""
    a, b, c, d = groups(x.abs()).unbind(-1)
    # the smaller ones of two pairs hold the smallest, and the second smallest is one of these two
    low = torch.maximum(torch.minimum(a, b), torch.minimum(c, d))
    high = torch.minimum(torch.maximum(a, b), torch.maximum(c, d))
    return torch.minimum(low, high).unsqueeze(-1)


def soft_threshold(x: Tensor) -> Tensor:
    """S(x), `[..., n]`: at most two values of a group are not zero, and no zero has a sign."""
    t, grouped = threshold(x), groups(x)
    return torch.where(grouped.abs() > t, grouped - grouped.sign() * t, 0).flatten(-2)


def sparse_weight(weight: Tensor, beta: Tensor) -> Tensor:
    """W~ = beta S(W), in the type of `weight`, `[..., n]`: made in at least fp32 and rounded once, because
    beta in bf16 would move every weight by up to .4 %."""
    s = soft_threshold(weight)
    return s.to(torch.promote_types(s.dtype, torch.float32)).mul(beta).to(s.dtype)


def scale_sums(x: Tensor) -> Tensor:
    """(<x, S(x)>, <S(x), S(x)>) over the last two dimensions, `[..., 2]` in float64, which add up over shards."""
    x, s = x.double(), soft_threshold(x).double()
    return torch.stack([(x * s).sum((-2, -1)), s.square().sum((-2, -1))], -1)


def scale_of(sums: Tensor) -> Tensor:
    """beta `[...]` of `scale_sums`: the argmin of |W - beta S(W)|^2; 1 where S is zero everywhere."""
    return torch.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], 1.0)


def keep_probabilities(x: Tensor) -> Tensor:
    """p `[..., n / 4, 4]` of the estimator of least variance that keeps two of four (arXiv 2203.10991, derived anew).

    p_i = 2 |a_i| / sum |a|, unless one magnitude is more than half of the sum: then it is always kept, and the second
    is drawn of the others by their magnitudes.
    """
    return _probabilities(groups(x).abs())[0]


def _probabilities(a: Tensor) -> tuple[Tensor, Tensor]:
    """(p, a / p) of magnitudes `[..., 4]`: what is kept is half of the sum, or one of a dominated three their sum."""
    total, most, tiny = _sum(a), a.amax(-1, keepdim=True), torch.finfo(a.dtype).tiny
    dominated = most > total / 2
    rest = _sum(torch.where(a == most, 0, a))  # total - most would lose what is small beside it
    rate = torch.where(dominated, 1 / rest.clamp_min(tiny), 2 / total.clamp_min(tiny))
    sure = dominated & (a == most)
    return torch.where(sure, 1.0, a * rate), torch.where(sure, a, torch.where(dominated, rest, total / 2))


def _sum(a: Tensor) -> Tensor:
    """Of each group `[..., 4]`, in the kernel's order, to the last bit."""
    return ((a[..., 0] + a[..., 1]) + (a[..., 2] + a[..., 3])).unsqueeze(-1)


def mvue24(x: Tensor, uniform: Tensor) -> Tensor:
    """A random 2:4 sparse tensor `[..., n]` whose mean is `x`, of the least variance that there is.

    uniform: `[..., n / 4]` in [0, 1), one for a group. Index i is kept where u or u + 1 lies in [c_{i-1}, c_i), with c
    the cumulated probabilities, and becomes x_i / p_i.
    """
    grouped = groups(x)
    p, kept = _probabilities(grouped.abs())
    first, second, third, _ = p.unbind(-1)
    inner = torch.stack([first, first + second, first + second + third], -1)
    # p sums to 2 but for rounding, and the last end is 2: no u falls beyond it
    begins, ends = nn.functional.pad(inner, (1, 0), value=0.0), nn.functional.pad(inner, (0, 1), value=2.0)
    u = uniform.unsqueeze(-1)
    drawn = ((begins <= u) & (u < ends)) | ((begins <= u + 1) & (u + 1 < ends))
    return torch.where(drawn & (grouped != 0), torch.where(grouped < 0, -kept, kept), 0).flatten(-2)


def philox_uniform(seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform numbers of 31 bits in [0, 1), fp32 `shape`: number i is the first output of Philox 4x32-10 for counter i.

    seed: 0-dim int64, the key. The same numbers on every device, and those of Triton's `tl.rand` (Salmon et al., SC
    2011).
    """
    low = 0xFFFFFFFF
    c0 = torch.arange(math.prod(shape), device=seed.device)
    c1 = c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64 bits each: overflow keeps them all
        c0, c1, c2, c3 = ((b >> 32) ^ c1 ^ k0) & low, b & low, ((a >> 32) ^ c3 ^ k1) & low, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    signed = torch.where(c0 >= 2**31, low - c0, c0)
    return (signed.float() * 4.6566127342e-10).view(shape)  # below 1 / 2^31, so that rounding never gives 1


def pack24(x: Tensor) -> tuple[Tensor, Tensor]:
    """(values `[..., n / 2]`, positions in their group `[..., n / 2]` uint8) of a 2:4 sparse `[..., n]`.

    Raises ValueError where a group has more than two values.
    """
    grouped = groups(x)
    present = grouped != 0
    if bool((present.sum(-1) > 2).any()):
        raise ValueError("a group of 4 has more than two values that are not zero")
    # those that are not zero first, in their order; zeros fill up
    places = (~present).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :2].sort(dim=-1).values
    values = _bytes(grouped).gather(-1, places).view(x.dtype)
    return values.flatten(-2), places.to(torch.uint8).flatten(-2)


def unpack24(values: Tensor, places: Tensor) -> Tensor:
    """The inverse of `pack24`."""
    pairs, indices = values.unflatten(-1, (-1, 2)), places.unflatten(-1, (-1, 2)).long()
    full = _bytes(pairs.new_zeros(*pairs.shape[:-1], GROUP))
    return full.scatter(-1, indices, _bytes(pairs)).view(values.dtype).flatten(-2)


def _bytes(x: Tensor) -> Tensor:
    """8-bit numbers as integers, which torch can gather and scatter; others as they are."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


def pack_bits(places: Tensor) -> Tensor:
    """The positions `[..., n / 2]` of `pack24` as 2-bit numbers, four to a byte and the first lowest: `[..., n / 8]`.

    A byte (uint8) holds two groups. This is the layout of the kernels' metadata. Raises ValueError where n is no
    multiple of 8.
    """
    if places.shape[-1] % 4:
        raise ValueError(f"2-bit metadata take rows of multiples of 8 values, not {2 * places.shape[-1]}")
    first, second, third, fourth = places.unflatten(-1, (-1, 4)).unbind(-1)
    return first | second << 2 | third << 4 | fourth << 6


def unpack_bits(bits: Tensor) -> Tensor:
    """The inverse of `pack_bits`."""
    return torch.stack([bits >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)

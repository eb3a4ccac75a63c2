"""Initial weights: each value is a function of (seed, parameter's name, global index) alone.

A rank that holds a slice of a parameter computes that slice and nothing else, and any layout on any number
of ranks starts from the same bits. Only exactly rounded operations are used (integer products, and IEEE
+ - * / sqrt in float64), so that the values do not depend on the device or on vector widths either.

Linear and embedding weights are normal with standard deviation `config.std` (default sqrt(2 / (5 width)) of what
the layers read, "small init", arXiv 1910.05895), the router's too; the projections that write to the residual stream
(attn.wo, ffn.w2, those of experts; the adapters down) have `config.std / sqrt(2 num_layers)` (GPT-2); norm weights
are 1, those of Canon layers 0.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepline.models.canon import is_canon
from stepline.models.config import ModelConfig

CHUNK = 2**20
"""Values computed at once: some 100 MB of temporaries at most."""
GAMMA = 0x9E3779B97F4A7C15
"""Increment of splitmix64 (Steele, Lea, Flood 2014)."""


def parameter_std(name: str, config: ModelConfig) -> float:
    """Standard deviation of a matrix's initial values."""
    residual = ("attn.wo.weight", "ffn.w2.weight", "ffn.experts.w2", "ffn.shared.w2.weight")
    if config.blocks == "revffn" and config.revffn.adapters:
        residual = ("attn_down.weight", "ffn_down.weight")
    return config.std / math.sqrt(2 * config.num_layers) if name.endswith(residual) else config.std


@torch.no_grad()
def init_parameter(
    name: str,
    global_shape: Sequence[int],
    config: ModelConfig,
    seed: int,
    offset: Sequence[int] | None = None,
    shape: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The initial value of parameter `name`, or of the slice of it that begins at `offset`.

    Args:
        name: fully qualified, as in `Transformer.named_parameters()`.
        global_shape: shape of the whole parameter.
        seed: any integer.
        offset, shape: first index and extent of the slice in each dimension; default: the whole.

    Returns:
        Tensor of `shape`, equal bit for bit to that slice of the whole.
    """
    shape = tuple(global_shape if shape is None else shape)
    offset = tuple((0,) * len(shape) if offset is None else offset)
    if len(global_shape) == 1:
        return torch.full(shape, 0.0 if is_canon(name) else 1.0, device=device, dtype=dtype)
    out = torch.empty(shape, device=device, dtype=dtype)
    if out.numel() == 0:
        return out
    # global flat index = rows[:, None] + inner[None, :]
    strides = [math.prod(global_shape[d + 1 :]) for d in range(len(shape))]
    axes = [(torch.arange(n, device=device) + o) * s for n, o, s in zip(shape, offset, strides, strict=True)]
    rows, inner = axes[0], axes[1]
    for axis in axes[2:]:
        inner = (inner.unsqueeze(-1) + axis).flatten()
    key, std = stream_key(seed, name), parameter_std(name, config)
    at_once = max(1, CHUNK // len(inner))
    for part, index in zip(out.view(len(rows), -1).split(at_once), rows.split(at_once), strict=True):
        part.copy_(normal(index.unsqueeze(-1) + inner, key).mul_(std))
    return out


@torch.no_grad()
def init_model(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Set every parameter of an unsharded model in place."""
    for name, p in model.named_parameters():
        p.copy_(init_parameter(name, p.shape, config, seed, device=p.device, dtype=p.dtype))


def stream_key(seed: int, name: str) -> int:
    """64 bits that tell the stream of (seed, name) from all others."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")


def normal(index: Tensor, key: int) -> Tensor:
    """Standard normal values, float64, at int64 counters `index` of the stream `key`."""
    bits = _mix(index * _signed(GAMMA) + _signed(key))
    uniform = (_shift_right(bits, 12).double() + 0.5) * 2.0**-52  # 52 bits and a half: exact, inside (0, 1)
    return normal_quantile(uniform)


def normal_quantile(u: Tensor) -> Tensor:
    """Inverse of the standard normal distribution function, to a relative 1e-7.

    Wichura, algorithm AS 241 (PPND7), Applied Statistics 37 (1988). `u` float64 in (0, 1).
    """
    q = u - 0.5
    r = 0.180625 - q * q
    z = q * _horner(r, 59.109374720, 159.29113202, 50.434271938, 3.3871327179)
    z /= _horner(r, 67.187563600, 78.757757664, 17.895169469, 1.0)
    tail = (q.abs() > 0.425).nonzero(as_tuple=True)
    side, u = q[tail], u[tail]
    r = (-_log(torch.minimum(u, 1 - u))).sqrt()
    near = _horner(r - 1.6, 0.17023821103, 1.3067284816, 2.7568153900, 1.4234372777)
    near /= _horner(r - 1.6, 0.12021132975, 0.73700164250, 1.0)
    far = _horner(r - 5.0, 0.017337203997, 0.42868294337, 3.0812263860, 6.6579051150)
    far /= _horner(r - 5.0, 0.012258202635, 0.24197894225, 1.0)
    z[tail] = torch.where(r <= 5, near, far).copysign(side)
    return z


def _log(x: Tensor) -> Tensor:
    """Natural logarithm from exactly rounded operations, to 1e-10: log(m 2^e) = e log 2 + 2 artanh(s)."""
    mantissa, exponent = torch.frexp(x)  # mantissa in [0.5, 1)
    s = (mantissa - 0.75) / (mantissa + 0.75)  # |s| <= 0.2
    series = _horner(s * s, 1 / 13, 1 / 11, 1 / 9, 1 / 7, 1 / 5, 1 / 3, 1.0) * s
    return exponent.double() * math.log(2) + (series * 2 + math.log(0.75))


def _horner(x: Tensor, first: float, *rest: float) -> Tensor:
    """Polynomial in `x`, highest coefficient first; product and sum are rounded separately."""
    y = torch.full_like(x, first)
    for c in rest:
        y.mul_(x).add_(c)
    return y


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, a bijection of 64 bits; int64 products wrap."""
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: `>>` on int64 copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x

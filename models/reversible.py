"""Backward through reversible halves without stored activations.

A half adds a branch of two streams to one of them, y = own + branch(own, other). The next half reads y and adds to
`other`, so two tensors hold the whole forward: from (y, other) a half's branch is computed again, own = y - branch
follows, and that is the pair of the half before (RevNet, arXiv 1707.04585; RevFFN, arXiv 2512.20920).

Every tensor that autograd would save in a branch is replaced by an empty holder. The first holder that backward opens
has the half recomputed, which fills all of that half's holders. Autograd itself walks the graph: hooks of modules,
frozen parameters, accumulation and sharded parameters work as they do without.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Branch = Callable[[Tensor, Tensor], Tensor]
"""branch(own, other), `[batch, seq, width]` each; a branch that ignores `own` inverts explicitly."""


@dataclass(frozen=True)
class Streams:
    """Sums of a stream and a branch; with `bits` the branch is rounded to multiples of 2^-bits.

    Streams on that grid are added and subtracted exactly while they are smaller than `limit`. The gradient passes
    the rounding unchanged (straight-through).
    """

    bits: int | None = None

    def enter(self, x: Tensor) -> Tensor:
        """`x`, any shape, in at least fp32, on the grid."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x if self.bits is None else _AddRounded.apply(torch.zeros_like(x), x, self.bits)

    def add(self, x: Tensor, h: Tensor) -> Tensor:
        """x + h in the type of `x`; autograd saves nothing for it."""
        return x + h if self.bits is None else _AddRounded.apply(x, h, self.bits)

    def subtract(self, y: Tensor, h: Tensor) -> Tensor:
        """The inverse of `add`; no gradient."""
        if self.bits is None:
            return y - h
        return torch.sub(y, _steps(h, self.bits, y.dtype), alpha=2.0**-self.bits)

    def limit(self, dtype: torch.dtype = torch.float32) -> float:
        """Sums are exact while streams are smaller than this: 2^(24 - bits) in fp32. Infinite without a grid."""
        return float("inf") if self.bits is None else 2.0 ** (1 - self.bits) / torch.finfo(dtype).eps


def _steps(h: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """round(h 2^bits): the product is exact, so this is the nearest point of the grid, in its steps."""
    return h.to(dtype).mul(2.0**bits).round_()


class _AddRounded(torch.autograd.Function):
    """x + round(h 2^bits) 2^-bits, straight-through."""

    @staticmethod
    def forward(ctx, x, h, bits):
        ctx.dtype = h.dtype
        return torch.add(x, _steps(h, bits, x.dtype), alpha=2.0**-bits)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.to(ctx.dtype), None


class _Holder:
    """Stands in autograd's graph for a tensor that the recompute will put here."""

    __slots__ = ("__weakref__", "shape", "value")

    def __init__(self, shape: torch.Size):
        self.shape, self.value = shape, None


class Half:
    """One run of y = own + branch(own, other), and how to run it again.

    Args:
        branch: the function; called again in backward, where it must compute the same.
        streams: arithmetic of the sums.
        routed: module within the branch that may have `record()`, a context manager that yields an object, and
            `replay(object)`, one under which a recompute repeats the recorded choices.
        iterations: 0 for a branch that ignores `own`; otherwise the fixed-point iterations that find it.
        on_residual: called with the fixed point's residual, max |own - (y - branch(own, other))|, 0-dim.
    """

    def __init__(
        self,
        branch: Branch,
        streams: Streams,
        routed: Any = None,
        iterations: int = 0,
        on_residual: Callable[[Tensor], None] | None = None,
    ):
        self.branch, self.streams = branch, streams
        self.iterations, self.on_residual = iterations, on_residual
        self.routed = routed if hasattr(routed, "record") and hasattr(routed, "replay") else None
        self.holders: list[weakref.ref[_Holder]] = []
        self.filled = 0

    def plain(self, own: Tensor, other: Tensor) -> Tensor:
        """y by the same arithmetic; autograd stores what it always does."""
        return self.streams.add(own, self.branch(own, other))

    def first(self, own: Tensor, other: Tensor) -> Tensor:
        """The branch's value; keeps what a recompute needs beside the streams."""
        self.needs_grad = own.requires_grad, other.requires_grad
        self.autocast = _autocast(own.device)
        states = _rng_states(own.device)
        with contextlib.nullcontext() if self.routed is None else self.routed.record() as self.routing:
            h = self.branch(own, other)
        drew = any(not torch.equal(a, b) for a, b in zip(states, _rng_states(own.device), strict=True))
        self.rng = states if drew else None
        return h

    def _again(self, own: Tensor, other: Tensor) -> Tensor:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_random_numbers(own.device, self.rng))
            for kind, dtype, enabled in self.autocast:
                # where none is or was, entering one would only have the compiled branch compiled again;
                # a cache would keep the cast copy of every weight until an autocast around backward ends
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            if self.routed is not None:
                stack.enter_context(self.routed.replay(self.routing))
            return self.branch(own, other)

    def invert(self, y: Tensor, other: Tensor) -> Tensor:
        """`own`; fills the holders on the way."""
        guess = y
        with torch.no_grad():
            for _ in range(self.iterations):
                guess = self.streams.subtract(y, self._again(guess, other))
        own, read = (
            t.detach().requires_grad_(needed)
            for t, needed in zip((guess, other), self.needs_grad, strict=True)
        )
        with torch.enable_grad(), saved_tensors_hooks(self._fill, _same):
            h = self._again(own, read)
        if self.filled != len(self.holders):
            raise self._differs(f"saved {self.filled} tensors instead of {len(self.holders)}")
        with torch.no_grad():
            own = self.streams.subtract(y, h.detach())
            if self.iterations and self.on_residual is not None:
                self.on_residual((own - guess).abs().amax())
        return own

    def pack(self, tensor: Tensor) -> _Holder:
        holder = _Holder(tensor.shape)
        self.holders.append(weakref.ref(holder))
        return holder

    def _fill(self, tensor: Tensor) -> Tensor:
        if self.filled == len(self.holders):
            raise self._differs(f"saved more than {self.filled} tensors")
        holder, value = self.holders[self.filled](), tensor.detach()
        self.filled += 1
        if holder is not None:  # backward has not passed it
            if holder.shape != value.shape:
                raise self._differs(f"saved {tuple(value.shape)} instead of {tuple(holder.shape)}")
            holder.value = value
        return value

    def _differs(self, how: str) -> RuntimeError:
        return RuntimeError(
            f"a reversible half was not the same function in backward as in forward: it {how}"
        )


class Chain:
    """The halves of one forward and its last two streams, from which backward goes back to the first.

    Every half's inputs must be the half before's results, unchanged. One backward; a second one raises RuntimeError.
    """

    def __init__(self):
        self.halves: list[Half] = []
        self.streams: tuple[Tensor, Tensor] | None = None
        """(y, other) of the last half that has not been inverted, detached."""

    def run(self, half: Half, own: Tensor, other: Tensor) -> Tensor:
        """y = own + branch(own, other), `[batch, seq, width]`."""
        if self.streams is not None and any(
            mine.data_ptr() != given.data_ptr()
            for mine, given in zip(self.streams, (other, own), strict=True)
        ):
            raise RuntimeError("a reversible half was given other streams than the half before it has left")
        index = len(self.halves)
        self.halves.append(half)
        with saved_tensors_hooks(half.pack, lambda holder: self._unpack(holder, index)):
            h = half.first(own, other)
        y = half.streams.add(own, h)
        self.streams = y.detach(), other.detach()
        return y

    def _unpack(self, holder: _Holder, index: int) -> Tensor:
        if holder.value is None:
            self._back_to(index)
        value, holder.value = holder.value, None
        if value is None:
            raise RuntimeError(
                "a second backward through reversible blocks, whose activations exist once; run the forward again"
            )
        return value

    def _back_to(self, index: int) -> None:
        """Inverts the halves down to `index`, those whose gradient nobody has asked for included."""
        while len(self.halves) > index:
            y, other = self.streams
            own = self.halves.pop().invert(y, other)
            self.streams = other, own


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _autocast(device: torch.device) -> list[tuple[str, torch.dtype, bool]]:
    kinds = {"cpu", device.type} - {"meta"}
    return [(k, torch.get_autocast_dtype(k), torch.is_autocast_enabled(k)) for k in sorted(kinds)]


def _rng_states(device: torch.device) -> list[Tensor]:
    """Of the host's generator and the device's."""
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _set_rng_states(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(device).set_rng_state(states[1], device)


@contextlib.contextmanager
def _random_numbers(device: torch.device, states: list[Tensor] | None) -> Iterator[None]:
    """Random numbers from `states` on, and afterwards on from where they were; None: none are drawn."""
    if states is None:
        yield
        return
    kept = _rng_states(device)
    _set_rng_states(device, states)
    try:
        yield
    finally:
        _set_rng_states(device, kept)

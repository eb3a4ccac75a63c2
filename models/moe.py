"""A mixture of experts: a router sends each token to top_k of the experts (arXiv 1701.06538, 2101.03961).

With logits l = W x in fp32 and scores s = softmax(l) or sigmoid(l):

    chosen = top_k(s + b),   w = s[chosen] / sum of s[chosen],   y = sum of w_e expert_e(x) over the chosen e

The bias b is of the choice alone. Nothing is dropped unless `capacity` says so, and then in training mode only.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepline.kernels.grouped import combine, dispatch, grouped_linear
from stepline.models.config import ModelConfig
from stepline.models.ffn import SwiGLU

SUMS = ("tokens", "entropy", "z", "balance", "dropped")
"""What a layer adds up over the tokens of a step, beside the experts' load."""


@dataclass(frozen=True)
class Routing:
    """What a micro-batch tells the routers."""

    valid: Tensor
    """`[batch, seq]`, true where a token carries loss; the others are not counted."""
    scale: Tensor
    """0-dim: the factor of the loss's sum over tokens, and so of the routers'."""


class Exchange(Protocol):
    """Sends rows to the ranks that hold their experts (comm/experts.py)."""

    def to_owners(
        self, rows: Tensor, counts: Tensor
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]: ...
    def own_weight(self, weight: Tensor) -> Tensor: ...


class Experts(nn.Module):
    """One SwiGLU for each expert, their weights stacked."""

    def __init__(self, experts: int, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(experts, inner, width))
        self.w3 = nn.Parameter(torch.empty(experts, inner, width))
        self.w2 = nn.Parameter(torch.empty(experts, width, inner))
        self.exchange: Exchange | None = None
        """Where other ranks hold some of the experts: how rows get there."""

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """`x` and result `[rows, width]`, sorted by expert; counts: `[experts]` int64, rows of each."""
        weights, back = (self.w1, self.w3, self.w2), None
        if self.exchange is not None:
            x, counts, back = self.exchange.to_owners(x, counts)
            weights = tuple(map(self.exchange.own_weight, weights))
        y = self.product(x, weights, counts)
        return y if back is None else back(y)

    def product(self, x: Tensor, weights: tuple[Tensor, Tensor, Tensor], counts: Tensor) -> Tensor:
        """`x` `[rows, width]` through the experts of these weights (w1, w3, w2), which hold `counts` rows each."""
        return grouped_swiglu(x, *weights, counts)


def grouped_swiglu(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, counts: Tensor) -> Tensor:
    """w2 (silu(w1 x) * w3 x) with the weights of each row's expert."""
    inner = F.silu(grouped_linear(x, w1, counts)) * grouped_linear(x, w3, counts)
    return grouped_linear(inner, w2, counts)


class Router(nn.Module):
    """Logits in at least fp32, and the balance bias that is added to the scores for the choice."""

    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.register_buffer("balance_bias", torch.zeros(experts))

    def forward(self, x: Tensor) -> Tensor:
        """`[tokens, width]` to `[tokens, experts]`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.weight.to(wide))


class MoE(nn.Module):
    """Router, experts, and a shared expert where there is one.

    While `counting`, a forward adds to `load` (tokens sent to each expert) and `sums`; `Transformer` sets it during its
    own forward, so that a recompute in backward counts nothing twice.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.moe
        experts, width = config.moe.experts, config.hidden_size
        self.router = Router(experts, width)
        self.experts = Experts(experts, width, config.ffn_size)
        size = config.moe.shared_size
        self.shared = SwiGLU(config.model_copy(update={"ffn_size": size})) if size else None
        self.register_buffer("load", torch.zeros(experts, dtype=torch.int64), persistent=False)
        self.register_buffer("sums", torch.zeros(len(SUMS)), persistent=False)
        self.counting = False
        self.sum_ranks: Callable[[Tensor], Tensor] | None = None
        """Balance global: sums a micro-batch's load over the ranks that share it; without it this rank is all."""
        self._record: list[Tensor] | None = None
        self._replay: Iterator[Tensor] | None = None

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """`x` and result `[batch, seq, width]`; routing: of a training step, for counts and the routers' losses."""
        top_k, experts = self.config.top_k, self.config.experts
        rows = x.reshape(-1, x.shape[-1])
        logits = self.router(rows)
        scores = logits.softmax(-1) if self.config.score == "softmax" else logits.sigmoid()
        chosen = self._choose(scores)
        weights = scores.gather(1, chosen)
        if self.config.renormalise:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)

        slots = chosen.flatten().argsort(stable=True)
        counts = count(chosen, experts)
        if self.config.capacity is not None and self.training:
            slots, counts = self._within_capacity(slots, counts)
        y = self.experts(dispatch(rows, slots, top_k), counts)
        y = y * weights.flatten()[slots].unsqueeze(1)  # in fp32, as the weights are
        out = combine(y, slots, len(rows), top_k).to(x.dtype)
        if self.shared is not None:
            out = out + self.shared(rows)
        if routing is not None:
            out = self._balance(out, logits, scores, chosen, slots, routing)
        return out.view(x.shape)

    def _choose(self, scores: Tensor) -> Tensor:
        """`[tokens, top_k]` int64: the experts of each token, best first; those of the recorded forward in a replay."""
        if self._replay is not None:
            return next(self._replay)
        chosen = (scores.detach() + self.router.balance_bias.to(scores.dtype)).topk(self.config.top_k).indices
        if self._record is not None:
            self._record.append(chosen)
        return chosen

    def _within_capacity(self, slots: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The slots and counts that are left when an expert takes its first tokens alone."""
        limit = max(1, round(self.config.capacity * len(slots) / self.config.experts))
        begin = (counts.cumsum(0) - counts).repeat_interleave(counts, output_size=len(slots))
        place = torch.arange(len(slots), device=slots.device) - begin
        return slots[place < limit], counts.clamp(max=limit)

    def _balance(
        self, out: Tensor, logits: Tensor, scores: Tensor, chosen: Tensor, slots: Tensor, routing: Routing
    ) -> Tensor:
        """Counts, and hangs the router's losses on the result. slots: those of `chosen` that an expert takes."""
        moe = self.config
        valid = routing.valid.flatten()
        taken = valid[slots // moe.top_k].sum() if len(slots) < chosen.numel() else valid.sum() * moe.top_k
        load = count(chosen.masked_fill(valid.unsqueeze(1) == 0, moe.experts), moe.experts)
        tokens, valid = valid.sum(), valid.to(logits.dtype)
        probabilities = scores if moe.score == "softmax" else scores / scores.sum(-1, keepdim=True)
        z = (logits.logsumexp(-1).square() * valid).sum()
        shared = (
            self.sum_ranks(load.clone()) if moe.balance == "global" and self.sum_ranks is not None else load
        )
        shared = shared.to(logits.dtype)
        # Switch: E sum_e f_e P_e, of which f_e is no function of the weights; P_e is summed, not averaged, over tokens
        share = shared / shared.sum().clamp(min=1)
        balance = moe.experts * (share * (probabilities * valid.unsqueeze(1)).sum(0)).sum()
        if self.counting:
            with torch.no_grad():
                entropy = (torch.special.entr(probabilities).sum(-1) * valid).sum()
                dropped = tokens * moe.top_k - taken
                self.load += load
                self.sums += torch.stack([tokens, entropy, z, balance, dropped]).to(self.sums.dtype)
        loss = moe.z_loss * z
        if moe.balance in ("global", "switch"):
            loss = loss + moe.balance_loss * balance
        return _WithLoss.apply(out, loss, routing.scale)

    @contextlib.contextmanager
    def record(self) -> Iterator[list[Tensor]]:
        """The experts that the forwards within choose, `[tokens, top_k]` each, for `replay`."""
        self._record = []
        try:
            yield self._record
        finally:
            self._record = None

    @contextlib.contextmanager
    def replay(self, recorded: list[Tensor]) -> Iterator[None]:
        """The forwards within send tokens where the recorded ones did, whatever the scores now say."""
        self._replay = iter(recorded)
        try:
            yield
        finally:
            self._replay = None

    @torch.no_grad()
    def move_bias(self, load: Tensor, keep: Tensor | None = None) -> None:
        """b <- b + u (e - mean e) with e = sign(mean load - load) (arXiv 2408.15664, algorithm 1, without drift).

        load: `[experts]` of the whole global batch. keep: 0-dim, where it is 1 nothing moves.
        """
        bias, load = self.router.balance_bias, load.double()
        error = (load.mean() - load).sign().to(bias.dtype)
        move = self.config.bias_rate * (error - error.mean())
        bias += move if keep is None else move * (1 - keep.to(bias.dtype))


def count(chosen: Tensor, experts: int) -> Tensor:
    """How often each of `experts` stands in `chosen`, `[experts]` int64; neither atomics nor the host are needed."""
    ids = torch.arange(experts, device=chosen.device)
    ends = torch.searchsorted(chosen.flatten().sort().values, ids, right=True)
    return ends.diff(prepend=ends.new_zeros(1))


class _WithLoss(torch.autograd.Function):
    """The identity of `out`, in whose backward `loss` is differentiated too, times `scale`."""

    @staticmethod
    def forward(ctx, out: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype = loss.dtype
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, ctx.saved_tensors[0].to(ctx.dtype), None

"""A guard against NaN and spikes that decides on the device, so that no step waits for it."""

import torch
from torch import Tensor

LOSS_STD_FLOOR = 0.01  # of the mean loss: a flat history must not make noise a spike
NORM_STD_FLOOR = (
    0.25  # of the mean norm: gradient norms are heavy-tailed, and clipping tames the small spikes
)


class Guard:
    """Says which updates to skip: a loss or gradient norm that is not finite, or far above recent ones.

    "Far above" is more than `sigma` standard deviations (population, with a floor relative to the mean) above
    the mean of the last `window` accepted steps, once there are `min_history` of them (default: half a
    window). Only accepted steps enter the history. All state lives on `device` in fixed tensors; given the
    same inputs all ranks decide alike.
    """

    def __init__(
        self,
        window: int = 128,
        sigma: float = 6.0,
        min_history: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        min_history = max(1, window // 2) if min_history is None else min_history
        if not 1 <= min_history <= window:
            raise ValueError(f"min_history {min_history} is not in 1..window ({window})")
        self.sigma, self.min_history = sigma, min_history
        self.losses = torch.zeros(window, dtype=torch.float64, device=device)
        self.grad_norms = torch.zeros(window, dtype=torch.float64, device=device)
        self.accepted = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_total = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._longest = torch.zeros((), dtype=torch.int64, device=device)
        self._slots = torch.arange(window, device=device)

    @torch.no_grad()
    def check(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """1.0 (0-dim float32, on the device) where this update must be skipped, else 0.0.

        loss, grad_norm: 0-dim, of the global batch, the same on all ranks. Advances the history and counters.
        """
        loss, norm = loss.detach().double(), grad_norm.detach().double()
        skip = ~(loss.isfinite() & norm.isfinite())
        skip = skip | (loss > self._limit(self.losses, LOSS_STD_FLOOR))
        skip = skip | (norm > self._limit(self.grad_norms, NORM_STD_FLOOR))

        here = (self._slots == self.accepted % len(self._slots)) & ~skip
        self.losses.copy_(torch.where(here, loss, self.losses))
        self.grad_norms.copy_(torch.where(here, norm, self.grad_norms))
        self.accepted.add_(~skip)
        self.skipped_total.add_(skip)
        self.skipped_in_a_row.copy_(torch.where(skip, self.skipped_in_a_row + 1, 0))
        self._longest.copy_(torch.maximum(self._longest, self.skipped_in_a_row))
        return skip.float()

    def take_longest(self) -> int:
        """The most skipped steps in a row since the last call, ended by now or not; the host waits for the device."""
        longest = int(self._longest)
        self._longest.zero_()
        return longest

    def forget(self) -> None:
        """The history ends: what comes is another function of the parameters, whose losses are others."""
        self.accepted.zero_()

    def _limit(self, history: Tensor, floor: float) -> Tensor:
        """The largest value that passes: infinite until there is enough history."""
        valid = self._slots < self.accepted
        count = valid.sum().clamp_min(1)
        mean = torch.where(valid, history, 0).sum() / count
        std = (torch.where(valid, history - mean, 0).square().sum() / count).sqrt()
        limit = mean + self.sigma * torch.maximum(std, floor * mean.abs())
        return torch.where(self.accepted >= self.min_history, limit, float("inf"))

    def state(self) -> dict[str, Tensor]:
        """The live tensors that a checkpoint saves and loads in place."""
        return {
            "losses": self.losses,
            "grad_norms": self.grad_norms,
            "accepted": self.accepted,
            "skipped_total": self.skipped_total,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

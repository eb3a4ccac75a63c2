"""Hyperparameter scaling laws: the equations, their units and their sources. Imports nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepLaw:
    """Step Law (arXiv 2503.04715): the best peak learning rate and global batch for N and D.

        lr    = 1.79 * N^-0.713 * D^0.307
        batch = 0.58 * D^0.571            # tokens

    N: non-embedding linear weights; D: training tokens. Fitted on N 0.215-1.07 B and D 4-100 B, AdamW.
    """

    def lr(self, params: float, tokens: float) -> float:
        """Peak learning rate."""
        return 1.79 * params**-0.713 * tokens**0.307

    def batch_tokens(self, tokens: float) -> float:
        """Global batch in tokens."""
        return 0.58 * tokens**0.571


@dataclass(frozen=True)
class PowerLines:
    """Power Lines (arXiv 2505.13738): weight decay from AdamW's timescale tau.

        tau  = B / (lr * wd * D)
        tau* = 1.084 * (D / N)^-0.527     # R^2 = .975
        wd*  = B / (lr * tau* * D)        # B and D in tokens

    Fitted on models of 111M-3.3B with 10 % warm-up and linear decay to zero.
    """

    def tau(self, params: float, tokens: float) -> float:
        """Best timescale, as a fraction of the run."""
        return 1.084 * (tokens / params) ** -0.527

    def weight_decay(self, params: float, tokens: float, lr: float, batch_tokens: float) -> float:
        """Weight decay that gives the best timescale at this learning rate and batch."""
        return batch_tokens / (lr * self.tau(params, tokens) * tokens)

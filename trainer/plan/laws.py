"""Hyperparameter scaling laws: equations, units, ranges, intervals and sources. Imports nothing heavy.

N is the number of non-embedding linear weights (a mixture of experts: the total), D the training tokens, C the
non-embedding training FLOPs, 6 N D (a mixture: with the weights that one token uses). Batches are in tokens unless a
name says sequences.
"""

import math
from dataclasses import dataclass

from stepline.trainer.plan.power_law import PowerLaw, Ranges, Source, Spread

SEQUENCE = 2048
"""Tokens of the sequences in which Power Lines counts batches."""


@dataclass(frozen=True)
class LossLaw:
    """Chinchilla's loss as re-fitted by Epoch (arXiv 2404.10102): L = E + A / N^alpha + B / D^beta.

    Its intercept belongs to one tokenizer and corpus. A user's own fit has this form too.
    """

    source: Source
    entropy: float
    params_scale: float
    params_exponent: float
    tokens_scale: float
    tokens_exponent: float
    intervals: tuple[tuple[str, float, float], ...]
    equation: str = "L = 1.8172 + 482.01 / N^0.3478 + 2085.43 / D^0.3658"

    def loss(self, params: float, tokens: float) -> float:
        """Nats per token."""
        by_params = self.params_scale / params**self.params_exponent
        return self.entropy + by_params + self.tokens_scale / tokens**self.tokens_exponent


@dataclass(frozen=True)
class StepLaw:
    """Step Law (arXiv 2503.04715, eq. 1): the best peak learning rate and global batch of AdamW.

        lr    = 1.79 * N^-0.713 * D^0.307
        batch = 0.58 * D^0.571            # tokens

    A law fitted on a user's own runs has this form too (`stepline laws fit`).
    """

    source: Source
    lr_law: PowerLaw
    batch_law: PowerLaw
    optimizer: str = "adamw"
    sync: str = "all_reduce"
    assumes: str = "final learning rate 1e-5, weight decay .1"
    loss_law: LossLaw | None = None
    """The best loss on the user's own data."""
    held_out: str = ""
    """Split and data that `loss_law` is about; empty where that is not known."""
    kind: str = ""
    """Of the models (kind.py); empty where that is not known."""

    def lr(self, params: float, tokens: float) -> float:
        """Peak learning rate."""
        return self.lr_law(params, tokens)

    def batch_tokens(self, tokens: float) -> float:
        """Global batch in tokens."""
        return self.batch_law(tokens)

    @property
    def lr_equation(self) -> str:
        """The equation with this law's coefficients."""
        n, d = self.lr_law.exponents
        return f"lr = {self.lr_law.scale:.4g} * N^{n:.4g} * D^{d:.4g}"

    @property
    def batch_equation(self) -> str:
        """The equation with this law's coefficients."""
        return f"batch = {self.batch_law.scale:.4g} * D^{self.batch_law.exponents[0]:.4g}"


@dataclass(frozen=True)
class PowerLines:
    """Power Lines (arXiv 2505.13738): weight decay from AdamW's timescale, optimal and critical batch.

    tau    = B / (lr * wd * D)                   # B and D in tokens
    tau*   = 1.084 * (D / N)^-0.527              # R^2 = .975
    wd*    = B / (lr * tau* * D)
    B_opt  = 0.0306 * D^0.383                    # sequences of 2048
    B_crit = 0.0471 * D_min^0.462                # sequences of 2048
    D      = D_min * (1 + B / B_crit)            # equal loss; steps = D / B
    """

    source: Source
    tau_law: PowerLaw
    optimal_sequences: PowerLaw
    critical_sequences: PowerLaw
    tau_equation: str = "tau = 1.084 * (D/N)^-0.527"
    weight_decay_equation: str = "wd = B / (lr * tau * D)"
    optimal_equation: str = "B_opt = 2048 * 0.0306 * D^0.383"
    critical_equation: str = "B_crit = 2048 * 0.0471 * D_min^0.462"

    def tau(self, params: float, tokens: float) -> float:
        """Best timescale, as a fraction of the run."""
        return self.tau_law(tokens / params)

    def weight_decay(self, params: float, tokens: float, lr: float, batch_tokens: float) -> float:
        """Weight decay that gives the best timescale at this learning rate and batch."""
        return batch_tokens / (lr * self.tau(params, tokens) * tokens)

    def batch_tokens(self, tokens: float) -> float:
        """B_opt in tokens."""
        return SEQUENCE * self.optimal_sequences(tokens)

    def critical_batch_tokens(self, min_tokens: float) -> float:
        """B_crit in tokens: a batch that needs twice D_min, `min_tokens`, for the same loss."""
        return SEQUENCE * self.critical_sequences(min_tokens)

    def min_tokens(self, tokens: float, batch_tokens: float) -> float:
        """D_min: what a vanishing batch would need for the loss of `tokens` at `batch_tokens`.

        The fixed point of D_min = D / (1 + B / B_crit(D_min)), by bisection: B_crit's exponent is below 1.
        """
        low, high = tokens * 1e-12, tokens
        for _ in range(200):
            middle = math.sqrt(low * high)
            if middle * (1 + batch_tokens / self.critical_batch_tokens(middle)) < tokens:
                low = middle
            else:
                high = middle
        return high

    def tokens_for(self, min_tokens: float, batch_tokens: float) -> float:
        """D that reaches the loss of D_min at this batch."""
        return min_tokens * (1 + batch_tokens / self.critical_batch_tokens(min_tokens))


@dataclass(frozen=True)
class DeepSeekLaw:
    """DeepSeek LLM (arXiv 2401.02954, eq. 1): lr = .3118 C^-.125, batch = .2920 C^.3271 tokens.

    `active` are the linear weights that one token uses: N in a dense model, as C counts what is computed.
    """

    source: Source
    lr_law: PowerLaw
    batch_law: PowerLaw
    lr_equation: str = "lr = 0.3118 * C^-0.125"
    batch_equation: str = "batch = 0.2920 * C^0.3271"

    def lr(self, active: float, tokens: float) -> float:
        """Peak learning rate."""
        return self.lr_law(6 * active * tokens)

    def batch_tokens(self, active: float, tokens: float) -> float:
        """Global batch in tokens."""
        return self.batch_law(6 * active * tokens)


@dataclass(frozen=True)
class PorianLaw:
    """Porian et al. (arXiv 2406.19146): lr = 3.7 N^-.36, batch = .7576 N^.703 tokens."""

    source: Source
    lr_law: PowerLaw
    batch_law: PowerLaw
    lr_equation: str = "lr = 3.7 * N^-0.36"
    batch_equation: str = "batch = 0.7576 * N^0.703"

    def lr(self, params: float) -> float:
        """Peak learning rate."""
        return self.lr_law(params)

    def batch_tokens(self, params: float) -> float:
        """Global batch in tokens."""
        return self.batch_law(params)


STEP_LAW = StepLaw(
    Source(
        "Step Law",
        "arXiv 2503.04715",
        "N: non-embedding linear weights (total); D, batch: tokens",
        params=(0.2e9, 1.1e9),
        tokens=(4e9, 100e9),
        tokens_per_param=(18, 470),
        # all of 2.15e9 weights, but for rounding
        mixtures=Ranges(params=(2.1e9, 2.2e9), tokens=(2e9, 20e9), active_share=(0.087, 0.576)),
    ),
    # Spreads: moments of the 1000 bootstrap fits that the authors publish.
    PowerLaw(
        1.79,
        (-0.713, 0.307),
        Spread(
            (1e9, 1e11),
            (-6.39950551, -0.71292229, 0.30749095),
            (
                (0.00193756, 0.00050001, 0.00053289),
                (0.00050001, 0.00089149, -0.00017433),
                (0.00053289, -0.00017433, 0.00036631),
            ),
        ),
    ),
    PowerLaw(
        0.58,
        (0.571,),
        Spread((1e11,), (13.91758564, 0.57094436), ((0.00183108, 0.00067584), (0.00067584, 0.00034852))),
    ),
    kind="blocks=standard canon=none sparse=none",
)
POWER_LINES = PowerLines(
    Source(
        "Power Lines",
        "arXiv 2505.13738",
        "D, B: tokens; B_opt, B_crit: sequences of 2048",
        params=(111e6, 3.3e9),
    ),
    PowerLaw(1.084, (-0.527,)),
    PowerLaw(0.0306, (0.383,)),
    PowerLaw(0.0471, (0.462,)),
)
DEEPSEEK = DeepSeekLaw(
    Source("DeepSeek", "arXiv 2401.02954", "C: non-embedding FLOPs; batch: tokens", flops=(1e17, 2e19)),
    PowerLaw(0.3118, (-0.125,)),
    PowerLaw(0.2920, (0.3271,)),
)
PORIAN = PorianLaw(
    Source("Porian", "arXiv 2406.19146", "N: non-embedding weights; batch: tokens, at compute-optimal D"),
    PowerLaw(3.7, (-0.36,)),
    PowerLaw(0.7576, (0.703,)),
)
EPOCH = LossLaw(
    Source(
        "Epoch's Chinchilla fit",
        "arXiv 2404.10102",
        "N: weights; D: tokens; loss: nats, MassiveText",
        params=(70e6, 16e9),  # of Chinchilla's runs (arXiv 2203.15556, abstract)
        tokens=(5e9, 500e9),
    ),
    *(1.8172, 482.01, 0.3478, 2085.43, 0.3658),
    (("E", 1.769, 1.871), ("alpha", 0.317, 0.373), ("beta", 0.331, 0.415)),
)

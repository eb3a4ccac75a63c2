"""What a sweep consists of, run by run. Imports no torch.

N is the number of non-embedding linear weights of a shape, D its training tokens, a cell one pair (N, D).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stepline.models.config import ModelConfig
from stepline.models.flops import flops_per_token, parameter_counts
from stepline.trainer.config import Config
from stepline.trainer.errors import UserError
from stepline.trainer.plan.grid import Grid, log2_grid
from stepline.trainer.plan.kind import kind_of
from stepline.trainer.plan.laws import StepLaw
from stepline.trainer.plan.planner import Inputs, law_values, make_plan, round_batch
from stepline.trainer.plan.shapes import scaled_shape, widened_shape

DEFAULT_SIZES = (0.25, 0.5, 1.0)
DEFAULT_BUDGETS = (0.5, 1.0, 2.0)
"""Multiples of the config's own tokens per parameter."""
LARGEST_CHANGE_OF_BUDGET, LARGEST_MISS_OF_SIZE = 0.02, 0.2
MOST_RUNS = 10_000
"""More are a slip of the keyboard, and every one is checked before the first begins."""
SHAPE_KEYS = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_size")


@dataclass(frozen=True)
class SweepRun:
    """One run of the sweep; every field is set by the layout and kept."""

    name: str
    params: int
    tokens: int
    lr: float
    batch_tokens: int
    weight_decay: float
    optimizer: str
    sync: str
    schedule: str
    seed: int
    steps: int
    shape: dict[str, int | None]
    """Keys of the config's `model` that differ between the sizes."""
    flops: float
    """Of training."""
    eval_flops: float
    """Of the validation at the end: forward only."""
    kind: str = ""
    """Of the model (`kind.kind_of`); empty in the layout of a sweep that is older than it."""

    def overrides(self) -> list[str]:
        """What this run sets in the sweep's config."""
        shape = [f"model.{key}={'null' if v is None else v}" for key, v in self.shape.items()]
        return [
            *shape,
            f"budget.tokens={self.tokens}",
            f"budget.batch_tokens={self.batch_tokens}",
            f"optimizer.lr={self.lr!r}",
            f"optimizer.weight_decay={self.weight_decay!r}",
            f"run.seed={self.seed}",
        ]


@dataclass(frozen=True)
class Layout:
    """All runs, the cheapest first: what is wrong with a sweep shows early."""

    runs: tuple[SweepRun, ...]
    notes: tuple[str, ...] = ()
    """What one should know beforehand, each one sentence."""


def lay_out(
    config: Config, grid: Grid, law: StepLaw, corpus_tokens: int | None, eval_tokens: int = 0
) -> Layout:
    """The runs of a sweep.

    corpus_tokens: training tokens on disk, for a config without a budget (one epoch); eval_tokens: those of the
    split that each run ends with. Raises UserError for a grid that cannot be run.
    """
    quantum = grid.ranks * config.data.seq_len
    quantum *= 1 if config.parallel.micro_batch == "auto" else config.parallel.micro_batch
    notes: list[str] = []
    shapes = _shapes(config.model, grid, notes)
    centre = _lr_centre(config, grid, law, notes)
    runs: list[SweepRun] = []
    for shape in shapes:
        n = parameter_counts(shape).linear
        flops = flops_per_token(shape, config.data.seq_len).total
        cells: set[int] = set()
        for asked in _budgets(config, grid, n, corpus_tokens):
            batches = _batches(grid, law, n, asked, quantum)
            tokens = _whole_batches(asked, batches)
            if tokens in cells:
                raise UserError(f"two budgets are both {tokens:,} tokens in whole batches; take one out")
            cells.add(tokens)
            rates = grid.lr or [float(f"{lr:.4g}") for lr in log2_grid(centre(n, asked), grid.lr_points)]
            if len(runs) + len(rates) * len(batches) * grid.seeds > MOST_RUNS:
                raise UserError(f"the grid has more than {MOST_RUNS:,} runs; take fewer values or --seeds")
            runs += [
                _run(config, law, shape, tokens, lr, batch, config.run.seed + i, flops, eval_tokens)
                for lr in rates
                for batch in batches
                for i in range(grid.seeds)
            ]
    _check_names(runs)
    # Stable: runs of one cell cost the same and stay together, in the order of learning rate and batch.
    runs.sort(key=lambda run: run.flops + run.eval_flops)
    return Layout(tuple(runs), (*notes, *_notes(config, runs, corpus_tokens)))


def _check_names(runs: list[SweepRun]) -> None:
    """Two runs of one name would share a folder and a result."""
    named: dict[str, SweepRun] = {}
    for run in runs:
        if (other := named.setdefault(run.name, run)) is not run:
            raise UserError(
                f"--lr {other.lr!r} and {run.lr!r} are alike in the name of a run, {run.name}; "
                "take values farther apart"
            )


def _shapes(model: ModelConfig, grid: Grid, notes: list[str]) -> list[ModelConfig]:
    if grid.widths is not None:
        return [widened_shape(model, width) for width in grid.widths]
    shapes: dict[int, float] = {}
    found = []
    for fraction in grid.sizes or DEFAULT_SIZES:
        shape = scaled_shape(model, fraction)
        n = parameter_counts(shape).linear
        if n in shapes:
            raise UserError(
                f"--sizes {shapes[n]:g} and {fraction:g} give the same model of {n:,} weights; "
                "take fractions farther apart"
            )
        shapes[n] = fraction
        share = n / parameter_counts(model).linear
        if abs(share / fraction - 1) > LARGEST_MISS_OF_SIZE:
            notes.append(f"the nearest shape to --sizes {fraction:g} has {share:.3g} of N: heads are whole")
        found.append(shape)
    return found


def _budgets(config: Config, grid: Grid, params: int, corpus_tokens: int | None) -> Sequence[float]:
    if grid.tokens is not None:
        return grid.tokens
    if grid.tokens_per_param is not None:
        return [params * ratio for ratio in grid.tokens_per_param]
    budget = config.budget
    own = budget.tokens or corpus_tokens
    if budget.steps is not None:
        if budget.batch_tokens == "auto":
            raise UserError("budget.steps needs budget.batch_tokens, or give --tokens")
        own = budget.steps * budget.batch_tokens
    if own is None:
        raise UserError("the config has no budget; give --tokens or --tokens-per-param")
    ratio = own / parameter_counts(config.model).linear
    return [params * ratio * factor for factor in DEFAULT_BUDGETS]


def _batches(grid: Grid, law: StepLaw, params: int, tokens: float, quantum: int) -> list[int]:
    """Batches of a cell in tokens, multiples of the quantum (ranks x micro-batch x sequence)."""
    if grid.batch_tokens is None:
        # The smallest is rounded and the others doubled, so that the factors are 2 exactly.
        smallest = round_batch(log2_grid(law_values(law, params, tokens)[1], grid.batch_points)[0], quantum)
        batches = [smallest * 2**i for i in range(grid.batch_points)]
    else:
        batches = [round_batch(batch, quantum) for batch in grid.batch_tokens]
        for i, batch in enumerate(batches):
            if batch in batches[:i]:
                first = grid.batch_tokens[batches.index(batch)]
                raise UserError(
                    f"--batch-tokens {first:g} and {grid.batch_tokens[i]:g} are both {batch} once rounded to "
                    f"multiples of {quantum} tokens; take values farther apart"
                )
    if tokens < max(batches):
        raise UserError(
            f"a budget of {tokens:,.0f} tokens is below one batch of {max(batches):,}; "
            "give larger --tokens or smaller --batch-tokens"
        )
    return batches


def _whole_batches(tokens: float, batches: list[int]) -> int:
    """D as a multiple of all batches of its cell, so that its runs see equally many tokens, if that is near."""
    common = math.lcm(*batches)
    rounded = round(tokens / common) * common
    return rounded if abs(rounded - tokens) <= LARGEST_CHANGE_OF_BUDGET * tokens else round(tokens)


def _lr_centre(config: Config, grid: Grid, law: StepLaw, notes: list[str]):
    """The middle of the learning rates as a function of (N, D)."""
    own = config.optimizer
    if grid.lr is not None:
        return law.lr
    if law.optimizer == own.name:
        if own.lr != "auto":
            notes.append(
                f"optimizer.lr {own.lr:g} is not used: the learning rates are around those of {law.source.name}"
            )
        return law.lr
    told = (
        f"{law.source.name} was fitted with {law.optimizer}, not {own.name}: the learning rates are around "
    )
    if own.lr == "auto":
        notes.append(f"{told}its values all the same; give --lr where they are off")
        return law.lr
    notes.append(f"{told}optimizer.lr {own.lr:g}")
    return lambda params, tokens: own.lr


def _run(
    config: Config,
    law: StepLaw,
    shape: ModelConfig,
    tokens: int,
    lr: float,
    batch: int,
    seed: int,
    flops: float,
    eval_tokens: int,
) -> SweepRun:
    own, counts = config.optimizer, parameter_counts(shape)
    n, decay, kind = counts.linear, own.weight_decay, kind_of(config)
    if decay == "auto":
        inputs = Inputs(
            n,
            tokens,
            active_params=counts.active,
            batch_tokens=batch,
            lr=lr,
            optimizer=own.name,
            sync=config.parallel.sync,
            kind=kind,
        )
        decay = float(f"{make_plan(inputs, law).weight_decay:.4g}")
    steps = math.ceil(tokens / batch)
    return SweepRun(
        name=f"n{n}-d{tokens}-lr{lr:.4g}-b{batch}-s{seed}",
        params=n,
        tokens=tokens,
        lr=lr,
        batch_tokens=batch,
        weight_decay=decay,
        optimizer=own.name,
        sync=config.parallel.sync,
        schedule=config.schedule.name,
        seed=seed,
        steps=steps,
        shape=_shape_keys(shape),
        flops=flops * steps * batch,
        eval_flops=flops / 3 * eval_tokens,
        kind=kind,
    )


def _shape_keys(shape: ModelConfig) -> dict[str, int | None]:
    found = {key: getattr(shape, key) for key in SHAPE_KEYS}
    if shape.ffn == "moe" and shape.moe.shared_size:
        found["moe.shared_size"] = shape.moe.shared_size
    return found


def _notes(config: Config, runs: list[SweepRun], corpus_tokens: int | None) -> list[str]:
    notes = []
    own = config.budget.batch_tokens
    if own != "auto" and own not in {run.batch_tokens for run in runs}:
        notes.append(f"budget.batch_tokens {own:,} is not used: give --batch-tokens to have it in the grid")
    fewest = min(run.steps for run in runs)
    if fewest < 50:
        notes.append(f"the shortest runs have {fewest} steps: smaller batches or larger budgets say more")
    warmup = config.schedule.warmup_steps
    if warmup != "auto" and warmup > fewest / 4:
        notes.append(
            f"schedule.warmup_steps is {warmup} in every run, more than a quarter of the {fewest} steps of the "
            "shortest; schedule.warmup_steps=auto makes it 10 % of each"
        )
    most = max(run.tokens for run in runs)
    if corpus_tokens is not None and most > 1.01 * corpus_tokens:
        notes.append(f"the largest budget repeats the corpus {most / corpus_tokens:.1f} times")
    uneven = max(run.steps * run.batch_tokens / run.tokens - 1 for run in runs)
    if uneven > LARGEST_CHANGE_OF_BUDGET:
        notes.append(
            f"whole batches exceed a budget by up to {100 * uneven:.0f} %; runs.csv holds the budget"
        )
    return notes

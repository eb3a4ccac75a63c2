"""The configuration of a run: YAML sections, one-level `base:`, dotted overrides, the origin of every value.

Imports no torch: `stepline plan`, `--help` and every check of a user's mistake answer at once.
"""

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from stepline.models.config import ModelConfig, Section
from stepline.trainer.config_optimizer import OptimizerConfig, ScheduleConfig
from stepline.trainer.config_sparse import SparseConfig
from stepline.trainer.config_sync import DeMoConfig, DiLoCoConfig, RandomKConfig
from stepline.trainer.config_types import YEAR_S, Auto, Count, HomePath, off
from stepline.trainer.config_zero import DeepSpeedConfig, ZeroConfig


class Source(Section):
    """One prepared data folder and its share of the training windows."""

    path: HomePath
    """Folder written by `stepline prepare`."""
    weight: float = Field(1.0, gt=0, le=1e15)
    """Share of the windows, relative to the other sources' weights."""


class DataConfig(Section):
    """What is read, and how it is cut."""

    path: HomePath | None = None
    """Folder written by `stepline prepare`; for several, use `sources`."""
    sources: Annotated[list[Source], BeforeValidator(lambda value: [] if value is None else value)] = Field(
        default_factory=list
    )
    """Several folders with mixture weights, instead of `path`."""
    seq_len: Count = Field(1024, ge=2)
    """Tokens per window."""
    confine_attention: bool = False
    """Attend only within the same document of a packed window."""
    prefetch: int = Field(2, ge=1, le=64)
    """Batches read ahead by a background thread."""
    verify: Annotated[Literal["auto", "start", "background", "off"], BeforeValidator(off)] = "auto"
    """Compare the shards that the run reads with their checksums: at the start; in the background of the training;
    off; auto: at the start where a rank has at most 8 GB to read, else in the background."""

    @model_validator(mode="after")
    def _one_way(self) -> "DataConfig":
        if self.path is not None and self.sources:
            raise ValueError("give either data.path or data.sources, not both")
        return self

    def folders(self) -> list[Source]:
        """The sources, whichever way they were given."""
        return self.sources or ([Source(path=self.path)] if self.path is not None else [])


class BudgetConfig(Section):
    """How long the run is."""

    tokens: Count | None = Field(None, ge=1)
    """D: training tokens; beyond the corpus it repeats (epochs)."""
    steps: Count | None = Field(None, ge=1, le=10**15)
    """Optimizer steps, instead of `tokens`."""
    batch_tokens: Auto | Annotated[Count, Field(ge=1, le=10**15)] = "auto"
    """Global batch in tokens; auto: by the scaling law, rounded to ranks x micro-batch x sequence."""
    law: HomePath | None = None
    """law.json of `stepline laws fit`, or the name of a shipped one; default: Step Law (arXiv 2503.04715)."""

    @model_validator(mode="after")
    def _one_way(self) -> "BudgetConfig":
        if self.tokens is not None and self.steps is not None:
            raise ValueError("give either budget.tokens or budget.steps, not both")
        return self


class ParallelConfig(Section):
    """How ranks divide the work."""

    backend: Literal["fsdp", "zero"] = "fsdp"
    """PyTorch FSDP2, or DeepSpeed ZeRO (docs/zero.md)."""
    zero: ZeroConfig = ZeroConfig()
    """Of backend zero."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """Of backend zero: keys that DeepSpeed gets as they are."""
    shard: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Ranks that shard one replica (replicas = world / shard); auto: on GPUs the fewest with which a step fits
    in their memory, else all ranks; where sync is not all_reduce, the ranks of a node, on one node 1."""
    experts: int = Field(1, ge=1)
    """Ranks of a replica among which a mixture's experts are dealt (expert parallelism); the rest of the replica
    shards what each of them holds."""
    sync: Literal["all_reduce", "demo", "diloco", "random_k"] = "all_reduce"
    """How replicas agree: on every gradient; or, over slow links, on a small part of what they would tell each
    other (demo, random_k) or now and then (diloco)."""
    demo: DeMoConfig = DeMoConfig()
    """Of sync demo."""
    diloco: DiLoCoConfig = DiLoCoConfig()
    """Of sync diloco."""
    random_k: RandomKConfig = RandomKConfig()
    """Of sync random_k."""
    check_replicas_every: Count = Field(100, ge=0)
    """Steps between comparisons of the replicas bit by bit, which end the run where they differ; they are
    compared before every checkpoint too. 0: only at the start."""
    micro_batch: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Windows of one forward-backward on one rank; auto: up to 16,384 tokens on a GPU, 8,192 on a CPU, fewer where
    the memory does not hold them."""
    reshard_after_forward: bool = True
    """Free a block's gathered parameters after its forward and gather them again in backward (ZeRO-3)."""
    timeout_s: float = Field(600.0, gt=0, le=YEAR_S)
    """Seconds after which a collective that hangs ends the run."""


class PrecisionConfig(Section):
    """Numbers in compute; parameters and optimizer state are fp32 (fp64 when compute is fp64)."""

    compute: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """auto: bf16 on a GPU that has it, fp32 on CPUs."""
    fp8: bool = False
    """Products of the blocks' linear layers in FP8 (E4M3, gradients E5M2); simulated where the device has none."""
    fp8_scales: Literal["tensor", "row"] = "tensor"
    """What shares a scale in FP8: tensor, all of an operand; row, a token, and a row of a weight (dense ones alone),
    so that one outlier costs the others no precision."""
    reduce: Literal["parameters", "bf16"] = "parameters"
    """Type in which gradients are summed over ranks: that of the parameters, or bf16, which halves what is sent: they
    are rounded as they are sent, and summed over micro-batches in the parameters' type."""


class CheckpointConfig(Section):
    """What is kept on disk."""

    every: Auto | Annotated[Count, Field(ge=1)] = "auto"
    """Steps between permanent checkpoints, which all stay, like the last; auto: a tenth of the run."""
    ephemeral_minutes: float | None = Field(5.0, gt=0, allow_inf_nan=True)
    """Minutes between ephemeral checkpoints, for a restart; null: none but those of a run that is told to stop."""
    keep: int = Field(2, ge=1)
    """Newest ephemeral checkpoints that are kept."""


class LoggingConfig(Section):
    """What is watched."""

    every: Count = Field(10, ge=1)
    """Steps between rows of metrics.jsonl."""
    eval_every: Auto | Annotated[Count, Field(ge=0)] = "auto"
    """Steps between validations, 0 for none before the end; auto: a tenth of the run."""
    eval_windows: Auto | Annotated[Count, Field(ge=1)] | None = "auto"
    """Windows of a validation during the run, evenly spaced; null: the whole split, as at the end always; auto: so many
    that all of them compute a twentieth of what training does, at least 64."""
    eval_split: Literal["val", "tune"] = "val"
    """Held-out split of the validations; tune for runs that settings are chosen by, so that val stays unseen."""
    wandb: Annotated[Literal["auto", "online", "offline", "off"], BeforeValidator(off)] = "auto"
    """auto: online when a key is there, else offline; off: not at all."""
    project: str = "stepline"
    """wandb project."""


class RunConfig(Section):
    """Where and how the run goes."""

    folder: HomePath | None = None
    """The run's folder; default runs/NAME with the config file's name."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the data order and of the initial weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is a GPU for every rank, else the CPU."""
    compile: Auto | bool = "auto"
    """torch.compile per block; auto: on CUDA."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recompute: none; selective (attention and products are kept; of attention that is compiled by itself,
    as beside experts, not its linear layers' products); full (a block's input is kept)."""
    deterministic: bool = False
    """Deterministic kernels on CUDA (slower): a resume is then bitwise the same run."""
    init_from: HomePath | None = None
    """Start from the weights of another run or checkpoint."""
    profile: bool = False
    """Write a torch profiler trace of steps 5 to 8 and, on CUDA, a memory snapshot to the run's folder."""


class Config(Section):
    """A whole run. `stepline train CONFIG section.key=value` overrides single values."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    budget: BudgetConfig = BudgetConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    sparse: SparseConfig = SparseConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    run: RunConfig = RunConfig()

    def total_steps(self) -> int:
        """Optimizer steps of a resolved config: ceil(D / B)."""
        if self.budget.steps is not None:
            return self.budget.steps
        return -(-self.budget.tokens // self.budget.batch_tokens)

    def dense_from(self) -> float:
        """Index of the first step whose forwards are no longer sparse; infinite without `sparse.dense_fraction`."""
        fraction = self.sparse.dense_fraction
        return dense_from(fraction, self.total_steps()) if fraction else math.inf


def dense_from(fraction: float, steps: int) -> int:
    """Index of the first of the dense steps, which are `fraction` of `steps`."""
    return round((1 - fraction) * steps)


MAY_CHANGE_ON_RESUME = (
    "parallel.backend",
    "parallel.zero.*",
    "parallel.deepspeed.*",
    "parallel.shard",
    "parallel.experts",
    "parallel.micro_batch",
    "parallel.reshard_after_forward",
    "parallel.timeout_s",
    "parallel.demo.ahead",
    "sparse.forward",
    "sparse.force",
    "data.path",
    "data.sources",
    "data.prefetch",
    "data.verify",
    "checkpoint.*",
    "logging.every",
    "logging.eval_every",
    "logging.eval_windows",
    "logging.wandb",
    "logging.project",
    "run.folder",
    "run.device",
    "run.compile",
    "run.recompute",
    "run.profile",
    "run.init_from",
)
"""Keys (or whole sections) that may differ between the attempts of one run; data.path because a folder may
have moved: its fingerprint, which the checkpoint holds, may not differ. Not logging.eval_split: one curve, and the loss
that is expected of the run, are of one text."""

BUDGET = ("budget.tokens", "budget.steps")
"""D, which may differ too where the schedule is wsd and its decay has not begun."""
